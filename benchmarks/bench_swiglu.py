"""SwiGLU and ReLU² forward and backward against eager torch, the compiler and Liger."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import relu_squared, swiglu

from benchmarks.elementwise import CUDA, DEVICE, DTYPE, agree, both_ways, record

SHAPE = (32768, 8192) if CUDA else (1024, 1536)


def torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def torch_relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


CASES = [(swiglu, torch_swiglu, 2, 8), (relu_squared, torch_relu_squared, 1, 5)]


@pytest.mark.parametrize(("ours", "theirs", "arity", "n_passes"), CASES, ids=["swiglu", "relu2"])
def test_activation(
    compare: Any, benchmark: Any, ours: Any, theirs: Any, arity: int, n_passes: int
) -> None:
    torch._dynamo.reset()
    dy, *leaves = (torch.randn(SHAPE, device=DEVICE, dtype=DTYPE) for _ in range(arity + 1))
    leaves = [t.requires_grad_() for t in leaves]
    rivals: dict[str, Callable[..., Any]] = {
        "fasttrain": ours,
        "torch": theirs,
        "torch.compile": torch.compile(theirs),
    }
    if CUDA and arity == 2:
        try:
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        except ImportError:
            benchmark.extra_info["left_out"] = "liger: liger-kernel is missing"
        else:
            rivals["liger"] = LigerSiLUMulFunction.apply
    calls = {name: both_ways(fn, leaves, [dy]) for name, fn in rivals.items()}
    agree(calls)
    result = compare(calls, rounds=20 if CUDA else 10, n_calls=10 if CUDA else 1)
    record(benchmark, result, n_passes * dy.nbytes)
