"""The training loop, read top to bottom: step, log, evaluate, sample, save.

A *step* is one optimizer update, a *micro-batch* one forward and backward pass. A step waits for
the device only if it logs or rechecks, or if an evaluation, a save or a stop follows it.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fasttrain.data.dataset import TokenDataset
from fasttrain.data.loader import Batch, Loader
from fasttrain.distributed.lockstep import SUSPENDED_S, Lockstep, call_ranks
from fasttrain.distributed.sharding import evaluating
from fasttrain.engine.evaluation import evaluate
from fasttrain.engine.faults import Recovery
from fasttrain.engine.reporter import NOTHING, Reporter
from fasttrain.engine.saving import Saver
from fasttrain.engine.schedule import context_at, lr_at, n_plateaus, n_stale, n_steps
from fasttrain.engine.state import RunState, StateGuard, restore_rng
from fasttrain.engine.step import StepNumbers, TrainStep
from fasttrain.log.console import Console
from fasttrain.log.timing import StepProfiler
from fasttrain.model.compiled import compile_cache_use, record_compiled
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import Resolved

if TYPE_CHECKING:
    from fasttrain.mirror import Mirror

# With train.hours the number of steps is estimated once, from the time that steps took up to here.
HOURS_ESTIMATE_AT = 20

Outcome = Literal["done", "stopped"]
Sampler = Callable[[Transformer, int], tuple[str, str]]  # model, sample number → prompt, text
# model, should_stop → scores by name, None where it was cut off
TaskScorer = Callable[[Transformer, Callable[[], bool]], dict[str, float] | None]


class TrainingLoop:
    """Trains a model: steps, evaluation, samples, checkpoints and the log.

    The loader gives micro-batches of ``resolved.shape.rows`` rows; ``model`` is sharded where the
    mode of ``resolved.world`` says so. ``recorded`` goes into each checkpoint's ``state.json``.
    """

    def __init__(
        self,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        resolved: Resolved,
        *,
        train_loader: Loader,
        val_dataset: TokenDataset,
        run_dir: Path,
        console: Console | None = None,
        sampler: Sampler | None = None,
        score_tasks: TaskScorer | None = None,
        recorded: dict[str, Any] | None = None,
        mirror: "Mirror | None" = None,
    ) -> None:
        # What is trained, on what, and where to
        config, device, world = resolved.config, resolved.device, resolved.world
        recorded = recorded or {}
        self.resolved = resolved
        self.config = config
        self.world = world
        self.device = device
        self.model = model = model.to(device)
        self.console = console = console or NOTHING
        self.train_loader, self.val_dataset = train_loader, val_dataset
        self.sampler = sampler if world.leads or world.sharded else None
        self.score_tasks = score_tasks
        self.train_step = step = TrainStep(model, optimizers, resolved)
        # The size of a step and of the run
        shape = resolved.shape
        assert shape is not None
        per_epoch, position = train_loader.samples_per_epoch, train_loader.position
        total_steps = n_steps(config.train, shape, per_epoch)
        self.state = state = RunState(shape.samples, total_steps, position, regular=position == 0)
        state.limit_s = 3600 * (config.train.hours or math.inf)
        # What acts on the state
        self.guard = StateGuard(device)
        self.lockstep = Lockstep(world, config.distributed.timeout_s)
        profiled = config.log.profile_steps if world.leads else ()
        self.profiler = StepProfiler(run_dir, profiled, device)
        made_by = recorded.get("provenance")
        self.reporter = Reporter(state, step, config, per_epoch, run_dir, console, mirror, made_by)
        self.saver = Saver(self.reporter, self.lockstep, recorded)
        self.recovery = Recovery(self.saver, self.guard)
        self.stop_at: float = math.inf
        self.stop_reason: str | None = None

    # ---- the loop ------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the horizon or to a requested stop; evaluate and save at the end.

        Raises FloatingPointError if a step is bad, and the run may neither skip it nor go back.
        """
        # A garbage collection stalls a step for milliseconds, and steps make no cycles that matter.
        # Evaluation collects instead; freezing spares it a walk through torch's modules.
        gc.collect()
        gc.freeze()
        gc.disable()
        with self.guard.training():
            try:
                return self._train()
            finally:
                self.lockstep.deadline = math.inf  # nothing is due any more
                self.world.set_timeout(1.5 * self.config.distributed.timeout_s + 1)
                gc.unfreeze()
                gc.enable()

    def request_stop(self, at_step: int = 0) -> None:
        """Make the loop end with a checkpoint after ``at_step``, or after the step under way."""
        self.stop_at = at_step

    def stop_for(self, reason: str) -> None:
        """As `request_stop`, from any thread; the loop says why. One rank speaks for all."""
        self.stop_reason = reason
        if self.world.size == 1:
            self.request_stop()
        call_ranks(self.world)

    def _decide_together(self) -> bool:
        """Learn, at the same step on all ranks, whether to stop and whether the time is over."""
        with self.guard.computing():
            self.lockstep(stop=self.stop_reason is not None, time_over=self.state.left_s <= 0)
        if self.lockstep.stop:
            self.stop_reason = self.stop_reason or f"rank {self.lockstep.stopped_by} is to stop"
            self.request_stop()
        return self.lockstep.stop

    def _train(self) -> Outcome:
        state, config, started_s = self.state, self.config, time.perf_counter()
        self.model.train()
        # An evaluation that the end of the last session cut off
        if state.eval_due:
            self.saver.saved_at = None
            self._after_step(self._finished())
            self.saver.save_once()  # or the next session would evaluate once more
        self.lockstep.beat(config.distributed.init_timeout_s)
        # The watchdog ends a hung collective. A collective's own timeout would also count the time
        # for which a job is suspended.
        self.world.set_timeout(SUSPENDED_S)
        check_every = config.distributed.check_every_steps
        if check_every:
            self.recovery.check_copies()
        while not self._finished():
            if state.step >= self.stop_at:
                if self._look() is None:
                    continue
                if self.stop_reason:
                    self.console.note(f"{self.stop_reason}: ending with a checkpoint")
                self.saver.save_once()
                return "stopped"
            # One step. After a request to stop, an error of the first step, or of a single rank, is
            # taken for its consequence: the step is given up.
            try:
                log = self._step()
            except Exception as error:
                # What ends this run may have ended the compiler as well, or another rank.
                ended = state.first_step_s is None or self.world.size == 1
                if not (ended and self.stop_reason and self.guard.interrupted):
                    raise
                restore_rng(self.guard.rng, self.device)
                self.request_stop()
                self.console.warn(f"the step under way was given up: {error}")
                continue
            if state.first_step_s is None:
                self._synchronize()
                state.first_step_s = time.perf_counter() - started_s
                if cache := compile_cache_use():
                    took = f"first step after {state.first_step_s:.1f} s"
                    self.console.note(f"{took} (compile cache {cache})")
                    record_compiled()
            self._decide_together()
            # Read the verdict before anything is saved; then log the step
            last = self._finished()
            log, stopping = log or last, state.step >= self.stop_at
            if log or stopping or state.due(config.checkpoint.every_steps, config.eval.every_steps):
                if (steps := self._look()) is None:
                    continue
                if log or stopping:
                    self.reporter.train(steps[-1], stopped=not log)
            if state.due(config.checkpoint.every_steps) and compile_cache_use():
                # Again, for what evaluation compiled and what other ranks were still writing
                record_compiled()
            if check_every and (stopping or last or state.due(check_every)):
                self.recovery.check_copies()
            self.reporter.watch_cores()
            self._after_step(last)
        self.saver.save_once()
        return "stopped" if state.eval_due else "done"

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            with self.guard.computing():
                torch.cuda.synchronize(self.device)

    def _step(self) -> bool:
        """Run and time one step; return whether its numbers are to be logged."""
        state, config = self.state, self.config
        started_s = time.perf_counter()
        waited_s = self.train_loader.wait_s
        recheck_every = config.train.recheck_every_steps
        recheck = recheck_every is not None and (state.step + 1) % recheck_every == 0
        with self.profiler.step(state.step + 1):
            with self.guard.computing(state.step, state.position, state.tokens):
                batches = self._next_batches()
                computed = self.train_step.compute(batches, recheck=recheck)
            state.lr = self._learning_rate()
            self.train_step.update(computed, state.lr)
        # The step is queued, and perhaps not finished. Count it, and jump over samples that must
        # not be used again; neither waits for the device.
        n_tokens = sum(batch.n_tokens for batch in batches)
        state.tokens += n_tokens
        state.fresh_tokens += n_tokens
        wait_s = self.train_loader.wait_s - waited_s
        state.step += 1
        self.recovery.unseen.append(state.position)
        state.position += state.samples_per_step
        if state.next_position != state.position:
            self._move()
        log = state.due(config.log.every_steps) or state.step in (1, HOURS_ESTIMATE_AT)
        if log or state.account.n_steady == HOURS_ESTIMATE_AT - 2:  # the pace is known after it
            self._synchronize()
        elapsed_s = time.perf_counter() - started_s
        state.trained_s += elapsed_s
        state.account.add_step(elapsed_s, wait_s)
        return log

    def _next_batches(self) -> list[Batch]:
        """Return the micro-batches of the next step: fewer at the end of the data."""
        batches = list(islice(self.train_loader, self.train_step.n_micro))
        config, state = self.config, self.state
        seq_len = config.data.seq_len
        context = context_at(state.step, state.horizon, config.schedule, seq_len)
        if context < seq_len and config.data.batching in ("packed", "sliding"):
            return [batch.cut(context) for batch in batches]
        return batches

    def _learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        config, state = self.config, self.state
        schedule = config.schedule
        k = n_plateaus(state.val_losses, schedule.plateau_evals, config.eval.min_change)
        return lr_at(state.step, state.horizon, schedule, config.optim.peak_lr, n_plateaus=k)

    def _look(self) -> list[StepNumbers] | None:
        """Read the verdicts on the last steps and act on them: skip, stop or go back.

        Returns the numbers of the steps; None if the run went back to a checkpoint.
        """
        steps = self.recovery.look(self.train_loader)
        if steps is None:
            self._move()
        return steps

    def _move(self) -> None:
        """Put position and loader at the next sample that is trained on."""
        self.state.position = self.state.next_position
        with self.train_loader as loader:
            self.train_loader = loader.at(self.state.position)

    def _finished(self) -> bool:
        state, pace = self.state, self.state.account
        # The data end.
        if self.train_loader.end is not None and state.position >= self.train_loader.end:
            return True
        # The time is over; the number of steps that it holds is estimated once.
        if state.total_steps is None and pace.n_steady >= HOURS_ESTIMATE_AT - 1:
            step_s = (pace.steady_s + pace.steady_wait_s) / pace.n_steady
            state.total_steps = self.world.share(state.step + int(state.left_s / step_s))
        time_over = self.lockstep.time_over or (self.world.size == 1 and state.left_s <= 0)
        # The validation loss no longer falls, or the last step is done.
        patience, min_change = self.config.eval.patience, self.config.eval.min_change
        stale = patience is not None and n_stale(state.val_losses, min_change) >= patience
        return time_over or stale or state.step >= state.horizon

    def _after_step(self, last: bool) -> None:
        """Evaluate, save and sample where that is due."""
        state, config = self.state, self.config
        self.console.progress(state.step, state.total_steps, state.tokens, *state.progress())
        state.last_eval, best = {}, state.best_val_loss
        if state.due(config.eval.every_steps) or last:
            self._evaluate(last=last)
        if state.due(config.checkpoint.every_steps) or last or state.best_val_loss < best:
            self.saver.save_once()
        self.lockstep.beat()
        every = config.eval.sample_every_steps
        if self.sampler and (state.due(every) or last) and not state.eval_due:
            with (
                self.train_step.ema.in_use(),
                self.guard.computing(),
                state.account.measure("sample"),
                evaluating(self.model, self.world),
            ):
                # The next of the prompts
                prompt, text = self.sampler(self.model, state.step // every if every else 0)
            self.reporter.sample(prompt, text)
            self.lockstep.beat()

    def _evaluate(self, *, last: bool) -> None:
        """Evaluate on the validation split and log it (see `evaluation.evaluate`).

        Every ``eval.tasks_every_evals``-th evaluation, and the ``last``, also scores the tasks.
        """
        gc.collect()
        state, score_tasks, scores = self.state, self.score_tasks, dict[str, float]()
        if not last and (len(state.val_losses) + 1) % self.config.eval.tasks_every_evals:
            score_tasks = None

        def should_stop() -> bool:
            return self._decide_together() and self.guard.is_open

        state.eval_due = True
        with self.train_step.ema.in_use(), self.guard.computing(), state.account.measure("eval"):
            result = evaluate(self.train_step, self.val_dataset, self.config, should_stop)
            if result and score_tasks:
                with evaluating(self.model, self.world):
                    found = score_tasks(self.model, should_stop)
                scores, result = found or {}, {} if found is None else result
        state.eval_due, state.last_eval = not result, result
        if state.eval_due:  # it was cut off: it is made up for when the run is resumed
            return
        self.reporter.evaluation(result, scores)
        state.val_losses.append(result["val_loss"])
        state.best_val_loss = min(state.best_val_loss, state.val_losses[-1])

    def close(self) -> None:
        """Wait for the checkpoint being written, which may fail; end the threads, close files."""
        with contextlib.ExitStack() as stack:  # in reverse order, each even if another fails
            for part in (self.saver, self.reporter, self.profiler, self.train_loader):
                stack.callback(part.close)

    def save_unfinished(self) -> bool:
        """Save the state before the step that hangs, from another thread, and stop training.

        Returns True if the training thread is stopped for good: the caller must end the process.
        Returns False if it was not training; then nothing was saved. Raises CheckpointError, or
        FloatingPointError if an earlier step ends the run.
        """
        if not self.guard.take_over():
            return False
        state = self.state
        with self.guard.beside() as reached:
            if reached:
                n_ahead = state.step - reached[0]  # steps that the device has not made
                self.train_step.n_unread -= n_ahead
                del self.recovery.unseen[len(self.recovery.unseen) - n_ahead :]
                state.step, state.position, state.tokens = reached
            self.recovery.look_and_save(self.train_loader, self.guard.rng)
        return True
