"""What `Trainer` and `train_loop` refuse, and warn of, before they begin."""

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttrain.config import (
    LoopConfig,
    TrainConfig,
    UserError,
    config_difference,
    config_from_dict,
)
from fasttrain.library.callback import EVENTS

# The config keys that a Trainer obeys, by what it needs for them; of others it warns where they are
# set. It never saves asynchronously.
OBEYED = {
    "fasttrain.Transformer": "run.fp8 train.activation_checkpointing",
    "torchrun": "distributed.mode distributed.shard_ranks distributed.reshard_after_forward "
    "distributed.init_timeout_s",
    "nothing": "run.device run.dtype run.attention run.deterministic run.compile train.steps "
    "train.epochs train.max_grad_norm train.max_grad_value train.ema_decay train.on_nonfinite "
    "eval.every_steps eval.patience eval.min_change log.every_steps",
    "run_dir": "checkpoint.every_steps checkpoint.keep_last checkpoint.asynchronous log.csv "
    "log.tensorboard log.wandb_project log.wandb_mode",
    "criterion=None": "train.label_smoothing train.z_loss",
}


def shown(value: Any) -> str:
    """Return what a wrong argument is, for a message: a plain value, a class, or its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:80]}…")
    return f"of type {type(value).__name__}"


def path_of(name: str, value: Any) -> Path:
    """Return an argument as a path, or refuse it."""
    if not isinstance(value, str | Path):
        raise UserError(f"Trainer: {name} is {shown(value)}; pass the path of a folder")
    return Path(value)


def refuse_model(model: Any, who: str = "Trainer") -> None:
    if isinstance(model, type):
        raise UserError(f"{who}: model is {shown(model)}; pass an instance, {model.__name__}(…)")
    if not isinstance(model, nn.Module):
        raise UserError(f"{who}: model is {shown(model)}; pass a torch.nn.Module")


def refuse_loader(name: str, loader: Any) -> None:
    if isinstance(loader, str | bytes | Mapping):
        raise UserError(f"Trainer: {name} is {shown(loader)}; pass a DataLoader or list of batches")
    if isinstance(loader, type) or not (
        hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    ):
        raise UserError(f"Trainer: {name} is {shown(loader)}; pass a DataLoader or list of batches")


def refuse_arguments(
    model: Any,
    optimizer: Any,
    scheduler: Any,
    criterion: Any,
    accumulate: Any,
    metrics: Any,
    callbacks: Sequence[Any],
) -> None:
    """Refuse an argument of `Trainer` that is of a wrong kind."""
    refuse_model(model)
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        raise UserError(
            f"Trainer: optimizer is {shown(optimizer)}; give one of torch.optim, over "
            "model.parameters(), such as torch.optim.AdamW(model.parameters(), lr=1e-3)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            f"Trainer: {type(optimizer).__name__} evaluates the loss by itself, several times a "
            "step (its step needs a closure); give another optimizer"
        )
    if scheduler is not None and (
        isinstance(scheduler, type | torch.optim.Optimizer)
        or not callable(getattr(scheduler, "step", None))
        or not callable(getattr(scheduler, "state_dict", None))
    ):
        raise UserError(
            f"Trainer: scheduler is {shown(scheduler)}; give one of torch.optim.lr_scheduler, "
            "such as CosineAnnealingLR(optimizer, T_max=1000), or None for a constant learning rate"
        )
    scheduled = getattr(scheduler, "optimizer", optimizer)
    if scheduled is not optimizer and scheduled.param_groups is not optimizer.param_groups:
        raise UserError(
            f"Trainer: scheduler is made for another {type(scheduled).__name__}; make it with the "
            "optimizer that you pass"
        )
    if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
        raise UserError(
            f"Trainer: criterion is {shown(criterion)}; give a function of logits (N, V) and "
            "targets (N,), such as torch.nn.CrossEntropyLoss(), or None for cross-entropy"
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, Integral):
        raise UserError(
            f"Trainer: accumulate is {shown(accumulate)}; pass the number of batches of a step, "
            "an integer of at least 1"
        )
    if accumulate < 1:
        raise UserError(f"Trainer: accumulate must be at least 1, got {accumulate}")
    if metrics is not None and not isinstance(metrics, Mapping):
        raise UserError(
            f"Trainer: metrics is {shown(metrics)}; pass a dict of names and functions of "
            '(logits, targets), such as {"accuracy": accuracy}'
        )
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str):
            raise UserError(f"Trainer: metrics has the name {name!r}; names are strings")
        if isinstance(metric, type) or not callable(metric):
            raise UserError(
                f"Trainer: metrics[{name!r}] is {shown(metric)}; pass a function of logits (N, V) "
                "and targets (N,) that returns their mean"
            )
    for callback in callbacks:
        has_method = any(callable(getattr(callback, event, None)) for event in EVENTS)
        if isinstance(callback, type) or not has_method:
            raise UserError(
                f"Trainer: callbacks holds {callback!r}; give objects with any of "
                f"{', '.join(EVENTS)}"
            )
    if any(getattr(module, "sparse", False) is True for module in model.modules()):
        raise UserError(
            "Trainer: the model makes sparse gradients, of which there is no norm here; set "
            "sparse=False"
        )


def refuse_config(config: TrainConfig) -> None:
    """Refuse a config that asks for what `Trainer` does not do."""
    loop = config.train
    if loop.steps is None and (loop.epochs or 0.5) % 1:
        raise UserError("Trainer: set train.steps, or train.epochs to a whole number")
    if loop.on_nonfinite == "rollback" or loop.on_spike != "off":
        raise UserError(
            "Trainer: does not go back or look for spikes; unset train.on_spike, and set "
            "train.on_nonfinite=skip or stop"
        )
    if config.run.compile not in ("off", "auto", "c++", "default"):
        raise UserError("Trainer: knows no CUDA graphs; use run.compile=default")


def config_of(given: Any) -> TrainConfig:
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


def warn_of_ignored(config: TrainConfig, met: Mapping[str, bool]) -> None:
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
