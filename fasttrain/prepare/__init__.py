"""Text to token shards: the tool behind ``python -m fasttrain.prepare``.

`fasttrain.data` reads what this package writes.
"""

from fasttrain.prepare.build import merge, prepare
from fasttrain.prepare.command import main

__all__ = ["main", "merge", "prepare"]
