"""``python -m fasttrain.report``: the command of `fasttrain.report.command`."""

import sys

from fasttrain.report.command import main

if __name__ == "__main__":
    sys.exit(main())
