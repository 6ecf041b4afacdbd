"""Train any module: `Trainer`, `train_loop` and `Callback`. See docs/library.md."""

from fasttrain.library.callback import Callback
from fasttrain.library.loop import train_loop
from fasttrain.library.trainer import Trainer

__all__ = ["Callback", "Trainer", "train_loop"]
