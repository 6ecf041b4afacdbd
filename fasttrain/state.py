"""What a checkpoint holds of a run, as groups of tensors: model, optimizer, device numbers, RNG."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain.checkpoint import Checkpoint
from fasttrain.config import UserError
from fasttrain.model import Transformer
from fasttrain.optim import load_optimizer_tensors, optimizer_tensors
from fasttrain.step import TrainStep

__all__ = ["collect", "restore"]


def collect(
    model: Transformer, optimizers: Sequence[torch.optim.Optimizer], train_step: TrainStep
) -> dict[str, dict[str, Tensor]]:
    """Return all tensors that a run needs to go on, by group, not copied."""
    rng = {"cpu": torch.get_rng_state()}
    device = train_step.loss.device
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
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
    torch.set_rng_state(rest["cpu"].clone())  # as it lies in the file, it is not aligned
    device = train_step.loss.device
    if device.type == "cuda" and "cuda" in rest:
        torch.cuda.set_rng_state(rest["cuda"].clone(), device)
    train_step.load(rest)
