"""`Trainer` for custom models: any module that returns logits, any batches.

`fasttrain.train` runs the pretraining loop of `fasttrain.engine`, which knows its model and its
data. These know neither and take the same steps: each minimises the mean over all target tokens of
its batches, however many they are and however many ranks share them.

Legend: B batch, T sequence, N = B·T, V vocabulary.
"""

import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fasttrain.checkpoint import CheckpointWriter, load, refuse_unsavable
from fasttrain.checkpoint import resolve as resolve_checkpoint
from fasttrain.command import EXIT_STOPPED, tell
from fasttrain.config import (
    TrainConfig,
    UserError,
    config_to_toml,
)
from fasttrain.device import make_deterministic
from fasttrain.distributed.sharding import cut, place
from fasttrain.engine.optim import (
    check_tensors,
    load_by_name,
    load_optimizer_tensors,
    parameters_by_name,
    parameters_of,
    plain_name,
    state_by_name,
)
from fasttrain.engine.saving import collect
from fasttrain.engine.schedule import n_stale
from fasttrain.engine.step import EMPTY, FINE, TrainStep
from fasttrain.library import state as states
from fasttrain.library.arguments import (
    config_of,
    path_of,
    refuse_arguments,
    refuse_config,
    refuse_loader,
    shown,
    warn_of_ignored,
)
from fasttrain.library.objective import Criterion, Objective, together, without_compiler
from fasttrain.log.console import Console
from fasttrain.log.metrics import TrainingMetrics
from fasttrain.log.sinks import RowKind, Sinks, check_packages
from fasttrain.model.transformer import Transformer
from fasttrain.redact import redact
from fasttrain.resolve import apply_numerics, resolve_custom
from fasttrain.run.folder import (
    holds_run,
    lock_run_dir,
    logged_bytes,
    newer_checkpoint,
    next_run_dir,
)
from fasttrain.run.provenance import provenance
from fasttrain.run.resume import made_otherwise

# A torch.amp.GradScaler's names, which a checkpoint has, of numbers of the step
SCALER = {"scale": "grad_scale", "_growth_tracker": "growth_tracker"}
COUNTERS = ("step", "epoch", "batch_in_epoch", "skipped_steps")  # of a checkpoint's state
Batches = Iterable[Any]


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether it evaluates at other weights than it trains, as schedule-free ones."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


