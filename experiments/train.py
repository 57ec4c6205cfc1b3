"""The documented full training: ``default_config.yaml`` and flags (see ``hamt train --help``)."""

import sys
from pathlib import Path

from hamt.cli import main

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "default_config.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
