"""RMSNorm forward and backward against eager torch, the compiler and installed peers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# On a GPU: well past the L2 cache (268 MB a tensor), and QK-norm rows.
SHAPES = (
    [(65536, 2048), (32768, 4096), (16384, 8192), (1048576, 128)]
    if CUDA
    else [
        (2048, 768),
        (12288, 64),
    ]
)


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


@pytest.mark.parametrize(("n_rows", "dim"), SHAPES)
def test_rms_norm(compare: Any, benchmark: Any, n_rows: int, dim: int) -> None:
    torch._dynamo.reset()
    x, dy = (torch.randn(n_rows, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    leaves = [x.requires_grad_(), torch.ones(dim, device=DEVICE, dtype=DTYPE, requires_grad=True)]

    def torch_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (dim,), w, 1e-6)

    rivals: dict[str, Callable[..., Any]] = {
        "fasttrain": rms_norm,
        "torch": torch_norm,
        "torch.compile": torch.compile(torch_norm),
        "fasttrain compiled": torch.compile(rms_norm),
    }
    calls = {name: both_ways(fn, leaves, [dy]) for name, fn in rivals.items()}
    agree(calls)
    result = compare(calls, rounds=20 if CUDA else 10, n_calls=10 if CUDA else 1)
    record(benchmark, result, 5 * x.nbytes)  # x, y; dy, x, dx


@pytest.mark.skipif(not CUDA, reason="Liger's and QuACK's kernels run on a CUDA device alone")
@pytest.mark.parametrize(("n_rows", "dim"), SHAPES)
@pytest.mark.parametrize("peer", ["liger", "quack"])
def test_rms_norm_against_peer(
    compare: Any, benchmark: Any, peer: str, n_rows: int, dim: int
) -> None:
    if peer == "liger":
        liger = pytest.importorskip("liger_kernel.ops.rms_norm", reason="liger-kernel is missing")

        def rival(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return liger.LigerRMSNormFunction.apply(x, w, 1e-6)
    else:
        quack = pytest.importorskip("quack.rmsnorm", reason="quack-kernels is missing")

        def rival(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return quack.rmsnorm(x, w, eps=1e-6)

    x, dy = (torch.randn(n_rows, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    leaves = [x.requires_grad_(), torch.ones(dim, device=DEVICE, dtype=DTYPE, requires_grad=True)]
    calls = {n: both_ways(f, leaves, [dy]) for n, f in {"fasttrain": rms_norm, peer: rival}.items()}
    agree(calls)
    record(benchmark, compare(calls, n_calls=10), 5 * x.nbytes)
