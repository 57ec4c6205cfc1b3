"""The documented analysis of a model's memories. See ``hamt analyze --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
