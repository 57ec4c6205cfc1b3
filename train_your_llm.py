"""Training on your own text: ``--size small --epochs 5``. See ``hamt train --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
