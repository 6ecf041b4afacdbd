"""``python -m fasttrain.evaluate``: the command of `fasttrain.evaluate.command`."""

import sys

from fasttrain.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
