"""RMSNorm forward and backward against eager torch, the compiler and installed peers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import rms_norm
from torch import Tensor

from benchmarks.rivals import CUDA, DEVICE, DTYPE, Op, compiled, elementwise, needs_cuda

# On a GPU: well past the L2 cache (268 MB a tensor), and QK-norm rows.
SHAPES = (
    [(65536, 2048), (32768, 4096), (16384, 8192), (1048576, 128)]
    if CUDA
    else [(2048, 768), (12288, 64)]
)


def torch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, 1e-6)


def liger() -> Op:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6)


def quack() -> Op:
    from quack.rmsnorm import rmsnorm

    return lambda x, w: rmsnorm(x, w, eps=1e-6)


MAKERS = {
    "fasttrain": lambda: rms_norm,
    "torch": lambda: torch_norm,
    "torch.compile": lambda: compiled(torch_norm),
    "fasttrain compiled": lambda: compiled(rms_norm),
    "liger": needs_cuda(liger),
    "quack": needs_cuda(quack),
}


@pytest.mark.parametrize(("n_rows", "dim"), SHAPES)
def test_rms_norm(compare: Any, n_rows: int, dim: int) -> None:
    x, dy = (torch.randn(n_rows, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    weight = torch.rand(dim, device=DEVICE).add(0.5).to(DTYPE)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    passes = 5  # x, y; dy, x, dx
    elementwise(compare, MAKERS, torch_norm, leaves, [dy], passes * x.nbytes)
