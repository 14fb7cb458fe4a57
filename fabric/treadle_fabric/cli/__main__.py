"""``python -m treadle_fabric.cli``."""

import sys

from treadle_fabric.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
