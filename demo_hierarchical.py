"""The documented demo of fast and slow memory. See ``hamt demo --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", "--hierarchical", *sys.argv[1:]]))
