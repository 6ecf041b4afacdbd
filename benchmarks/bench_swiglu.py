"""SwiGLU and ReLU² forward and backward against eager torch, the compiler and Liger."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import relu_squared, swiglu
from torch import Tensor

from benchmarks.rivals import CUDA, DEVICE, DTYPE, Op, compiled, elementwise, needs_cuda

SHAPE = (32768, 8192) if CUDA else (1024, 1536)


def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def torch_relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def liger() -> Op:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


CASES = [(swiglu, torch_swiglu, 2, 8), (relu_squared, torch_relu_squared, 1, 5)]


@pytest.mark.parametrize(("ours", "theirs", "arity", "n_passes"), CASES, ids=["swiglu", "relu2"])
def test_activation(compare: Any, ours: Op, theirs: Op, arity: int, n_passes: int) -> None:
    dy, *leaves = (torch.randn(SHAPE, device=DEVICE, dtype=DTYPE) for _ in range(arity + 1))
    leaves = [t.requires_grad_() for t in leaves]
    makers = {
        "fasttrain": lambda: ours,
        "torch": lambda: theirs,
        "torch.compile": lambda: compiled(theirs),
    }
    if arity == 2:
        makers["liger"] = needs_cuda(liger)
    elementwise(compare, makers, theirs, leaves, [dy], n_passes * dy.nbytes)
