"""The documented demo: a small model is trained on real text, and writes (``hamt demo --help``)."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
