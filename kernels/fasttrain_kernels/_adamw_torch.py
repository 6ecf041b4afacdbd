"""The CPU side of `FusedAdamW`, by torch's own fused kernel."""

import math
from typing import Any

import torch
from torch import Tensor

from ._stochastic import round_stochastic_
from .grad_norm import local_tensor

__all__ = ["Batch", "update_native", "update_staged"]


class Batch:
    """The parameters that one call of torch's fused kernel updates: same group, same dtype."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.group = group
        self.indices: list[int] = []
        self.states: list[dict[str, Any]] = []
        self.steps: list[Tensor] = []


def update_native(batch: Batch, params: list[Tensor], grads: list[Any], scale: float) -> None:
    """Update parameters that torch's fused kernel takes as they are."""
    torch._fused_adamw_(
        [params[i] for i in batch.indices],
        [grads[i] for i in batch.indices],
        [state["exp_avg"] for state in batch.states],
        [state["exp_avg_sq"] for state in batch.states],
        [],
        batch.steps,
        **_arguments(batch.group, scale),
    )


def update_staged(
    group: dict[str, Any],
    param: Tensor,
    grad: Any,
    state: dict[str, Any],
    scale: float,
    seed: int | None,
) -> None:
    """Update one parameter through contiguous copies in the arithmetic's dtype.

    torch's kernel walks memory from the first element and takes one dtype for all operands, so
    strided tensors, DTensors and mixed dtypes come here.

    Args:
        group: hyper-parameters.
        param: any dtype and strides.
        grad: its gradient.
        state: its state, the step already counted.
        scale: multiplies the gradient.
        seed: round bf16 results stochastically; None: to nearest.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    stored = [local_tensor(state.get("master", param).detach())]
    stored += [local_tensor(state[key]) for key in ("exp_avg", "exp_avg_sq")]
    work = [t.to(dtype).contiguous() for t in stored]
    gradient = local_tensor(grad).to(dtype, copy=True, memory_format=torch.contiguous_format)
    weight, first, second = ([t] for t in work)
    arguments = _arguments(group, scale)
    torch._fused_adamw_(weight, [gradient], first, second, [], [state["step"]], **arguments)
    if "master" in state:
        stored.append(local_tensor(param.detach()))
        work.append(work[0])
    for slot, (target, value) in enumerate(zip(stored, work, strict=True)):
        if seed is not None and target.dtype == torch.bfloat16:
            round_stochastic_(target, value, seed=seed + slot)
        elif target is not value:
            target.copy_(value)


def _arguments(group: dict[str, Any], scale: float) -> dict[str, Any]:
    """Keyword arguments of torch's fused kernel."""
    arguments = {
        "lr": float(group["lr"]),
        "beta1": group["betas"][0],
        "beta2": group["betas"][1],
        "weight_decay": group["weight_decay"],
        "eps": group["eps"],
        "amsgrad": False,
        "maximize": group["maximize"],
    }
    if scale != 1.0:
        arguments["grad_scale"] = torch.tensor(1.0 / scale if scale else math.inf)
    return arguments
