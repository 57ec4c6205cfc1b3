"""The model hub: is it there?"""

import urllib.error
import urllib.request

from huggingface_hub import constants


def no_network() -> bool:
    """Whether the hub does not answer within three seconds; downloads would retry for 20 to 50."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except urllib.error.HTTPError:
        return False
    except OSError:
        return True
    return False
