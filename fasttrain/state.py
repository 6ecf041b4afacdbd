"""What a checkpoint holds of a run, as groups of tensors: model, optimizer, device numbers, RNG."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fasttrain.checkpoint import Checkpoint
from fasttrain.config import UserError
from fasttrain.model import Transformer
from fasttrain.optim import load_optimizer_tensors, optimizer_tensors
from fasttrain.slices import cut
from fasttrain.step import TrainStep

__all__ = ["collect", "restore", "restore_rng", "rng_of_rank", "rng_state"]


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


def rng_of_rank(rng: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return random states by their names among those of all ranks in a checkpoint."""
    return {f"{name}@{rank}" if rank else name: state for name, state in rng.items()}


def _restore_rng_of_rank(saved: Mapping[str, Tensor], device: torch.device, rank: int) -> None:
    """Put back a rank's random state; where none was saved, seed it by that of rank 0."""
    names = rng_of_rank({name: saved["cpu"] for name in ("cpu", "cuda")}, rank)
    own = {name.partition("@")[0]: saved[name] for name in names if name in saved}
    if "cpu" in own:
        restore_rng(own, device)
    else:
        words = saved["cpu"].numpy().tobytes() + rank.to_bytes(8, "little")
        torch.manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8], "little"))


def collect(
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    train_step: TrainStep,
    rank: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Return all tensors that a run needs to go on, by group, not copied."""
    rng = rng_of_rank(rng_state(train_step.loss.device), rank)
    # First the model's: FSDP2 then puts its shards in the place of what a forward gathered.
    return train_step.ema.groups(model.state_dict()) | {
        "optimizer": optimizer_tensors(model, optimizers),
        "trainer": train_step.state() | rng,
    }


def restore(
    checkpoint: Checkpoint,
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    train_step: TrainStep,
    rank: int = 0,
) -> None:
    """Put back what `collect` returned, on any number of ranks, sharded or not; none waits.

    Raises:
        UserError: the checkpoint is of another model.
    """
    try:
        own = model.state_dict()
        saved = checkpoint.group("model")
        model.load_state_dict({n: cut(t, own[n]) if n in own else t for n, t in saved.items()})
        load_optimizer_tensors(model, optimizers, checkpoint.group("optimizer"))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{checkpoint.path}: the checkpoint is of another model: {reason}"
        ) from error
    train_step.ema.load(checkpoint.group("ema"))
    rest = checkpoint.group("trainer")
    _restore_rng_of_rank(rest, train_step.loss.device, rank)
    train_step.load(rest)
