"""Whether the Hugging Face Hub can be reached."""

import urllib.error
import urllib.request

from huggingface_hub import constants


def no_network() -> bool:
    """Whether the hub gives no answer within three seconds.

    Downloads that are tried without a network would be retried for 20 to 50 seconds.
    """
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except urllib.error.HTTPError:  # an answer
        return False
    except OSError:
        return True
    return False
