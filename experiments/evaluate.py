"""The documented analysis of a trained model. See ``hamt evaluate --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
