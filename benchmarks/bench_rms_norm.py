"""RMSNorm forward and backward against eager torch, the compiler and installed peers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import rms_norm

from benchmarks.elementwise import CUDA, DEVICE, DTYPE, agree, both_ways, record

# On a GPU: well past the L2 cache (268 MB a tensor), and QK-norm rows.
SHAPES = (
    [(65536, 2048), (32768, 4096), (16384, 8192), (1048576, 128)]
    if CUDA
    else [
        (2048, 768),
        (12288, 64),
    ]
)


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
