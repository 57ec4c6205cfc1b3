"""The documented ablation study. See ``hamt ablate --help``."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
