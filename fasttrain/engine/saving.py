"""When a run saves, what its checkpoint holds, and how that is restored."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, load
from fasttrain.checkpoint.files import history
from fasttrain.config import UserError, config_to_toml
from fasttrain.distributed.lockstep import Lockstep, differing_step
from fasttrain.distributed.sharding import cut
from fasttrain.engine.optim import (
    check_tensors,
    load_by_name,
    load_optimizer_tensors,
    optimizer_tensors,
    state_by_name,
)
from fasttrain.engine.reporter import Reporter
from fasttrain.engine.state import Tensors, restore_rng, rng_state
from fasttrain.engine.step import TrainStep
from fasttrain.redact import redact

MAX_FAILED_SAVES = 5  # then the run ends: it would lose all that comes after


def collect(train_step: TrainStep, rank: int = 0, rng: Tensors | None = None) -> dict[str, Tensors]:
    """Return all tensors that a run needs to continue, by group, not copied.

    ``rng``: random states in place of the present ones, which each rank saves under its own names.
    """
    model, rng = train_step.model, rng or rng_state(train_step.loss.device)
    # First the model's: FSDP2 then puts its shards in the place of what a forward gathered.
    return train_step.ema.groups(state_by_name(model)) | {
        "optimizer": optimizer_tensors(model, train_step.optimizers),
        "trainer": train_step.state()
        | {f"{name}@{rank}" if rank else name: state for name, state in rng.items()},
    }


def restore(checkpoint: Checkpoint, train_step: TrainStep, rank: int = 0) -> None:
    """Put back what `collect` returned, on any number of ranks, sharded or not; none waits."""
    model, device = train_step.model, train_step.loss.device
    state, rest = checkpoint.state, checkpoint.group("trainer")
    try:
        # Parameters, moments and their average
        own, saved = state_by_name(model), checkpoint.group("model")
        load_by_name(model, {n: cut(t, own[n]) if n in own else t for n, t in saved.items()})
        stepped = state.get("step", 0) > state.get("faults", {}).get("skipped_steps", 0)
        tensors = checkpoint.group("optimizer")
        load_optimizer_tensors(model, train_step.optimizers, tensors, stepped=stepped)
        train_step.ema.load(checkpoint.group("ema"))
        # Everything else. The spike window and, from a run on a CPU, CUDA's random state may be
        # missing.
        needed = train_step.state() | rng_state(device)
        for name in list(needed):
            if name.startswith("spike") or (name == "cuda" and name not in rest):
                del needed[name]
        check_tensors("trainer.", {n: t for n, t in rest.items() if n in needed}, needed)
        # A rank without a saved random state derives one from that of rank 0.
        suffix = f"@{rank}" if rank else ""
        own_rng = {n: rest[n + suffix] for n in ("cpu", "cuda") if n + suffix in rest}
        if "cpu" in own_rng:
            restore_rng(own_rng, device)
        else:
            words = rest["cpu"].numpy().tobytes() + rank.to_bytes(8, "little")
            torch.manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8], "little"))
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.path}: the checkpoint is of another model, or other optimizers or random "
            f"generators: {' '.join(str(error).split())}; resume from another"
        ) from error
    train_step.load(rest)


class Saver:
    """Saves and restores one run."""

    def __init__(self, reporter: Reporter, lockstep: Lockstep, recorded: Mapping[str, Any]) -> None:
        self.state, self.train_step = reporter.state, reporter.train_step
        self.reporter, self.lockstep, self.recorded = reporter, lockstep, recorded
        self.config = config = reporter.config
        self.toml = config_to_toml(config, redact)
        self.world, self.mirror = world, mirror = reporter.train_step.world, reporter.mirror
        # How long a rank waits for the others' parts of a checkpoint, on a slow disk as well; the
        # lockstep longer than the writer, which says more of what went wrong.
        self.patience_s = max(600.0, 2 * config.distributed.timeout_s)
        self._lockstep_s = self.patience_s + config.distributed.timeout_s
        self.saved_at: int | None = None  # the step of the newest save, unless that failed
        self.failed_saves = 0  # in a row
        self._failed_at: int | None = None  # the step whose own save failed
        self.writer = CheckpointWriter(
            reporter.run_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            asynchronous=config.checkpoint.asynchronous,
            world=world,
            patience_s=self.patience_s,
            warn=reporter.console.warn,
            mirror=mirror,
        )
        if mirror:
            mirror.wake()  # of a resumed run what was cut off

    def save_once(self) -> None:
        """Save unless this step is saved; a save that failed (disk full, say) does not end the run.

        The error of a save in the background is met here, before the next one begins.
        """
        if self.state.step in (self.saved_at, self._failed_at):
            return
        failed = self._fails(self.wait)
        if self._fails(self.save, again=failed):
            self._failed_at = self.state.step

    def save_now(self, rng: Tensors) -> None:
        """Save this step with these random states; return when it is committed."""
        self.lockstep.beat(self._lockstep_s)
        # The step that was given up computes on: a thread that gives way to it would take long.
        # Nor is memory pinned, which may wait for what hangs on the device.
        self.writer.asynchronous = False
        if problem := differing_step(self.world, self.state.step):
            raise CheckpointError(f"the state before this step was not saved: {problem}")
        try:
            self.wait()
        except CheckpointError as error:
            self.reporter.console.warn(str(error))
        if self.saved_at != self.state.step:
            self.save(rng)
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight; raises CheckpointError if it failed."""
        self.lockstep.beat(self._lockstep_s)
        saved_at, self.saved_at = self.saved_at, None
        with self.state.account.measure("checkpoint"):
            self.writer.wait()
        self.saved_at = saved_at
        if saved_at is not None:
            self.failed_saves = 0

    def _fails(self, save: Callable[[], object], *, again: bool = False) -> bool:
        """Save, or wait for a save; return whether it failed. Raise if too many in a row fail."""
        try:
            save()
            return False
        except CheckpointError as error:
            self.failed_saves += not again  # where another failure of this step was counted
            if self.failed_saves >= MAX_FAILED_SAVES:
                raise
            self.reporter.console.warn(f"{error} (training goes on)")
            return True

    def save(self, rng: Tensors | None = None) -> Path:
        """Save all that the run needs to continue; complete after ``writer.wait()``."""
        state, self.saved_at = self.state, None
        groups = collect(self.train_step, self.world.rank, rng)
        facts = {**state.saved(), **self.recorded}
        metric = state.last_eval.get("val_loss")
        with state.account.measure("checkpoint"):
            path = self.writer.save(state.step, groups, facts, self.toml, metric=metric)
        self.saved_at = state.step
        return path

    def load(self, path: Path) -> None:
        """Restore what was saved, but for the loader: build it at that position."""
        checkpoint = load(path)
        self._restore(checkpoint)
        same_hours = self.config.train.hours == checkpoint.config.train.hours
        self.state.resume(checkpoint.state, same_hours=same_hours)

    def kept(self, before: int) -> list[Path]:
        """Return the checkpoints from before a step, the newest first."""
        found = history(self.writer.folder) if self.writer.folder.is_dir() else []
        return [path for path, manifest in found if manifest and manifest["step"] < before]

    def go_back(self, before: int) -> Checkpoint | None:
        """Restore the newest intact checkpoint from before a step, but for time and faults."""
        self._failed_at = None
        self._fails(self.wait)
        # Rank 0's list: while others wait no longer, it may still remove checkpoints.
        for name in self.world.share([path.name for path in self.kept(before)]):
            try:
                with self.world.failing_together():  # all go back to the same step
                    checkpoint = load(self.writer.folder / name)
            except UserError as error:
                self.reporter.console.warn(f"passing over a damaged checkpoint: {error}")
                continue
            self._restore(checkpoint)
            self.saved_at = None  # if the run stops here, it saves again, to record the rollback
            return checkpoint
        return None

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, saved, seq_len = self.state, checkpoint.state, self.config.data.seq_len
        restore(checkpoint, self.train_step, self.world.rank)
        state.go_back(saved, seq_len)
        then = (saved.get("regular"), saved.get("samples_per_step"), checkpoint.config.data.seq_len)
        state.regular = then == (True, state.samples_per_step, seq_len)
        self.saved_at = state.step
        self.reporter.drop_after(state.step)

    def close(self) -> None:
        """Wait for the save in flight; but where an error ends the run, other ranks may be gone.

        Then wait for its copy, for as long at most. Other ranks may wait for this one meanwhile.
        """
        if sys.exception() is not None:
            self.writer.abandon()
        try:
            self.writer.close()
        finally:
            if self.config.checkpoint.mirror:
                self.world.set_timeout(2 * self.patience_s)
            if self.mirror:
                self.mirror.finish(self.patience_s)
