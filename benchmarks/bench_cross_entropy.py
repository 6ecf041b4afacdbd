"""cross_entropy, forward and backward, against torch and the installed peers."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from fasttrain_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from torch import Tensor

from benchmarks.rivals import (
    CUDA,
    DEVICE,
    DTYPE,
    TOLERANCE,
    Op,
    check,
    compiled,
    gather,
    needs_cuda,
)

# (rows, vocabulary): on a CPU what a small trainer meets, on a GPU the sizes of the targets.
SIZES = (
    [(8192, 128256), (8192, 50304), (8192, 50257), (8192, 32000)]
    if CUDA
    else [(2048, 4096), (128, 50304), (128, 50257)]
)


def torch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets)


def liger() -> Op:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def quack() -> Op:
    from quack.cross_entropy import cross_entropy as op

    return lambda logits, targets: op(logits, targets, reduction="mean")


MAKERS = {
    "fasttrain": lambda: cross_entropy,
    "torch": lambda: torch_loss,
    "torch.compile": lambda: compiled(torch_loss),
    "liger": needs_cuda(liger),
    "quack": needs_cuda(quack),
}


def step(op: Op, logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Forward and backward, from and to the logits."""
    leaf = logits.detach().requires_grad_()
    loss = op(leaf, targets)
    loss.backward()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad]


@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_cross_entropy(compare: Any, rows: int, vocabulary: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [
        (
            torch.randn(rows, vocabulary, device=DEVICE, dtype=DTYPE),
            torch.randint(0, vocabulary, (rows,), device=DEVICE),
        )
        for _ in range(2)
    ]
    logits, targets = inputs[0]
    few = min(rows, 1024)
    exact = step(cross_entropy_reference, logits[:few].float(), targets[:few])

    def verify(name: str, op: Op) -> None:
        got = step(op, logits[:few].clone(), targets[:few])
        check(name, got, exact, TOLERANCE[DTYPE])

    ops, left_out = gather(MAKERS, verify)

    def in_turn(name: str) -> Callable[[], object]:
        # Liger writes its gradient over the logits, which the others must not find there.
        mine = [(x.clone(), t) for x, t in inputs] if name == "liger" else inputs
        chosen = cycle(mine)
        return lambda: step(ops[name], *next(chosen))

    calls = {name: in_turn(name) for name in ops}
    compare(calls, left_out=left_out, per_call={"gb_per_s": 2 * logits.nbytes / 1e9})
