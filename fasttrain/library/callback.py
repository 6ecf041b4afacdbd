"""Hooks of a `Trainer`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasttrain.library.trainer import Trainer


class Callback:
    """Base class for hooks. Each method receives the trainer.

    Override the methods that you need::

        class StopAtLoss(Callback):
            def on_evaluate(self, trainer, result):
                if result["val_loss"] < 2.0:
                    trainer.stop()

        Trainer(model, optimizer, callbacks=[StopAtLoss()])
    """

    def on_step_end(self, trainer: "Trainer") -> None:
        """Called after each optimizer step; ``trainer.stop()`` ends the training."""

    def on_epoch_end(self, trainer: "Trainer") -> None:
        """Called after each pass over the training loader."""

    def on_evaluate(self, trainer: "Trainer", result: dict[str, float]) -> None:
        """Called after each evaluation."""

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        """Called after each checkpoint has been written to disk."""


EVENTS = [name for name in vars(Callback) if name.startswith("on_")]
