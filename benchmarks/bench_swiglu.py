"""SwiGLU and ReLU² forward and backward against eager torch, the compiler and Liger."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import relu_squared, swiglu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPE = (32768, 8192) if CUDA else (1024, 1536)


def both_ways(fn: Callable[..., Any], leaves: list[torch.Tensor], dys: list[torch.Tensor]) -> Any:
    """A callable that runs forward and backward and returns outputs and gradients."""

    def call() -> list[torch.Tensor]:
        out = fn(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        return [*outs, *torch.autograd.grad(outs, leaves, dys)]

    return call


def agree(calls: dict[str, Callable[[], Any]]) -> None:
    """Every rival computes what ours does, or the times would compare different things."""
    mine, *others = (call() for call in calls.values())
    tolerance = 4e-2 if CUDA else 1e-3
    for other in others:
        for a, b in zip(mine, other, strict=True):
            scale = a.float().abs().max().item()
            torch.testing.assert_close(b.float(), a.float(), rtol=tolerance, atol=tolerance * scale)


def record(benchmark: Any, result: Any, n_bytes: int) -> None:
    """Store ours in GB/s, and on a GPU as a fraction of a device copy measured here and now."""
    (ours, seconds), *_ = result.median_s.items()
    benchmark.extra_info["gb_per_s"] = {ours: n_bytes / seconds / 1e9}
    if CUDA:
        source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source)
        start.record()
        for _ in range(10):
            target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        copy = 10 * 2 * source.nbytes / (start.elapsed_time(end) / 1e3)
        benchmark.extra_info["copy_gb_per_s"] = copy / 1e9
        benchmark.extra_info["fraction_of_copy"] = n_bytes / seconds / copy


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
