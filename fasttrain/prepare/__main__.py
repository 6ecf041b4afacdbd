"""``python -m fasttrain.prepare``: the command of `fasttrain.prepare.command`."""

import sys

from fasttrain.prepare.command import main

if __name__ == "__main__":
    sys.exit(main())
