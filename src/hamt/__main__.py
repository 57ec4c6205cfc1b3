"""``python -m hamt`` is the ``hamt`` command."""

import sys

from hamt.cli import main

if __name__ == "__main__":
    sys.exit(main())