class Trainer:
    """Trains a model on batches of ``input_ids`` and what else its ``forward`` takes.

    A batch is a mapping with ``input_ids``, integers (B, T), and one of ``labels`` (the tokens
    themselves, as in `transformers`: the trainer shifts them) and ``target_ids`` (shifted already);
    with neither, the tokens are their own labels. ``attention_mask`` (0: padding) also takes the
    padding out of the loss. Other keys are given to the model. A pair of tensors, as a
    `TensorDataset` gives it, is ``input_ids`` and ``target_ids``; one tensor is ``input_ids``.

    Under torchrun the ranks share each step, as ``distributed.mode`` says: with DDP, or with FSDP2,
    which gathers the members of the model's lists of modules one by one. Pass the model itself, not
    wrapped, and an optimizer that has made no step; give each rank its part of the data, by a
    `DistributedSampler` for instance, and call the same methods on all ranks.

    Args:
        model: its output, or that output's ``logits`` or first element, is logits (B, T, V); an
            ``aux_loss`` of the output is added to the loss, times the ``router_aux_loss_coef`` of
            the model's config if there is one. If it is in evaluation mode, as `transformers`
            loads one, training puts it in training mode; else parts of it that are in evaluation
            mode, such as a frozen encoder, stay in it. `torch.compile(model)` is taken too.
        optimizer: over its parameters; where those are sharded it gets the shards. One with
            ``train()`` and ``eval()``, such as a schedule-free one, is switched for evaluations.
        scheduler: of torch, stepped after each step that was not skipped, `ReduceLROnPlateau` by
            ``val_loss`` after each of the evaluations that ``eval.every_steps`` asks for; None: the
            learning rate stays.
        criterion: (logits (N, V), targets (N,)) → loss, a mean over the targets that are not its
            ``ignore_index`` (-100 where it has none), or a sum where its ``reduction`` is "sum".
            The class weights of torch's own make a weighted mean over all targets of a step. A
            `functools.partial` is looked into, and what is changed on a criterion counts from then.
            None: cross-entropy in fp32 with the config's label smoothing and z-loss.
        config: a `TrainConfig`, or a dict of its sections. A warning names the keys that are set
            and have no effect here, as those of ``[model]``, ``[data]``, ``[optim]`` and
            ``[schedule]``. None, and a dict without a horizon: one epoch.
        run_dir: where metrics and checkpoints go; None: nowhere. It is used by one trainer at a
            time. Where it holds an earlier run when training begins, and `load_checkpoint` was not
            called, this run goes to the next free folder: ``own-2`` after ``own``. So does one that
            goes on from a checkpoint of it that is not its newest: a branch. The attribute
            ``run_dir`` is then that folder.
        accumulate: batches of a step, on each rank.
        metrics: further numbers of an evaluation: (logits (N, V), targets (N,)) → mean, given only
            the targets that count.
        callbacks: told of what happens: objects with any of the methods of `Callback`. Those with
            ``state_dict()`` and ``load_state_dict()`` are saved and restored, as is a criterion.
        quiet: print nothing. Else rank 0 prints what the command line prints: a line every
            ``log.every_steps`` steps, evaluations, where it saves; on a terminal a progress bar.

    Raises:
        UserError: an argument is of a wrong kind, the config asks for what this trainer does not
            do, a package is missing, another trainer uses ``run_dir``, or a checkpoint could not
            hold the state of the optimizer, scheduler, criterion or a callback.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        criterion: Criterion | None = None,
        config: TrainConfig | Mapping[str, Any] | None = None,
        *,
        run_dir: str | Path | None = None,
        accumulate: int = 1,
        metrics: Mapping[str, Criterion] | None = None,
        callbacks: Sequence[Any] = (),
        quiet: bool = False,
    ) -> None:
        self.config = config = config_of({} if config is None else config)
        if callbacks is None:
            raise UserError("Trainer: callbacks is None; pass a list of callbacks, or leave it out")
        several = isinstance(callbacks, Iterable) and not isinstance(
            callbacks, str | bytes | Mapping
        )
        callbacks = list(callbacks) if several else [callbacks]
        refuse_config(config)
        refuse_arguments(model, optimizer, scheduler, criterion, accumulate, metrics, callbacks)
        if not isinstance(quiet, bool):
            raise UserError(f"Trainer: quiet is {shown(quiet)}; pass True or False")
        if run_dir is not None:
            run_dir = path_of("run_dir", run_dir)
        accumulate = int(accumulate)
        met = {
            "fasttrain.Transformer": isinstance(without_compiler(model), Transformer),
            "torchrun": int(os.environ.get("WORLD_SIZE", "1")) > 1,
            "run_dir": run_dir is not None,
            "criterion=None": criterion is None,
        }
        warn_of_ignored(config, met)
        if config.run.deterministic:
            make_deterministic()
        self.world, self.device = place(model, optimizer, config)
        self.made_by = provenance(self.device)
        resolved = resolve_custom(config, self.device, self.world)
        apply_numerics(resolved)
        self.objective = Objective(model, criterion, resolved)
        self.model = model = without_compiler(model)
        self.metrics = TrainingMetrics()
        self.optimizer, self.scheduler, self.accumulate = optimizer, scheduler, accumulate
        self.metric_functions, self.callbacks = dict(metrics or {}), callbacks
        self.train_step = TrainStep(
            model,
            [optimizer],
            resolved,
            n_micro=accumulate,
            criterion=self.objective.loss_sum,
            count=self.objective.count,
            ignore_index=self.objective.ignore_index,
        )
        self.ema = self.train_step.ema
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.writer: CheckpointWriter | None = None
        if self.run_dir is not None:
            lock = lock_run_dir(self.run_dir) if self.world.leads else nullcontext()
            with self.world.failing_together(), lock:
                check_packages(config)
            folder, keep_last = self.run_dir / "checkpoints", config.checkpoint.keep_last
            self.writer = CheckpointWriter(folder, keep_last=keep_last, world=self.world)
        self.step = self.skipped_steps = self.epoch = self.batch_in_epoch = 0  # that are done
        self.val_losses: list[float] = []
        self._last_result: dict[str, float] = {}  # of an evaluation after this step
        self._logged_at = (time.perf_counter(), 0)
        self._verdict: tuple[LRScheduler, Tensor, torch.cuda.Event | None] | None = None
        # A training that is under way
        self._told = ""  # to stop, on this rank: "stop", or a signal's name
        self._why = ""  # the signal, as all ranks know it
        self._sinks: Sinks | None = None  # while it trains, if there is a run_dir
        self._held = False  # whether the run folder is locked
        self._named_run_dir = self.run_dir  # by the caller; it may have moved to another one
        self._console = Console() if self.world.leads and not quiet else None
        self._warned_of_no_targets = False
        self._began = (time.perf_counter(), 0)  # the training, and at which step
        self._planned_steps: range | None = None  # of it, where its end is known
        self._n_tokens = 0  # of this training
        self._n_logged = 0  # of them, in the steps up to the last line
        self._left_bytes: int | None = None  # of rows, as this trainer left or found its own run
        self._branches_off: Path | None = None  # the checkpoint that was loaded, if not the newest
        self._loader: Any = None
        self._loader_facts: dict[str, str] = {}
        self._random = states.generators(self.device)
        self._epoch_random: dict[str, Any] = {}  # as it was before the loader shuffled
        self._loaded: dict[str, Any] = {}  # of a checkpoint, until the loaders are known
        self._facts = {  # what a checkpoint is bound to, beside the loader
            **states.facts_of_config(config, scheduler),
            "precision is scaled": str(self.train_step.precision.scaled),
            "accumulate": str(accumulate),
            "ranks": str(self.world.size),
            "criterion": getattr(criterion, "__qualname__", type(criterion).__name__),
            **states.facts_of_scheduler(scheduler),
            **states.facts_of_optimizer(optimizer, model),
        }
        # Masks and the like, which hold infinities from the start
        self._unchecked = {
            f"model.{plain_name(name)}"
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point()
            and not buffer.is_meta
            and bool(buffer.float().isinf().any())
        }
        if self.writer is not None:  # what cannot be saved is refused now
            groups, _ = self._snapshot()
            refuse_unsavable(groups)

    # ---- training ------------------------------------------------------------------------------

    def train(self, train_loader: Batches, val_loader: Batches | None = None) -> TrainingMetrics:
        """Train to the config's horizon; evaluate, log and save as it says, and at the end.

        Args:
            train_loader: iterated anew each epoch; its sampler's ``set_epoch`` is called.
            val_loader: the held-out batches; None: nothing is evaluated.

        Returns:
            All that was recorded.

        Raises:
            UserError: a batch or the model's output has the wrong shape; another trainer uses
                ``run_dir`` or went on in it; the loader is not that of the checkpoint.
            FloatingPointError: a loss or gradient was not finite, and ``train.on_nonfinite`` is
                ``stop``.
            SystemExit: SIGINT, SIGTERM or SIGUSR1 came: the step under way was ended and saved. The
                status is 75, as on the command line. A second signal ends the process at once.
        """
        refuse_loader("train_loader", train_loader)
        if val_loader is not None:
            refuse_loader("val_loader", val_loader)
        with self._training(train_loader, val_loader):
            while not self._over():
                before, within = self.step, self.batch_in_epoch
                self._epoch(train_loader, val_loader, self._over)
                if self.step == before and not (within or self._agree()):
                    raise UserError(
                        f"Trainer: epoch {self.epoch} had no batch; give a DataLoader or a list "
                        "that has some (an iterator is empty after one pass)"
                    )
            self._record()
            if not self._why:  # else there may be no time to evaluate
                if val_loader is not None and not self._last_result:
                    self._evaluated(val_loader, extra=True)
                if self.writer is not None:
                    self.save_checkpoint()
        return self.metrics

    def train_epoch(self, loader: Batches) -> float:
        """Train to the end of one pass over ``loader``; return the mean of its steps' losses.

        Steps without targets have none; nan where no step had targets.
        """
        refuse_loader("loader", loader)
        first = self.step
        with self._training(loader, None, one_epoch=True):
            self._epoch(loader, None, self._agree)
            self._record()
        return self.metrics.mean("loss", since_step=first)

    def stop(self) -> None:
        """Make the training end after the step under way, as at its horizon."""
        self._told = self._told or "stop"

    @contextmanager
    def _training(
        self, loader: Batches, val_loader: Batches | None, *, one_epoch: bool = False
    ) -> Iterator[None]:
        """Hold the run folder, heed signals and know the loaders, for the time of a training.

        It goes to the config's horizon, or with ``one_epoch`` to the end of a pass.
        """
        self._told = self._why = ""
        in_main = threading.current_thread() is threading.main_thread()
        with ExitStack() as stack:
            stack.enter_context(self._holding_run_dir())
            if self.writer is not None and in_main and hasattr(signal, "SIGUSR1"):  # not on Windows
                from fasttrain.run.signals import ECHO_S, stop_signals

                # The loader's processes may get a signal too, and hand it on.
                stop, wait = partial(setattr, self, "_told"), lambda: threading.TIMEOUT_MAX
                signals = stop_signals(stop=stop, rescue=self.stop, patience_s=wait, echo_s=ECHO_S)
                stack.enter_context(signals)
            self._meet(loader, val_loader)
            if has_modes(self.optimizer):
                self.optimizer.train()  # type: ignore[attr-defined]
            if self.run_dir is not None and self.world.leads:
                sinks = stack.enter_context(closing(Sinks(self.config, self.run_dir, self.made_by)))
                stack.callback(setattr, self, "_sinks", None)
                self._sinks = sinks
                if self._loaded:
                    sinks.drop_after(self.step)
            if self._console is not None:
                stack.callback(self._console.clear_progress)
            self._began = self._logged_at = (time.perf_counter(), self.step)
            self._planned_steps = self._plan(loader, one_epoch=one_epoch)
            self._n_tokens = self._n_logged = 0
            yield
            self._agree()
            path = self.save_checkpoint() if self._why else None
        if path is not None:
            if self.world.leads:
                remedy = "to go on, have the same script call load_checkpoint() before train()"
                if self.run_dir != self._named_run_dir:
                    remedy += f" with run_dir={str(self.run_dir)!r}"
                tell(f"{self._why}: stopped after step {self.step}; {remedy}: {path}")
            raise SystemExit(EXIT_STOPPED)

    @contextmanager
    def _holding_run_dir(self) -> Iterator[None]:
        """Lock the run folder, or the next free one where it holds another run than this one."""
        if self.run_dir is None or self._held:
            yield
            return
        with ExitStack() as stack:
            run_dir = self.run_dir
            with self.world.failing_together():
                if self.world.leads:
                    run_dir = self._claim_run_dir(stack, run_dir)
            self._move_to(self.world.share(run_dir))
            self._held = True
            try:
                yield
            finally:
                self._held = False
                self._left_bytes = logged_bytes(self.run_dir) if holds_run(self.run_dir) else None

    def _claim_run_dir(self, stack: ExitStack, run_dir: Path) -> Path:
        """Lock, until ``stack`` ends, the folder that this trainer is to use; return it."""
        with ExitStack() as held:
            held.enter_context(lock_run_dir(run_dir))
            if self._left_bytes not in (None, logged_bytes(run_dir)):
                raise UserError(
                    f"Trainer: another trainer went on in {run_dir}; call load_checkpoint() to go "
                    "on with it, or give another run_dir"
                )
            if self._left_bytes is not None or not holds_run(run_dir):
                stack.push(held.pop_all())
                return run_dir
        return stack.enter_context(next_run_dir(self._named_run_dir or run_dir))

    def _move_to(self, run_dir: Path) -> None:
        """Have metrics and checkpoints go to ``run_dir``; say so where that is another folder."""
        if run_dir == self.run_dir:
            return
        if self._console is not None and self._branches_off is not None:
            self._console.note(
                f"{self._branches_off} is not the newest checkpoint of {self.run_dir}: what "
                f"follows is a branch, which goes to {run_dir}"
            )
        elif self._console is not None:
            saved = any((self.run_dir or run_dir).glob("checkpoints/*step-*"))
            go_on = " (load_checkpoint() before train() goes on with the earlier one)" * saved
            self._console.note(
                f"{self.run_dir} holds an earlier run: this one goes to {run_dir}{go_on}"
            )
        self.run_dir, self._branches_off = run_dir, None
        folder, keep_last = run_dir / "checkpoints", self.config.checkpoint.keep_last
        self.writer = CheckpointWriter(folder, keep_last=keep_last, world=self.world)

    def _meet(self, loader: Batches, val_loader: Batches | None) -> None:
        """Take in the loaders: that of a checkpoint must be the same; say what is doubtful."""
        facts, saves = states.facts_of_loader(loader), self.writer is not None
        if self._loaded:
            states.refuse_difference("the checkpoint", self._loader_facts, facts)
        doubts = [*states.doubts(loader, n_ranks=self.world.size, saves=saves)]
        doubts += states.doubts(val_loader or [], saves=saves)
        evaluates = val_loader is not None and self.config.eval.every_steps is not None
        if saves and isinstance(self.scheduler, ReduceLROnPlateau) and not evaluates:
            doubts.append(
                "ReduceLROnPlateau changes nothing without evaluations; give train() a "
                "val_loader and set eval.every_steps"
            )
        for doubt in doubts:
            warnings.warn(f"Trainer: {doubt}", stacklevel=5)
        self._loader, self._loader_facts = loader, facts
        self._random = states.generators(self.device, loader=loader, val_loader=val_loader)
        states.write(self._random, self._loaded.pop("random", {}))

    def _plan(self, loader: Batches, *, one_epoch: bool) -> range | None:
        """Return the steps to the config's horizon, or with ``one_epoch`` those of this pass.

        None: the loader has no length.
        """
        loop = self.config.train
        if loop.steps and not one_epoch:
            return range(loop.steps)
        try:
            n_batches = len(loader)  # type: ignore[arg-type]
        except (NotImplementedError, TypeError):  # of an iterable dataset
            return None
        per_epoch = -(-n_batches // self.accumulate)
        first_of_epoch = self.step - self.batch_in_epoch // self.accumulate
        if one_epoch:
            return range(first_of_epoch, first_of_epoch + per_epoch)
        return range(first_of_epoch + per_epoch * (int(loop.epochs or 0) - self.epoch))

    def _pace(self, now: float) -> dict[str, Any]:
        """Return how far the training is and how long it will take, as far as that is known."""
        (then, first), planned = self._began, self._planned_steps
        if not planned or self.step <= first:
            return {}
        left_s = (now - then) / (self.step - first) * max(0, planned.stop - self.step)
        done = (self.step - planned.start) / len(planned)
        return {"progress": min(1.0, done), "left_s": left_s}

    def _agree(self) -> bool:
        """Learn, on all ranks alike, whether one of them was told to stop."""
        told = self.world.gather(self._told)
        self._why = next((what for what in told if what.startswith("SIG")), "")
        return any(told)

    def _over(self) -> bool:
        loop, patience = self.config.train, self.config.eval.patience
        if patience and n_stale(self.val_losses, self.config.eval.min_change) >= patience:
            self.stop()
        done = self.step >= loop.steps if loop.steps else self.epoch >= (loop.epochs or 0)
        return self._agree() or done

    def _epoch(self, loader: Batches, val_loader: Batches | None, over: Callable[[], bool]) -> None:
        """Train until ``over`` after a step, at most to the end of a pass over ``loader``."""
        if not self.model.training:  # else the parts that are in evaluation mode are meant to be
            self.model.train()
        for sampler in states.samplers(loader):
            sampler.set_epoch(self.epoch)
        config, tried, own_values = self.config, self.writer is None, states.own_values(loader)
        groups = together(self._batches(loader), self.accumulate, self.world)
        while True:
            try:
                group = next(groups, None)
            except RuntimeError:
                if self._agree() and self._why:  # Ctrl-C ends the loader's processes too
                    return
                raise
            if group is None:
                break
            if not tried:  # what cannot be saved is told now: of the loader, once it has begun
                states.encode(states.state_of(loader), {}, "loader")
            self._step(group)
            self.step, self.batch_in_epoch = self.step + 1, self.batch_in_epoch + len(group)
            self._last_result = {}
            self._draw_progress()
            if not tried:  # of the optimizer, once it has made a step
                tried, now = bool(self._snapshot()), states.own_values(loader)
                for key in [key for key, new in now.items() if own_values.get(key, new) != new]:
                    warnings.warn(
                        f"Trainer: {key} was {own_values[key]!r} and is {now[key]!r}: no "
                        "checkpoint holds it, and a resumed training may get other batches; give "
                        "a loader with state_dict() and load_state_dict()",
                        stacklevel=4,
                    )
            if self._due(config.log.every_steps):
                self._record()
            if self._due(config.eval.every_steps) and val_loader is not None:
                self._evaluated(val_loader)
            self._tell("on_step_end")  # before it is saved: a callback has its state
            if self._due(config.checkpoint.every_steps) and self.writer is not None:
                self.save_checkpoint()
            if over():
                return
        self.epoch, self.batch_in_epoch = self.epoch + 1, 0
        self._tell("on_epoch_end")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches of an epoch from where it was left, shuffled as it was then."""
        within, loaded, self._loaded = self.batch_in_epoch > 0, self._loaded, {}
        if states.is_stateful(loader):
            if within or loaded.get("loader") is not None:
                loader.load_state_dict(loaded.get("loader") or loader.state_dict())
            return iter(loader)
        now = states.read(self._random)
        if getattr(loader, "persistent_workers", False):  # seeded when the first pass began
            if loaded and self.epoch:
                iter(loader)
                states.write(self._random, now)
            elif within and not self.epoch:
                loader._iterator = None
        if not within:
            self._epoch_random = now
            return iter(loader)
        states.write(self._random, self._epoch_random)
        batches: Iterator[Any] = iter(loader)
        next(islice(batches, self.batch_in_epoch, self.batch_in_epoch), None)  # passes over them
        states.write(self._random, now)
        return batches

    def _step(self, group: Sequence[Any]) -> None:
        batches = [self.objective.prepare(batch) for batch in group]
        self._n_tokens += self.world.size * sum(batch.tokens.numel() for batch in batches)
        computed = self.train_step.compute(batches)
        self._follow()  # of the last step; it may wait for the device
        self.train_step.update(computed, None)
        bad = self.train_step.verdict
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            copied = torch.cuda.Event() if bad.is_cuda else None  # type: ignore[no-untyped-call]
            self._verdict = self.scheduler, bad.to("cpu", non_blocking=True), copied
            if copied is not None:
                copied.record()
            if self.callbacks:  # which may look at the learning rate
                self._follow()

    def _follow(self) -> None:
        """Step the scheduler after the last update, unless that was skipped.

        On a GPU that is known later: before the next update, when the device is at its gradients,
        so that it never waits for the host.
        """
        if self._verdict is not None:
            (scheduler, bad, copied), self._verdict = self._verdict, None
            if copied is not None:
                copied.synchronize()
            if not bad:
                scheduler.step()

    # ---- evaluation and records ----------------------------------------------------------------

    def evaluate(self, loader: Batches) -> dict[str, float]:
        """Return ``val_loss``, ``val_ppl`` and the further metrics over all of ``loader``.

        Each is a mean over target tokens, whatever batch they are in; computed without dropout,
        with averaged weights where ``train.ema_decay`` is set.
        """
        with self._optimizer_evaluates(), self.ema.in_use():
            return self.objective.evaluate(loader, self.metric_functions, self.world)

    @contextmanager
    def _optimizer_evaluates(self) -> Iterator[None]:
        """Let the model have the weights that an optimizer with modes evaluates at.

        Afterwards it has its own back, to the bit, and the optimizer the mode that it was in. One
        that has no ``train_mode`` in its groups, as schedule-free ones do, is taken to be in
        training mode.
        """
        optimizer: Any = self.optimizer
        if not has_modes(optimizer) or not optimizer.param_groups[0].get("train_mode", True):
            yield
            return
        parameters = parameters_of(optimizer)
        kept = [p.detach().clone() for p in parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                for p, own in zip(parameters, kept, strict=True):
                    p.copy_(own)

    def _evaluated(self, loader: Batches, *, extra: bool = False) -> None:
        """Evaluate; ``extra``, as at the end, changes nothing of how a training goes on."""
        self._record()
        before = states.read(self._random)
        self._last_result = result = self.evaluate(loader)
        states.write(self._random, before)
        is_best = result["val_loss"] < min(self.val_losses, default=-math.inf)
        if not extra:
            self.val_losses.append(min(sys.float_info.max, result["val_loss"]))  # nan is no loss
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(result["val_loss"])
        self.metrics.record(self.step, **result)
        self._write_row("eval", {"step": self.step, **result})
        if self._console is not None:
            self._console.evaluation({"step": self.step, "best": is_best, **result})
        self._tell("on_evaluate", result)

    def _record(self) -> None:
        """Bring the numbers of the last steps to the host, at once."""
        self._follow()
        if not self.train_step.n_unread:
            return
        lr = float(self.optimizer.param_groups[0]["lr"])
        rows = self.train_step.numbers()
        for number, (loss, norm, bad, *_) in enumerate(rows, start=self.step - len(rows) + 1):
            measured = {} if bad == EMPTY else {"loss": loss, "grad_norm": norm}
            self.metrics.record(number, **measured, lr=lr)
            self.skipped_steps += bool(bad)
            if bad == EMPTY:
                self._warn_of_no_targets(number)
            elif bad != FINE and self.config.train.on_nonfinite == "stop":
                raise FloatingPointError(f"step {number}: loss {loss}, gradient norm {norm}")
        now, (then, before) = time.perf_counter(), self._logged_at
        self._logged_at = (now, self.step)
        row = {"step": self.step, "loss": math.nan, "grad_norm": math.nan, **self.metrics.last()}
        row["skipped_steps"] = self.skipped_steps
        row["step_ms"] = 1000 * (now - then) / max(1, self.step - before)
        self._write_row("train", row)
        n_tokens, self._n_logged = self._n_tokens - self._n_logged, self._n_tokens
        if self._console is not None:
            tokens_per_s = n_tokens / max(now - then, 1e-6)
            self._console.train(row | {"tokens_per_s": tokens_per_s} | self._pace(now))

    def _write_row(self, kind: RowKind, row: dict[str, float]) -> None:
        """Write a row of the log, if there is a run folder."""
        if self._sinks is not None:
            self._sinks.write(kind, row)

    def _draw_progress(self) -> None:
        """Redraw the progress bar, on a terminal, from what the host knows: nothing waits."""
        if self._console is None or not self._console.interactive:
            return
        pace, planned = self._pace(time.perf_counter()), self._planned_steps
        if pace and planned:
            total, n_tokens = planned.stop, self._n_tokens
            self._console.progress(self.step, total, n_tokens, pace["progress"], pace["left_s"])

    def _warn_of_no_targets(self, step: int) -> None:
        """Warn once that a step had nothing to learn from."""
        if self._warned_of_no_targets:
            return
        self._warned_of_no_targets = True
        if self.world.leads:
            ignored = self.objective.ignore_index
            warnings.warn(
                f"Trainer: step {step} had no target, so that it was skipped: all of its labels "
                f"(or target_ids) are {ignored}, the ignore_index, or padding, or of classes with "
                f"weight 0. See that the loader sets labels to {ignored} for the prompt alone, and "
                "that no answer is cut off; skipped_steps counts such steps",
                stacklevel=2,
            )

    def _stateful_callbacks(self) -> list[Any]:
        return [callback for callback in self.callbacks if states.is_stateful(callback)]

    def _tell(self, event: str, *what: object) -> None:
        for callback in self.callbacks:
            if (method := getattr(callback, event, None)) is not None:
                method(self, *what)

    # ---- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self, path: str | Path | None = None) -> Path:
        """Save all that a resumed training needs; return the checkpoint's folder, on disk.

        Args:
            path: a folder for checkpoints, made if missing; `load_checkpoint` and `load_model` take
                it. Those of other steps in it stay. None: ``checkpoints`` in ``run_dir``.

        Raises:
            UserError: there is neither, another trainer uses ``run_dir`` or went on in it, ``path``
                is a run folder or a checkpoint, the disk is full, or the state of the scheduler,
                optimizer or loader cannot be written.
        """
        writer: CheckpointWriter | None = None
        if path is not None:
            path = path_of("path", path)
            if any((path / name).exists() for name in ("checkpoints", "manifest.json")):
                said = "is a run folder or a checkpoint; give another folder"
                raise UserError(f"save_checkpoint: {path} {said}")
            writer = CheckpointWriter(path, keep_last=sys.maxsize, world=self.world)
        elif self.writer is None:
            raise UserError("Trainer: nowhere to save; pass a path, or give the trainer a run_dir")
        self._record()
        with self._holding_run_dir() if path is None else nullcontext():
            writer = writer or self.writer  # which may have moved
            assert writer is not None
            groups, state = self._snapshot()
            text, metric = config_to_toml(self.config, redact), self._last_result.get("val_loss")
            saved = writer.save(
                self.step, groups, state, text, metric=metric, unchecked=self._unchecked
            )
            writer.wait()
        if self._console is not None:
            self._console.note(f"saved {saved}")
        self._tell("on_checkpoint", saved)
        return saved

    def _snapshot(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the tensors and the state of a checkpoint."""
        step, rank = self.train_step, self.world.rank
        names = SCALER if step.precision.scaled else {}
        rest = {
            "val_losses": self.val_losses,
            "scaler": {name: getattr(step, ours).item() for name, ours in names.items()},
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "optimizer": states.optimizer_values(self.optimizer, self.model),
        }
        loader, loaded = self._loader, self._loaded
        own = {  # of this rank
            "callbacks": [callback.state_dict() for callback in self._stateful_callbacks()],
            "callback_facts": states.facts_of_callbacks(self.callbacks),
            "criterion": states.state_of(self.objective.criterion),
            "random": states.read(self._random) | loaded.get("random", {}),
            "epoch_random": self._epoch_random,
            "loader": loader.state_dict() if states.is_stateful(loader) else loaded.get("loader"),
        }
        tensors, mine = dict[str, Tensor](), dict[str, Tensor]()
        shared = {key: states.encode(value, tensors, key) for key, value in rest.items()}
        ranks = self.world.gather({k: states.encode(v, mine, k) for k, v in own.items()})
        tensors |= {f"{name}@{rank}" if rank else name: tensor for name, tensor in mine.items()}
        saved = {"state": shared | ranks[0], "ranks": ranks[1:]}
        library = {"facts": self._facts, "loader_facts": self._loader_facts, **saved}
        counters = {name: getattr(self, name) for name in COUNTERS}
        state = {**counters, "provenance": self.made_by, "library": library}
        groups = collect(step) | {"trainer": tensors}
        if has_modes(self.optimizer) and "ema" not in groups:  # the weights that are evaluated
            with self._optimizer_evaluates():
                evaluated = parameters_by_name(self.model)
                groups["ema"] = {name: p.detach().clone() for name, p in evaluated.items()}
        return groups, state

    def load_checkpoint(self, path: str | Path | None = None) -> None:
        """Go on from a checkpoint: parameters, moments, schedule, place in the data, randomness.

        After one of ``run_dir`` that is not its newest, what is trained goes to the next free
        folder, ``own-2`` after ``own``, and the newer ones stay as they are.

        What draws random numbers until ``train`` is called changes nothing. The loader is compared
        there; what is refused here leaves all as it was.

        Args:
            path: a run or checkpoint folder; None: the newest of ``run_dir``.

        Raises:
            UserError: it is damaged, or of another model, optimizer, scheduler or config.
        """
        if (where := path or self.run_dir) is None:
            raise UserError("Trainer: name the checkpoint, or give the trainer a run_dir")
        loaded = load(resolve_checkpoint(path_of("path", where)))
        if "library" not in loaded.state:
            remedy = "go on with what saved it, or take the model alone: fasttrain.load_model"
            raise UserError(f"{loaded.path}: was not saved by a Trainer of this version; {remedy}")
        # First all that is read and compared, then all that changes.
        state, saved, rank = loaded.state, loaded.state["library"], self.world.rank
        own = self.ema.groups(state_by_name(self.model))
        try:
            states.refuse_difference(str(loaded.path), dict(saved["facts"]), self._facts)
            check_tensors("model.", loaded.group("model"), own["model"])
            self.ema.check(loaded.group("ema"))
            tensors = loaded.group("trainer")
            rest = states.decode(saved["state"], tensors, self.device)
            if rank:
                mine = {n.removesuffix(f"@{rank}"): t for n, t in tensors.items() if "@" in n}
                rest |= states.decode(saved["ranks"][rank - 1], mine, self.device)
            names = ("optimizer", "scheduler", "scaler", "val_losses", "epoch_random")
            values, schedule, scaler, val_losses, epoch_random = (rest[name] for name in names)
            place = {name: rest[name] for name in ("random", "loader")}
            loader_facts = dict(saved["loader_facts"])
            callback_facts = dict(rest.get("callback_facts", {}))  # older checkpoints have none
            told = states.facts_of_callbacks(self.callbacks)
            states.refuse_difference(str(loaded.path), callback_facts, told)
            counters = {name: int(state[name]) for name in COUNTERS}
            parameters = loaded.group("model").items()
            load_by_name(self.model, {name: cut(t, own["model"][name]) for name, t in parameters})
            self.ema.load(loaded.group("ema"))
            load_optimizer_tensors(self.model, [self.optimizer], loaded.group("optimizer"))
            states.set_optimizer_values(self.optimizer, self.model, values)
            if self.scheduler is not None:
                self.scheduler.load_state_dict(schedule)
            for name, value in scaler.items():
                getattr(self.train_step, SCALER[name]).fill_(value)
            if "callbacks" in rest:
                pairs = zip(self._stateful_callbacks(), rest["callbacks"], strict=True)
                for callback, value in pairs:
                    callback.load_state_dict(value)
            criterion: Any = self.objective.criterion
            if rest.get("criterion") is not None and states.is_stateful(criterion):
                criterion.load_state_dict(rest["criterion"])
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"{loaded.path}: holds no state of such a training"
            raise UserError(f"{what}: {error!r}; go on from another checkpoint") from error
        self.made_by = provenance(self.device, loaded.path)
        exact = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if said := made_otherwise(state, self.made_by, exact=exact):
            warnings.warn(said, stacklevel=2)
        vars(self).update(counters, val_losses=val_losses)
        self._loaded, self._loader_facts, self._epoch_random = place, loader_facts, epoch_random
        self._verdict, self._last_result, self.train_step.n_unread = None, {}, 0
        self._logged_at = (time.perf_counter(), self.step)
        self._branches_off = None
        if self.run_dir and loaded.path.resolve().is_relative_to(self.run_dir.resolve()):
            is_newest = newer_checkpoint(self.run_dir, loaded.path) is None
            self._left_bytes = logged_bytes(self.run_dir) if is_newest else None
            self._branches_off = None if is_newest else loaded.path
