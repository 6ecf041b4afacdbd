"""Where a new run starts other than at random: another run's parameters, or all of its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fasttrain import checkpoint
from fasttrain.config import TrainConfig, UserError, load_config
from fasttrain.model import outline
from fasttrain.slices import cut

if TYPE_CHECKING:
    from fasttrain.trainer import Trainer

__all__ = [
    "BRANCH_MAY_CHANGE",
    "begin_branch",
    "check_model",
    "decaying_from",
    "saved_parameters",
    "settle_branch",
    "start_from",
]

# Keys in which a branch may differ from the run that it leaves: how long it is and how it decays.
BRANCH_MAY_CHANGE = (
    *("train.steps", "train.epochs", "train.tokens", "train.hours", "schedule.name"),
    *("schedule.min_lr", "schedule.decay_fraction", "schedule.decay_start_step"),
)


def saved_parameters(
    path: Path, which: str = "best"
) -> tuple[checkpoint.Checkpoint, dict[str, Tensor]]:
    """Return a checkpoint and the parameters in it that were evaluated: averaged ones, if any.

    Args:
        path: a run folder, or one checkpoint of it.
        which: of a run, the ``best`` checkpoint (the newest where none was evaluated) or the
            ``latest``.

    Raises:
        UserError: there is no such folder, no checkpoint in it, or it is damaged.
    """
    if which not in ("best", "latest"):
        raise UserError(f"which must be 'best' or 'latest', got {which!r}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder, such as runs/base")
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    evaluated = (checkpoints / "best").exists()
    folder = checkpoint.resolve(path, which if which == "latest" or evaluated else "auto")
    loaded = checkpoint.load(folder, only=("model", "ema"))
    return loaded, loaded.group("model") | loaded.group("ema")


def start_from(model: nn.Module, path: str | Path) -> None:
    """Give ``model`` the parameters of another run, as ``model.init_from`` says.

    Raises:
        UserError: there is no sound checkpoint, or its model has another shape.
    """
    _, found = saved_parameters(Path(path))
    wanted = model.state_dict()
    if misfits := _misfits(wanted, found):
        raise UserError(
            f"model.init_from = {path}: the model there has another shape: {misfits}; set [model] "
            "and data.seq_len as in its config.toml"
        )
    model.load_state_dict({name: cut(tensor, wanted[name]) for name, tensor in found.items()})


def check_model(config: TrainConfig, found: Mapping[str, Tensor], source: Path) -> None:
    """Refuse a config whose model is not that of a checkpoint, before any of the model is made.

    Args:
        config: its vocabulary settled; where it is the checkpoint's own it may say anything.
        found: the parameters there, on any device.
        source: the checkpoint's folder.

    Raises:
        UserError: the parameters have other shapes, or what is made beside them is out of
            proportion.
    """
    problem = f"model.n_layers = {config.model.n_layers}"
    if len({n.split(".")[1] for n in found if n.startswith("blocks.")}) == config.model.n_layers:
        model = outline(config, sum(tensor.numel() for tensor in found.values()), source)
        problem = _misfits(model.state_dict(), found)
    if problem:
        raise UserError(
            f"{source}: its tensors do not fit [model] and data.seq_len: {problem}; use the "
            "config.toml that the run was trained with"
        )


def _misfits(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return which parameters have other shapes there than here, at most three of them."""
    misfits = [
        f"{name} is {_shape(found.get(name))} there and {_shape(wanted.get(name))} here"
        for name in sorted(wanted.keys() | found.keys())
        if _shape(found.get(name)) != _shape(wanted.get(name))
    ]
    more = f", and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    return "; ".join(misfits[:3]) + more


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def decaying_from(config: TrainConfig, source: Path) -> TrainConfig:
    """Return the config of a branch that decays from the checkpoint ``source`` to its horizon.

    Raises:
        UserError: the schedule has no decay to begin, or the checkpoint holds no run.
    """
    if config.schedule.name != "wsd":
        raise UserError(
            f"--decay-from: schedule.name = {config.schedule.name} has no decay of its own; set "
            "schedule.name=wsd"
        )
    state = checkpoint.load(source, only=()).state
    if "position" not in state:
        raise UserError(
            f"--decay-from {source}: holds parameters but no run; use model.init_from={source}"
        )
    step = state["step"]
    return replace(config, schedule=replace(config.schedule, decay_start_step=step))


def settle_branch(config: TrainConfig, source: Path) -> TrainConfig:
    """Return the config of a run resumed at ``source``, its decay begun where it had been begun."""
    begun = load_config(source / "config.toml").schedule.decay_start_step
    if begun is None or config.schedule.decay_start_step is not None:
        return config
    return replace(config, schedule=replace(config.schedule, decay_start_step=begun))


def begin_branch(trainer: Trainer, source: Path) -> None:
    """Make a trainer that has loaded ``source`` a run of its own: what was best there is not here.

    Raises:
        UserError: its horizon does not lie after the checkpoint.
    """
    if trainer.config.train.hours is not None:
        trainer.total_steps = None  # to be measured: not what the other run's hours came to
    step, end = trainer.step_count, trainer.total_steps
    if end is not None and end <= step:
        trainer.close()
        raise UserError(
            f"--decay-from {source}: it is at step {step}, and this config ends at step {end}; "
            "set train.steps to where the branch is to end, counted from the run's first step"
        )
    trainer.best_val_loss, trainer.val_losses = math.inf, []
    trainer.eval_due, trainer.saver.saved_at = False, None
    trainer.trained_s = 0.0
