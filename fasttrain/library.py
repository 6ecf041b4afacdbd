"""A trainer for custom models: any module that returns logits, any batches, any optimizer.

`fasttrain.train` runs the pretraining loop of `fasttrain.trainer`, which knows its model and its
data and never waits for the device. This one knows neither, and is as exact: each step minimises
the mean over all target tokens of its batches, however many they are.

Legend: B batch, T sequence, N = B·T, V vocabulary.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels import FusedAdamW, Muon, clip_grad_norm_, grad_norm
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fasttrain import checkpoint
from fasttrain.config import (
    LoopConfig,
    TrainConfig,
    UserError,
    config_difference,
    config_from_dict,
    config_to_toml,
)
from fasttrain.device import make_deterministic, resolve_device, resolve_precision
from fasttrain.ema import Ema
from fasttrain.metrics import TrainingMetrics
from fasttrain.objective import Criterion, Objective
from fasttrain.optim import load_optimizer_tensors, optimizer_tensors
from fasttrain.redact import redact
from fasttrain.schedule import n_stale
from fasttrain.sinks import Kind, Sinks, check_packages
from fasttrain.state import restore_rng, rng_state

__all__ = ["Callback", "Trainer"]

# The config keys that a Trainer obeys, by what it needs for them; of others it warns where they are
# set. It never saves asynchronously.
OBEYED = {
    "nothing": "run.device run.dtype run.deterministic run.compile train.steps train.epochs "
    "train.max_grad_norm train.max_grad_value train.ema_decay train.on_nonfinite eval.every_steps "
    "eval.patience eval.min_change log.every_steps",
    "run_dir": "checkpoint.every_steps checkpoint.keep_last checkpoint.asynchronous log.csv "
    "log.tensorboard log.wandb_project log.wandb_mode",
    "criterion=None": "train.label_smoothing train.z_loss",
}


class Callback:
    """What happens during training, for a subclass to act on; each gets the trainer."""

    def on_step_end(self, trainer: "Trainer") -> None:
        """After each optimizer step; ``trainer.stop()`` ends the training."""

    def on_epoch_end(self, trainer: "Trainer") -> None:
        """After each pass over the training loader."""

    def on_evaluate(self, trainer: "Trainer", result: dict[str, float]) -> None:
        """After each evaluation."""

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        """After each checkpoint, which is on disk."""


_EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


def _resolve_config(given: Any) -> TrainConfig:
    if isinstance(given, Mapping):
        loop, horizon = given.get("train", {}), {"steps", "epochs", "tokens", "hours"}
        if isinstance(loop, Mapping) and not horizon & loop.keys():
            given = {**given, "train": {"epochs": 1, **loop}}
        return config_from_dict(given)
    if not isinstance(given, TrainConfig):
        raise UserError(
            f"Trainer: config is of type {type(given).__name__}; give a TrainConfig, "
            'load_config(path), or a dict of sections, such as {"train": {"epochs": 1}}'
        )
    return given


def _warn_of_ignored(config: TrainConfig, met: Mapping[str, bool]) -> None:
    needs = {key: need for need, keys in OBEYED.items() for key in keys.split()}
    ignored = [
        f"{key} (needs {needs[key]})" if key in needs else key
        for key, *_ in config_difference(config, TrainConfig(train=LoopConfig(epochs=1)))
        if not met.get(needs.get(key, ""), key in needs)
    ]
    if ignored:
        warnings.warn(
            f"Trainer: ignores {', '.join(ignored)}; the model, optimizer, scheduler and loaders "
            "are used as you pass them",
            stacklevel=3,
        )


class Trainer:
    """Trains a model on batches of ``input_ids`` and what else its ``forward`` takes.

    A batch is a mapping with ``input_ids``, integers (B, T), and one of ``labels`` (the tokens
    themselves, as in `transformers`: the trainer shifts them) and ``target_ids`` (shifted already);
    with neither, the tokens are their own labels. ``attention_mask`` (0: padding) also takes the
    padding out of the loss. Other keys are given to the model. A pair of tensors, as a
    `TensorDataset` gives it, is ``input_ids`` and ``target_ids``; one tensor is ``input_ids``.

    Args:
        model: its output, or that output's ``logits`` or first element, is logits (B, T, V).
        optimizer: over its parameters.
        scheduler: of torch, stepped after each step, `ReduceLROnPlateau` after each evaluation;
            None: the learning rate stays.
        criterion: (logits (N, V), targets (N,)) → loss, a mean over the targets that are not its
            ``ignore_index`` (-100 where it has none), or a sum where its ``reduction`` is "sum".
            None: cross-entropy in fp32 with the config's label smoothing and z-loss.
        config: ``[run]`` device, dtype and, where it is ``default``, compile; ``[train]`` steps or
            epochs, clipping, averaging and ``on_nonfinite``; ``[eval]``, ``[checkpoint]`` and
            ``[log]``; also as a dict of sections. A warning names other keys that are set. None,
            and a dict without a horizon: one epoch.
        run_dir: where metrics and checkpoints go; None: nowhere.
        accumulate: batches of a step.
        metrics: further numbers of an evaluation: (logits (N, V), targets (N,)) → mean, given only
            the targets that count.
        callbacks: told of what happens: objects with any of the methods of `Callback`.

    Raises:
        UserError: the config asks for what this trainer does not do, a package is missing, or a
            callback has no such method.
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
    ) -> None:
        self.config = config = _resolve_config({} if config is None else config)
        callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        loop, run = config.train, config.run
        n_processes = int(os.environ.get("WORLD_SIZE", "1"))
        for wrong, said in (
            (loop.steps is None and (loop.epochs or 0.5) % 1,
             "set train.steps, or train.epochs to a whole number"),
            (loop.on_nonfinite == "rollback" or loop.on_spike != "off",
             "does not go back or look for spikes; unset train.on_spike, and set "
             "train.on_nonfinite=skip or stop"),
            (run.fp8 or run.compile not in ("off", "auto", "c++", "default"),
             "knows no run.fp8 and no CUDA graphs; unset it, use run.compile=default"),
            (n_processes > 1,
             f"trains in one process, and torchrun started {n_processes}; only fasttrain.train "
             "shares a run among several"),
            (accumulate < 1, f"accumulate must be at least 1, got {accumulate}"),
            (not hasattr(optimizer, "param_groups"),
             f"optimizer is {optimizer!r}; give one of torch.optim, over model.parameters()"),
            *((isinstance(c, type) or not any(callable(getattr(c, e, None)) for e in _EVENTS),
               f"callbacks holds {c!r}; give objects with any of {', '.join(_EVENTS)}")
              for c in callbacks),
        ):  # fmt: skip
            if wrong:
                raise UserError(f"Trainer: {said}")
        _warn_of_ignored(
            config, {"run_dir": run_dir is not None, "criterion=None": criterion is None}
        )
        if run.deterministic:
            make_deterministic()
        self.device = resolve_device(run.device)
        self.precision = resolve_precision(run.dtype, self.device)
        self.model = model.to(self.device)
        self.optimizer, self.scheduler, self.accumulate = optimizer, scheduler, accumulate
        self.metric_functions, self.callbacks = dict(metrics or {}), callbacks
        self.objective = Objective(model, criterion, config, self.device, self.precision)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema = Ema(model, loop.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        self.metrics = TrainingMetrics()
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self._sinks: Sinks | None = None
        self._stopping = False
        self._rows_end_at: int | None = None  # of the run gone on from, where none is written yet
        self.writer: checkpoint.CheckpointWriter | None = None
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            check_packages(config)
            self.writer = checkpoint.CheckpointWriter(
                self.run_dir / "checkpoints", keep_last=config.checkpoint.keep_last
            )
        self.step = self.skipped_steps = self.batch_in_epoch = 0
        self.epoch = 0  # passes that are done
        self.val_losses: list[float] = []
        self._epoch_rng = rng_state(self.device)  # as it was before the loader shuffled
        self._pending: list[Tensor] = []  # loss, norm and verdict of steps not yet recorded
        self._last_result: dict[str, float] = {}
        self._logged_at = (time.perf_counter(), 0)

    # ---- training ------------------------------------------------------------------------------

    def train(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
    ) -> TrainingMetrics:
        """Train to the config's horizon; evaluate, log and save as it says, and at the end.

        Args:
            train_loader: iterated anew each epoch; its sampler's ``set_epoch`` is called.
            val_loader: the held-out batches; None: nothing is evaluated.

        Returns:
            All that was recorded.

        Raises:
            UserError: a batch or the model's output has the wrong shape.
            FloatingPointError: a loss or gradient was not finite, and ``train.on_nonfinite`` is
                ``stop``.
        """
        self._stopping = False
        while not self._over():
            before = self.step
            self._epoch(train_loader, val_loader)
            if self.step == before and not self.batch_in_epoch:
                raise UserError(
                    "Trainer: the training loader gave no batch; give a DataLoader or a list that "
                    "has some (an iterator is empty after one pass)"
                )
        self._record()
        if val_loader is not None and not self._last_result:
            self._evaluated(val_loader)
        if self.writer is not None:
            self.save_checkpoint()
        self._close()
        return self.metrics

    def train_epoch(self, loader: Iterable[Any]) -> float:
        """Train to the end of one pass over ``loader``; return the mean of its steps' losses."""
        self._stopping, first = False, self.step
        self._epoch(loader, None, bounded=False)
        self._record()
        self._close()
        return self.metrics.mean("loss", since_step=first)

    def stop(self) -> None:
        """Make the training end after the step under way, as at its horizon."""
        self._stopping = True

    def _over(self) -> bool:
        loop, patience = self.config.train, self.config.eval.patience
        if patience is not None:
            self._stopping |= n_stale(self.val_losses, self.config.eval.min_change) >= patience
        done = self.step >= loop.steps if loop.steps else self.epoch >= (loop.epochs or 0)
        return self._stopping or done

    def _epoch(
        self,
        loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        *,
        bounded: bool = True,
    ) -> None:
        self.model.train()
        batches = self._batches(loader)
        while group := list(islice(batches, self.accumulate)):
            self._step(group)
            self.step, self.batch_in_epoch = self.step + 1, self.batch_in_epoch + len(group)
            self._last_result, config = {}, self.config
            if self.step % config.log.every_steps == 0:
                self._record()
            if self._due(config.eval.every_steps) and val_loader is not None:
                self._evaluated(val_loader)
            if self._due(config.checkpoint.every_steps) and self.writer is not None:
                self.save_checkpoint()
            self._tell("on_step_end")
            if self._stopping or (bounded and self._over()):
                return
        self.epoch, self.batch_in_epoch = self.epoch + 1, 0
        self._tell("on_epoch_end")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of an epoch from where it was left, shuffled as it was then."""
        sampler = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
        now = rng_state(self.device)
        if self.batch_in_epoch:
            restore_rng(self._epoch_rng, self.device)
        else:
            self._epoch_rng = now
        batches = iter(loader)
        for _ in islice(batches, self.batch_in_epoch):
            pass
        if self.batch_in_epoch:
            restore_rng(now, self.device)
        return batches

    def _step(self, group: Sequence[Any]) -> None:
        batches = [self.objective.prepare(batch) for batch in group]
        n_targets = torch.stack([b.n_targets for b in batches]).sum().clamp(min=1)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = self.objective.loss_sum(batch) / n_targets
            self.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        bad, norm = self._update(loss)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self._pending.append(torch.stack([loss, norm, bad]))

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and update unless something is not finite; return that verdict and the norm."""
        loop = self.config.train
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = grad_norm(grads).norm
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        if loop.max_grad_norm is not None:
            clip_grad_norm_(self.parameters, loop.max_grad_norm)
        if loop.max_grad_value is not None:
            nn.utils.clip_grad_value_(self.parameters, loop.max_grad_value)
        if isinstance(self.optimizer, FusedAdamW | Muon) and not self.precision.scaled:
            self.optimizer.step(found_inf=bad)  # read on the device
        elif self.precision.scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not bad:
            self.optimizer.step()
        return bad, norm

    # ---- evaluation and records ----------------------------------------------------------------

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Return ``val_loss``, ``val_ppl`` and the further metrics over all of ``loader``.

        Each is a mean over target tokens, whatever batch they are in; computed without dropout,
        with averaged weights where ``train.ema_decay`` is set.
        """
        with self.ema.in_use():
            return self.objective.evaluate(loader, self.metric_functions)

    def _evaluated(self, loader: Iterable[Any]) -> None:
        self._record()
        self._last_result = result = self.evaluate(loader)
        self.val_losses.append(min(sys.float_info.max, result["val_loss"]))  # JSON has no nan
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(result["val_loss"])
        self.metrics.record(self.step, **result)
        self._write("eval", {"step": self.step, **result})
        self._tell("on_evaluate", result)

    def _record(self) -> None:
        """Bring the numbers of the last steps to the host, at once."""
        if not self._pending:
            return
        lr = float(self.optimizer.param_groups[0]["lr"])
        rows, first = torch.stack(self._pending).tolist(), self.step - len(self._pending) + 1
        self._pending.clear()
        for number, (loss, norm, bad) in enumerate(rows, start=first):
            self.metrics.record(number, loss=loss, grad_norm=norm, lr=lr)
            self.skipped_steps += int(bad)
            if bad and self.config.train.on_nonfinite == "stop":
                raise FloatingPointError(f"step {number}: loss {loss}, gradient norm {norm}")
        now, (then, before) = time.perf_counter(), self._logged_at
        self._logged_at = (now, self.step)
        row = {"step": self.step, **self.metrics.last(), "skipped_steps": self.skipped_steps}
        row["step_ms"] = 1000 * (now - then) / max(1, self.step - before)
        self._write("train", row)

    def _write(self, kind: Kind, row: dict[str, float]) -> None:
        if self.run_dir is None:
            return
        if self._sinks is None:
            self._sinks = Sinks(self.config, self.run_dir)
            if self._rows_end_at is not None:
                self._sinks.drop_after(self._rows_end_at)
                self._rows_end_at = None
        self._sinks.write(kind, row)

    def _close(self) -> None:
        if self._sinks is not None:
            self._sinks.close()
            self._sinks = None

    def _tell(self, event: str, *what: object) -> None:
        for callback in self.callbacks:
            if (method := getattr(callback, event, None)) is not None:
                method(self, *what)

    # ---- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Save all that training needs to go on; return the folder, on disk.

        Raises:
            UserError: there is no ``run_dir``, the disk is full, or the scheduler's state cannot
                be written as JSON.
        """
        if self.writer is None:
            raise UserError("Trainer: there is nowhere to save; give it a run_dir")
        self._record()
        rng = rng_state(self.device)
        groups = self.ema.groups(self.model.state_dict()) | {
            "optimizer": optimizer_tensors(self.model, [self.optimizer]),
            "trainer": rng | {f"epoch_{key}": value for key, value in self._epoch_rng.items()},
        }
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch_in_epoch": self.batch_in_epoch,
            "skipped_steps": self.skipped_steps,
            "val_losses": self.val_losses,
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "lrs": [float(group["lr"]) for group in self.optimizer.param_groups],
        }
        metric = self.val_losses[-1] if self._last_result else None
        text = redact(config_to_toml(self.config))
        path = self.writer.save(self.step, groups, state, text, metric=metric)
        self.writer.wait()
        self._tell("on_checkpoint", path)
        return path

    def load_checkpoint(self, path: str | Path | None = None) -> None:
        """Go on from a checkpoint: parameters, moments, schedule, place in the data, randomness.

        Args:
            path: a run or checkpoint folder; None: the newest of ``run_dir``.

        Raises:
            UserError: it is damaged, or of another model.
        """
        if (where := path or self.run_dir) is None:
            raise UserError("Trainer: name the checkpoint, or give the trainer a run_dir")
        loaded = checkpoint.load(checkpoint.resolve(Path(where)))
        state, rng = loaded.state, loaded.group("trainer")
        try:
            self.model.load_state_dict(loaded.group("model"))
            load_optimizer_tensors(self.model, [self.optimizer], loaded.group("optimizer"))
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{loaded.path}: is of another model or optimizer: {error}") from error
        self.ema.load(loaded.group("ema"))
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for group, lr in zip(self.optimizer.param_groups, state["lrs"], strict=True):
            group["lr"] = lr
        self.scaler.load_state_dict(state["scaler"])
        restore_rng(rng, self.device)
        self._epoch_rng = {k.removeprefix("epoch_"): v for k, v in rng.items() if "epoch_" in k}
        self.step, self.epoch = state["step"], state["epoch"]
        self.batch_in_epoch, self.skipped_steps = state["batch_in_epoch"], state["skipped_steps"]
        self.val_losses = state["val_losses"]
        self._pending.clear()
        self._logged_at = (time.perf_counter(), self.step)
        self._rows_end_at = self.step
