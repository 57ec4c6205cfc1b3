"""The documented quick training. See ``hamt quick-train --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["quick-train", *sys.argv[1:]]))
