"""What a checkpoint holds of a run, as groups of tensors: model, optimizer, device numbers, RNG."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fasttrain.checkpoint import Checkpoint
from fasttrain.config import UserError
from fasttrain.model import Transformer
from fasttrain.optim import load_optimizer_tensors, optimizer_tensors
from fasttrain.step import TrainStep

__all__ = ["collect", "restore", "restore_rng", "rng_state"]


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's random generators, by the name in the checkpoint."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return rng


def restore_rng(rng: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(rng["cpu"].clone())  # as it lies in a file, it is not aligned
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"].clone(), device)


def collect(
    model: Transformer, optimizers: Sequence[torch.optim.Optimizer], train_step: TrainStep
) -> dict[str, dict[str, Tensor]]:
    """Return all tensors that a run needs to go on, by group, not copied."""
    rng = rng_state(train_step.loss.device)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer_tensors(model, optimizers),
        "trainer": train_step.state() | rng,
    }


def restore(
    checkpoint: Checkpoint,
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    train_step: TrainStep,
) -> None:
    """Put back what `collect` returned.

    Raises:
        UserError: the checkpoint is of another model.
    """
    try:
        model.load_state_dict(checkpoint.group("model"))
        load_optimizer_tensors(model, optimizers, checkpoint.group("optimizer"))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{checkpoint.path}: the checkpoint is of another model: {reason}"
        ) from error
    rest = checkpoint.group("trainer")
    restore_rng(rest, train_step.loss.device)
    train_step.load(rest)
