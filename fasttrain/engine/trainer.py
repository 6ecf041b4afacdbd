"""The training loop, read top to bottom: step, log, evaluate, sample, save.

A *step* is one optimizer update, a *micro-batch* one forward and backward pass. A step that does
not log never waits for the device.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from fasttrain.checkpoint import Checkpoint
from fasttrain.config import TrainConfig, UserError
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.loader import Loader
from fasttrain.device import resolve_device, resolve_precision
from fasttrain.distributed.lockstep import Lockstep
from fasttrain.distributed.world import World, steady
from fasttrain.engine.evaluation import evaluate
from fasttrain.engine.faults import Recovery
from fasttrain.engine.reporter import Reporter
from fasttrain.engine.saving import Saver
from fasttrain.engine.schedule import (
    HOURS_ESTIMATE_AT,
    context_at,
    lr_at,
    n_plateaus,
    n_stale,
    n_steps,
    step_shape,
)
from fasttrain.engine.state import StateGuard
from fasttrain.engine.step import TrainStep
from fasttrain.log.console import Console
from fasttrain.log.timing import StepProfiler, TimeAccount
from fasttrain.model.runtime import compile_cache_use
from fasttrain.model.transformer import Transformer

__all__ = ["Outcome", "Trainer"]

Outcome = Literal["done", "stopped"]
Sampler = Callable[[Transformer, int], tuple[str, str]]  # model, sample number → prompt, text


class Trainer:
    """Trains a model: steps, evaluation, samples, checkpoints and the log.

    Args:
        model: maps tokens (B, T) to hidden states (B, T, D); ``head_weight`` (V, D) makes logits.
        optimizers: their parameters are disjoint. Each parameter group may carry ``lr_scale``, a
            factor on the schedule's learning rate.
        config: the resolved configuration.
        train_loader: micro-batches of as many rows as `step_shape` says.
        val_dataset: the held-out split; None: nothing is evaluated.
        run_dir: where metrics, samples and checkpoints go; None: nothing is written.
        console: where a person looks; None: silence.
        sampler: makes the samples of ``eval.sample_every_steps``.
        recorded: further facts for the checkpoint's state, such as fingerprints of the data.
        world: the ranks, their mode chosen and ``model`` sharded where that says so.
    """

    def __init__(
        self,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        *,
        train_loader: Loader,
        val_dataset: TokenDataset | None = None,
        run_dir: Path | None = None,
        console: Console | None = None,
        sampler: Sampler | None = None,
        recorded: dict[str, Any] | None = None,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.world = world = world or World()
        self.device = world.device(resolve_device(config.run.device))
        self.precision = resolve_precision(config.run.dtype, self.device)
        self.model = model.to(self.device)
        self.optimizers = list(optimizers)
        self.train_loader = train_loader
        self.val_dataset = val_dataset
        self.run_dir, self.console = run_dir, console
        self.sampler = sampler if world.leads or world.sharded else None
        self.recorded = recorded or {}
        self.train_step = TrainStep(
            self.model,
            self.optimizers,
            config,
            device=self.device,
            precision=self.precision,
            world=world,
        )
        self.ema = self.train_step.ema
        self.guard = StateGuard(self.device)
        self.train_step.before_update = self.guard.close
        profiled = config.log.profile_steps if world.leads else ()
        self.profiler = StepProfiler(run_dir, profiled, self.device)
        self.reporter = Reporter(self)
        self.saver = Saver(self)
        self.writer = self.saver.writer

        seq_len = config.data.seq_len
        shape = step_shape(config.train, seq_len, world.size)
        self.accumulation = shape.n_micro
        self.samples_per_step = shape.samples * world.size
        self.tokens_per_step = self.samples_per_step * seq_len
        self.total_steps = n_steps(
            config.train,
            tokens_per_step=self.tokens_per_step,
            samples_per_step=self.samples_per_step,
            samples_per_epoch=train_loader.samples_per_epoch,
        )
        self.step_count = 0
        self.position = self.train_loader.position  # global index of the next sample
        self.trained_s = 0.0  # seconds inside steps, over all sessions of the run
        self.first_step_s: float | None = None  # compilation included
        self.best_val_loss = math.inf
        self.val_losses: list[float] = []  # of all evaluations of the run
        self.last_eval: dict[str, float | None] = {}  # of this very step, else empty
        self.eval_due = False  # of this very step: begun, and not yet done
        self.stop_at: int | None = None
        self.stop_reason: str | None = None
        self.compiling = True  # until the first step of this process is done
        self.last_lr = 0.0
        self.recovery = Recovery(self)
        self.lockstep = Lockstep(world, config.distributed.timeout_s)
        self.account = TimeAccount(self.step_count)

    # ---- the loop ------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the horizon or to a requested stop; evaluate and save at the end.

        Returns:
            ``done``, or ``stopped`` where `request_stop` ended it with a checkpoint.

        Raises:
            FloatingPointError: losses or gradients were not finite, or spikes, and the run may
                neither skip them nor go back.
        """
        return self._run(until=None)

    def train_epoch(self) -> Outcome:
        """Train to the end of the current epoch of the data or the horizon, whichever is first."""
        per_epoch = self.train_loader.samples_per_epoch
        return self._run(until=(self.position // per_epoch + 1) * per_epoch)

    def request_stop(self, at_step: int | None = None) -> None:
        """Make the loop end with a checkpoint after ``at_step``; None: after the step under way."""
        self.stop_at = 0 if at_step is None else at_step

    def stop_for(self, reason: str) -> None:
        """As `request_stop`, from any thread; the loop says why. One rank speaks for all."""
        self.stop_reason = reason
        if self.world.size == 1:
            self.request_stop()

    def _decide_together(self) -> bool:
        """Learn, at the same step on all ranks, whether to stop and whether the time is over."""
        with self.guard.opened():
            self.lockstep(stop=self.stop_reason is not None, time_over=self._left_s() <= 0)
        if self.lockstep.stop:
            self.stop_reason = self.stop_reason or f"rank {self.lockstep.stopped_by} is to stop"
            self.request_stop()
        return self.lockstep.stop

    def _left_s(self) -> float:
        hours = self.config.train.hours
        return math.inf if hours is None else hours * 3600 - self.trained_s

    def _run(self, until: int | None) -> Outcome:
        with self.guard.training():
            return self._train(until)

    def _train(self, until: int | None) -> Outcome:
        started_s = time.perf_counter()
        self.model.train()
        # A garbage collection stalls a step for milliseconds, and steps make no cycles that matter.
        # Evaluation collects; it need not look through torch's modules each time, for 0.2 s.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            if self.eval_due:
                self.saver.saved_at = None
                self._after_step(self._finished(until))
                self.saver.save_once()  # or the next session would make up for it once more
            self.lockstep.watchdog.beat(self.config.distributed.init_timeout_s)
            several = self.world.n_copies > 1
            check_every = self.config.distributed.check_every_steps if several else None
            if check_every:
                self.recovery.check_copies()
            while not self._finished(until):
                if self.stop_at is not None and self.step_count >= self.stop_at:
                    if self.recovery.look() is None:
                        continue
                    if self.stop_reason and self.console:
                        self.console.note(f"{self.stop_reason}: ending with a checkpoint")
                    self.saver.save_once()
                    return "stopped"
                try:
                    log = self._step()
                except Exception as error:
                    # What ends this run may have ended the compiler as well, or another rank.
                    ended = self.compiling or self.world.size == 1
                    if not (ended and self.stop_reason and self.guard.is_open):
                        raise
                    self.guard.give_up()
                    self.request_stop()
                    if self.console:
                        self.console.warn(f"the step under way was given up: {error}")
                    continue
                if self.compiling:
                    self.compiling = False
                    self._synchronize()
                    steady(self.config.distributed, self.world)
                    self.first_step_s = time.perf_counter() - started_s
                    if self.console and (cache := compile_cache_use()):
                        self.console.note(
                            f"first step after {self.first_step_s:.1f} s (compile cache {cache})"
                        )
                self._decide_together()
                last = self._finished(until)
                log = log or last
                stopping = self.stop_at is not None and self.step_count >= self.stop_at
                every = (self.config.checkpoint.every_steps, self.config.eval.every_steps)
                if log or stopping or any(map(self._due, every)):  # nothing bad is saved unseen
                    numbers = self.recovery.look()
                    if numbers is None:
                        continue
                    if log or stopping:
                        self.reporter.train(numbers, stopped=not log)
                if check_every and (stopping or last or self._due(check_every)):
                    self.recovery.check_copies()
                self._after_step(last)
            self.saver.save_once()
        finally:
            self.lockstep.watchdog.pause()
            gc.unfreeze()
            gc.enable()
        return "stopped" if self.eval_due else "done"

    def _step(self) -> bool:
        """Run and time one step; return whether its numbers are to be logged."""
        started, waited = time.perf_counter(), self.train_loader.wait_s
        self.guard.begin(self.step_count, self.position, self.reporter.n_tokens)
        batches = list(islice(self.train_loader, self.accumulation))  # fewer at the end of epochs
        self.last_lr = self.lr()
        seq_len = self.config.data.seq_len
        context = context_at(self.step_count, self._horizon(), self.config.schedule, seq_len)
        if context < seq_len and self.config.data.batching in ("packed", "sliding"):
            batches = [batch.cut(context) for batch in batches]
        every = self.config.train.recheck_every_steps
        twice = every is not None and (self.step_count + 1) % every == 0
        with self.profiler.step(self.step_count + 1):
            (self.train_step.recheck if twice else self.train_step)(batches, self.last_lr)
        self.reporter.count(batches)
        wait_s = self.train_loader.wait_s - waited
        self.step_count += 1
        self.recovery.advance()
        log = self._due(self.config.log.every_steps) or self.step_count in (1, HOURS_ESTIMATE_AT)
        if log or self.account.n_steady == HOURS_ESTIMATE_AT - 2:  # the pace is known after it
            self._synchronize()
        elapsed = time.perf_counter() - started
        self.trained_s += elapsed
        self.account.add_step(elapsed, wait_s, first=self.compiling)
        return log

    def lr(self) -> float:
        """Return the learning rate of the step to come."""
        config, schedule = self.config, self.config.schedule
        k = n_plateaus(self.val_losses, schedule.plateau_evals, config.eval.min_change)
        peak = config.optim.peak_lr
        return lr_at(self.step_count, self._horizon(), schedule, peak, n_plateaus=k)

    def _horizon(self) -> int:
        """Return the number of steps; before train.hours has been measured, the end is far away."""
        return self.total_steps if self.total_steps is not None else 10**12

    def progress(self) -> tuple[float, float | None]:
        """Return the part of the run that is done, in [0, 1], and the seconds left, if known."""
        if self.total_steps is None:  # train.hours, before it is known how many steps it makes
            left_s = max(self._left_s(), 0.0)
            return self.trained_s / (self.trained_s + left_s), left_s
        left = self.account.left_s(self.step_count, self.total_steps)
        return min(self.step_count / self.total_steps, 1.0), left

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step_count % every == 0

    def _finished(self, until: int | None) -> bool:
        ends = (until, self.train_loader.end)
        if any(end is not None and self.position >= end for end in ends):
            return True
        pace = self.account
        if self.total_steps is None and pace.n_steady >= HOURS_ESTIMATE_AT - 1:
            step_s = (pace.steady_s + pace.steady_wait_s) / pace.n_steady
            total = self.step_count + int(self._left_s() / step_s)
            self.total_steps = self.world.share(total)
        if self.lockstep.time_over or (self.world.size == 1 and self._left_s() <= 0):
            return True
        patience, min_change = self.config.eval.patience, self.config.eval.min_change
        if patience is not None and n_stale(self.val_losses, min_change) >= patience:
            return True
        return self.total_steps is not None and self.step_count >= self.total_steps

    def _after_step(self, last: bool) -> None:
        config = self.config
        if self.console:
            n_tokens = self.reporter.n_tokens
            self.console.progress(self.step_count, self.total_steps, n_tokens, *self.progress())
        self.last_eval = {}
        save, before = self._due(config.checkpoint.every_steps) or last, self.best_val_loss
        if self.val_dataset is not None and (self._due(config.eval.every_steps) or last):
            self.evaluate()
        if save or self.best_val_loss < before:
            self.saver.save_once()
        self.lockstep.watchdog.beat()
        samples = self._due(config.eval.sample_every_steps) or last
        if self.sampler and samples and not self.eval_due:
            self.reporter.sample()
            self.lockstep.watchdog.beat()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            with self.guard.opened():
                torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Wait for the checkpoint being written, then end the threads and close the files.

        Raises:
            CheckpointError: that checkpoint could not be written.
        """
        with contextlib.ExitStack() as stack:  # from the last on, whatever fails of them
            for part in (self.saver, self.reporter, self.profiler, self.train_loader):
                stack.callback(part.close)

    def save_unfinished(self) -> bool:
        """Save the state before the step that hangs, from another thread, and stop training.

        Returns:
            Whether it trained; the training thread then never goes on: end the process.

        Raises:
            CheckpointError: it could not be saved.
            FloatingPointError: a step before it is bad, and the run has to stop.
        """
        if not self.guard.take_over():
            return False
        with self.guard.beside() as reached:
            if reached:
                self.recovery.forget(self.step_count - reached[0])
                self.step_count, self.position, self.reporter.n_tokens = reached
            self.recovery.save_unless_bad(self.guard.rng)
        return True

    # ---- evaluation and samples ----------------------------------------------------------------

    def evaluate(self) -> dict[str, float | None]:
        """Evaluate on the validation split, log it and return it (see `evaluation.evaluate`).

        Raises:
            UserError: there is no validation split.
        """
        if self.val_dataset is None:
            raise UserError("there is no validation split to evaluate on; give the Trainer one")
        gc.collect()
        self.eval_due = True
        with self.ema.in_use(), self.guard.opened(), self.account.measure("eval"):
            self.last_eval = evaluate(
                self.model,
                self.val_dataset,
                self.config,
                device=self.device,
                precision=self.precision,
                compile_mode=self.train_step.compile_mode,
                should_stop=lambda: self._decide_together() and self.guard.is_open,
                world=self.world,
            )
        self.eval_due = not self.last_eval
        if self.eval_due:  # it was cut off: it is made up for when the run goes on
            return {}
        self.reporter.evaluation(self.last_eval)
        loss = self.last_eval["val_loss"]
        self.val_losses.append(math.inf if loss is None else loss)
        self.best_val_loss = min(self.best_val_loss, self.val_losses[-1])
        return self.last_eval

    # ---- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self) -> Path | None:
        """Save everything that the run needs to go on as if it had not stopped.

        Returns:
            The checkpoint's folder, complete after ``writer.wait()``; None without a run folder.
        """
        return self.saver.save()

    def load_checkpoint(self, path: Path) -> Checkpoint:
        """Restore all that `save_checkpoint` saved at ``path``; training goes on from there.

        The loader is not moved: build it at ``checkpoint.state["position"]``.

        Raises:
            CheckpointError: the checkpoint is damaged.
            UserError: it is of another model.
        """
        return self.saver.load(path)
