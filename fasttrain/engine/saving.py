"""When a run saves, what of it is saved beside its tensors, and how it is restored."""

from __future__ import annotations

import math
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, load
from fasttrain.checkpoint.files import history
from fasttrain.command import redact
from fasttrain.config import config_to_toml
from fasttrain.distributed.lockstep import differing_step
from fasttrain.engine.state import collect, restore, rng_of_rank
from fasttrain.log.timing import TimeAccount
from fasttrain.model.runtime import resolve_compile

if TYPE_CHECKING:
    from fasttrain.engine.trainer import Trainer

__all__ = ["Saver"]

MAX_FAILED_SAVES = 5  # then the run ends: it would lose all that comes after


def _finite(number: float) -> float | None:
    """Return what JSON can hold of a number."""
    return number if math.isfinite(number) else None


class Saver:
    """Saves and restores one run.

    Args:
        trainer: the run; without a ``run_dir`` nothing is written.

    Attributes:
        saved_at: the step of the newest checkpoint, None before the first.
        regular: whether all steps of the run were of as many samples, and these as long.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # How long a rank waits for the others' parts of a checkpoint, on a slow disk as well.
        self.patience_s = max(600.0, 2 * trainer.config.distributed.timeout_s)
        self.saved_at: int | None = None
        self.regular = trainer.train_loader.position == 0
        self.failed_saves = 0  # in a row
        self._failed_at: int | None = None  # the step whose own save failed
        self._begun = False  # a save of which it is not known yet whether it was committed
        self.writer: CheckpointWriter | None = None
        config = trainer.config.checkpoint
        world = trainer.world
        if trainer.run_dir is not None:
            self.writer = CheckpointWriter(
                trainer.run_dir / "checkpoints",
                keep_last=config.keep_last,
                asynchronous=config.asynchronous,
                rank=world.rank,
                world_size=world.size,
                session=world.share(secrets.token_hex(8)),
                patience_s=self.patience_s,
                warn=trainer.reporter.warn,
            )

    def save_once(self) -> None:
        """Save unless this step is saved; a save that failed (disk full, say) does not end the run.

        The error of a save in the background comes out here, at the next one, which is then begun.
        """
        step = self.trainer.step_count
        if step in (self.saved_at, self._failed_at):
            return
        self._expect_to_wait()
        counted = False
        try:
            self._settle()
        except CheckpointError as error:
            self._fail(error)
            counted = True
        try:
            self.save()
        except CheckpointError as error:
            self._failed_at = step
            self._fail(error, again=counted)

    def _expect_to_wait(self) -> None:
        """Have the watchdog outlast the writer, which says more of what went wrong."""
        limit_s = self.patience_s + self.trainer.config.distributed.timeout_s
        self.trainer.lockstep.watchdog.beat(limit_s)

    def save_now(self, rng: dict[str, Tensor]) -> None:
        """Save this step with these random states; return when it is committed.

        Raises:
            CheckpointError: it could not be saved.
        """
        if self.writer is None:
            return
        self._expect_to_wait()
        # The step that was given up computes on: a thread that gives way to it would take long.
        self.writer.asynchronous = False
        self.writer.pinned = False  # to pin memory may wait for what hangs on the device
        if problem := differing_step(self.trainer.world, self.trainer.step_count):
            raise CheckpointError(f"the state before this step was not saved: {problem}")
        try:
            self._settle()
        except CheckpointError as error:
            self.trainer.reporter.warn(str(error))
        if self.saved_at != self.trainer.step_count:
            self.save(rng)
            self._settle()

    def _settle(self) -> None:
        """Wait for the save in flight; raises CheckpointError if it failed."""
        if self.writer is None:
            return
        begun, self._begun = self._begun, False
        saved_at, self.saved_at = self.saved_at, None
        with self.trainer.account.measure("checkpoint"):
            self.writer.wait()
        self.saved_at = saved_at
        if begun:
            self.failed_saves = 0

    def _fail(self, error: CheckpointError, *, again: bool = False) -> None:
        self.failed_saves += not again
        if self.failed_saves >= MAX_FAILED_SAVES:
            raise error
        self.trainer.reporter.warn(f"{error} (training goes on)")

    def save(self, rng: dict[str, Tensor] | None = None) -> Path | None:
        """Save now; see `Trainer.save_checkpoint`."""
        trainer = self.trainer
        if self.writer is None:
            self.saved_at = trainer.step_count
            return None
        rank = trainer.world.rank
        groups = collect(trainer.model, trainer.optimizers, trainer.train_step, rank)
        groups["trainer"] |= rng_of_rank(rng or {}, rank)
        metric = trainer.last_eval.get("val_loss")
        toml = config_to_toml(trainer.config, redact)
        with trainer.account.measure("checkpoint"):
            path = self.writer.save(trainer.step_count, groups, self._state(), toml, metric=metric)
        self.saved_at, self._begun = trainer.step_count, True
        return path

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "step": trainer.step_count,
            "position": trainer.position,
            "tokens": trainer.reporter.n_tokens,
            "total_steps": trainer.total_steps,
            "eval_due": trainer.eval_due,
            "trained_s": trainer.trained_s,
            "samples_per_step": trainer.samples_per_step,
            "regular": self.regular,
            "best_val_loss": _finite(trainer.best_val_loss),
            "loss_ema": trainer.reporter.ema.value,
            "val_losses": [_finite(loss) for loss in trainer.val_losses],
            "faults": trainer.recovery.policy.state(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads() if trainer.device.type == "cpu" else None,
            "run.compile": resolve_compile(trainer.config, trainer.device),
            **trainer.recorded,
        }

    def load(self, path: Path) -> Checkpoint:
        """Restore; see `Trainer.load_checkpoint`."""
        trainer = self.trainer
        checkpoint = load(path)
        self._restore(checkpoint)
        trainer.trained_s = checkpoint.state["trained_s"]
        hours = checkpoint.config.train.hours
        if trainer.total_steps is None and trainer.config.train.hours == hours:
            trainer.total_steps = checkpoint.state["total_steps"]
        trainer.recovery.policy.load(checkpoint.state["faults"])
        trainer.account = TimeAccount(trainer.step_count)
        return checkpoint

    def go_back(self, before: int) -> Checkpoint | None:
        """Restore the newest intact checkpoint from before a step, but for time and faults.

        Args:
            before: the step that must not be in it.

        Returns:
            The checkpoint, or None where there is none.
        """
        if self.writer is None:
            return None
        self._failed_at = None
        self._expect_to_wait()
        try:
            self._settle()
        except CheckpointError as error:
            self._fail(error)
        for path in self._shared_history(before):
            checkpoint, problem = None, None
            try:
                checkpoint = load(path)
            except CheckpointError as error:
                problem = str(error)
            # One rank's disk may fail it: all go back to the same step.
            problems = [p for p in self.trainer.world.gather(problem) if p is not None]
            if checkpoint is None or problems:
                self.trainer.reporter.warn(f"passing over a damaged checkpoint: {problems[0]}")
                continue
            self._restore(checkpoint)
            self.saved_at = None  # where the run stops here, its rollback is to be remembered
            return checkpoint
        return None

    def _shared_history(self, before: int) -> list[Path]:
        """Return rank 0's list: while others wait no longer, it may still remove checkpoints."""
        assert self.writer is not None
        found = [
            path.name
            for path, manifest in history(self.writer.folder)
            if manifest is not None and manifest["step"] < before
        ]
        return [self.writer.folder / name for name in self.trainer.world.share(found)]

    def _restore(self, checkpoint: Checkpoint) -> None:
        trainer, state = self.trainer, checkpoint.state
        rank = trainer.world.rank
        restore(checkpoint, trainer.model, trainer.optimizers, trainer.train_step, rank)
        trainer.step_count = self.saved_at = state["step"]
        trainer.position = state["position"]
        seq_len = trainer.config.data.seq_len
        now = (True, trainer.samples_per_step, seq_len)
        then = (state.get("regular"), state.get("samples_per_step"), checkpoint.config.data.seq_len)
        self.regular = now == then
        all_rows = trainer.position * seq_len  # of a save without the count
        trainer.reporter.n_tokens = state.get("tokens", all_rows)
        trainer.last_eval, trainer.eval_due = {}, state["eval_due"]
        best, *losses = (
            math.inf if loss is None else loss
            for loss in (state["best_val_loss"], *state.get("val_losses", []))
        )
        trainer.best_val_loss, trainer.val_losses = best, losses
        trainer.reporter.ema.value = state["loss_ema"]
        trainer.reporter.drop_after(trainer.step_count)

    def close(self) -> None:
        """Wait for the save in flight; raises CheckpointError if it failed.

        Where an exception is ending the run, other ranks may be gone, and none waits for them.
        """
        if self.writer:
            if sys.exception() is not None:
                self.writer.abandon()
            self.writer.close()
