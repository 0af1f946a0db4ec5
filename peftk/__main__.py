"""``python -m peftk`` is the command ``peftk``."""

import sys

from peftk.cli import main

if __name__ == "__main__":
    sys.exit(main())
