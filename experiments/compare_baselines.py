"""The documented comparison with baselines. See ``hamt compare --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
