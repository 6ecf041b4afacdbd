"""When a run saves, what of it is saved beside its tensors, and how it is restored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasttrain.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, load
from fasttrain.config import config_to_toml
from fasttrain.state import collect, restore

if TYPE_CHECKING:
    from fasttrain.trainer import Trainer

__all__ = ["Saver"]

MAX_FAILED_SAVES = 5  # then the run ends: it would lose all that comes after


class Saver:
    """Saves and restores one run.

    Args:
        trainer: the run; without a ``run_dir`` nothing is written.

    Attributes:
        saved_at: the step of the newest checkpoint, None before the first.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.saved_at: int | None = None
        self.failed_saves = 0
        self.writer: CheckpointWriter | None = None
        config = trainer.config.checkpoint
        if trainer.run_dir is not None:
            self.writer = CheckpointWriter(
                trainer.run_dir / "checkpoints",
                keep_last=config.keep_last,
                asynchronous=config.asynchronous,
            )

    def save_once(self) -> None:
        """Save unless this step is saved; a save that failed (disk full, say) does not end the run.

        The error of a save in the background comes out of the next one, which is then begun anew.
        """
        for _ in range(2):
            if self.saved_at == self.trainer.step_count:
                return
            try:
                self.save()
                self.failed_saves = 0
            except CheckpointError as error:
                self.failed_saves += 1
                if self.failed_saves >= MAX_FAILED_SAVES:
                    raise
                if self.trainer.console:
                    self.trainer.console.warn(f"{error} (training goes on)")

    def save(self) -> Path | None:
        """Save now; see `Trainer.save_checkpoint`."""
        trainer = self.trainer
        if self.writer is None:
            self.saved_at = trainer.step_count
            return None
        groups = collect(trainer.model, trainer.optimizers, trainer.train_step)
        metric = trainer.last_eval.get("val_loss")
        toml = config_to_toml(trainer.config)
        path = self.writer.save(trainer.step_count, groups, self._state(), toml, metric=metric)
        self.saved_at = trainer.step_count
        return path

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        best = trainer.best_val_loss
        return {
            "step": trainer.step_count,
            "position": trainer.position,
            "total_steps": trainer.total_steps,
            "trained_s": trainer.trained_s,
            "first_step_s": trainer.first_step_s,
            "best_val_loss": best if math.isfinite(best) else None,
            "loss_ema": trainer.ema.value,
            "torch": torch.__version__,
            **trainer.recorded,
        }

    def load(self, path: Path) -> Checkpoint:
        """Restore; see `Trainer.load_checkpoint`."""
        trainer = self.trainer
        checkpoint = load(path)
        restore(checkpoint, trainer.model, trainer.optimizers, trainer.train_step)
        state = checkpoint.state
        trainer.step_count = self.saved_at = state["step"]
        trainer.position = state["position"]
        trainer.total_steps = trainer.total_steps or state["total_steps"]
        trainer.trained_s, trainer.first_step_s = state["trained_s"], state["first_step_s"]
        best = state["best_val_loss"]
        trainer.best_val_loss = math.inf if best is None else best
        trainer.ema.value = state["loss_ema"]
        if trainer.jsonl:
            trainer.jsonl.drop_after(trainer.step_count)
        return checkpoint

    def close(self) -> None:
        """Wait for the save in flight; raises CheckpointError if it failed."""
        if self.writer:
            self.writer.close()
