"""How a model lies on several ranks: whole on each (DDP), or each block in shards (FSDP2).

DDP and FSDP2 average gradients over the ranks: the loss is to be weighted by their number. Sources:
Li et al. 2020, PyTorch Distributed (arXiv:2006.15704); Zhao et al. 2023, PyTorch FSDP
(arXiv:2304.11277).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fasttrain.config import DistributedConfig
from fasttrain.distributed import World

__all__ = ["gathered", "replicate", "set_gradient_sync", "shard"]


def replicate(objective: nn.Module) -> nn.Module:
    """Return a module, parameters inside and the loss its output, as DDP runs it."""
    ddp = nn.parallel.DistributedDataParallel
    # Rotary tables are the same everywhere; by default each forward would broadcast them.
    names = [name for name, _ in objective.named_buffers()]
    ddp._set_params_and_buffers_to_ignore_for_model(objective, names)  # type: ignore[no-untyped-call]
    return ddp(objective, gradient_as_bucket_view=True)


def shard(
    model: nn.Module, world: World, config: DistributedConfig, *, compute: torch.dtype
) -> None:
    """Spread the parameters of a model over the ranks, block by block; they become DTensors.

    Optimizers are made after it.

    Args:
        model: a Transformer; its ``blocks`` are gathered one by one, the next while one computes.
        world: with its mode chosen; nothing is done unless that shards.
        config: the ``[distributed]`` section.
        compute: dtype of matrix products; parameters are gathered in it, gradients reduced in fp32.
    """
    if not world.sharded:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=None if compute is torch.float32 else compute,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    blocks = model.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        fully_shard(
            block,
            mesh=world.mesh,
            reshard_after_forward=config.reshard_after_forward,
            mp_policy=policy,
        )
    # The root keeps embedding, last norm and head whole after its forward: the loss uses the head
    # there.
    fully_shard(model, mesh=world.mesh, reshard_after_forward=False, mp_policy=policy)


@contextmanager
def gathered(model: nn.Module, world: World) -> Iterator[None]:
    """Use a model without training it: what its forward left gathered is given up at the end.

    All ranks call it together, and the model within it equally often.
    """
    if not world.sharded:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule)
    model.unshard()
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def set_gradient_sync(network: Any, world: World, *, sync: bool) -> None:
    """Let the backward pass to come reduce gradients over ranks, or only add them up here.

    Args:
        network: what `replicate` returned, or the model that was sharded.
        world: with its mode chosen.
        sync: whether to reduce them.
    """
    if world.mode == "ddp":
        network.require_backward_grad_sync = sync
    elif world.sharded:
        network.set_requires_gradient_sync(sync)
