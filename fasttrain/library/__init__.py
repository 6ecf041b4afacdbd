"""Train any module: `Trainer`, `train_loop` and `Callback`. See docs/library.md."""

from fasttrain.library.trainer import Callback, Trainer, train_loop

__all__ = ["Callback", "Trainer", "train_loop"]
