"""The documented demo: a small model, trained on real text, that writes. See ``hamt demo --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
