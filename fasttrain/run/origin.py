"""Where a new run starts other than at random: another run's parameters, or all of its state."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fasttrain import checkpoint
from fasttrain.checkpoint.reading import misfits_of
from fasttrain.config import TrainConfig, UserError, load_config
from fasttrain.distributed.slices import cut

if TYPE_CHECKING:
    from fasttrain.engine.trainer import Trainer

# Keys in which a branch may differ from the run that it leaves: how long it is and how it decays.
BRANCH_MAY_CHANGE = (
    *("train.steps", "train.epochs", "train.tokens", "train.hours", "schedule.name"),
    *("schedule.min_lr", "schedule.decay_fraction", "schedule.decay_start_step"),
)


def start_from(model: nn.Module, path: str | Path) -> None:
    """Give ``model`` the parameters of another run, as ``model.init_from`` says.

    Raises:
        UserError: there is no sound checkpoint, or its model has another shape.
    """
    _, found = checkpoint.saved_parameters(Path(path))
    wanted = model.state_dict()
    if misfits := misfits_of(wanted, found):
        raise UserError(
            f"model.init_from = {path}: the model there has another shape: {misfits}; set [model] "
            "and data.seq_len as in its config.toml"
        )
    model.load_state_dict({name: cut(tensor, wanted[name]) for name, tensor in found.items()})


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
