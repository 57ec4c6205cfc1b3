"""Training on a GPU: ``configs/a100.yaml``, changed by flags. See ``hamt train --help``."""

import sys
from pathlib import Path

from hamt.cli import main

CONFIG = Path(__file__).resolve().parent / "configs" / "a100.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
