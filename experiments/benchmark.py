"""The documented benchmark. See ``hamt bench --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
