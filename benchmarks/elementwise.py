"""Shared by the benchmarks of element-wise ops: what is timed, agreement, and the bandwidth."""

from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


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
