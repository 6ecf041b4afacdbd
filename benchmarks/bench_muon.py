"""A Muon step against torch.optim.Muon, and the symmetric product against a full one."""

from typing import Any

import pytest
import torch
from fasttrain_kernels import Muon
from fasttrain_kernels.symmetric import symmetric_matmul
from torch import nn

from benchmarks.rivals import CUDA, DEVICE

LAYERS, DIM = (12, 768) if CUDA else (4, 128)  # GPT-2 small; configs/base.toml


def parameters(dim: int) -> list[nn.Parameter]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    block = [(dim, dim)] * 4 + [(dim, 3 * dim)] * 2 + [(3 * dim, dim)]
    params = []
    for shape in block * LAYERS:
        p = nn.Parameter(torch.zeros(shape, device=DEVICE))
        p.grad = torch.randn(shape, device=DEVICE, generator=generator)
        params.append(p)
    return params


@pytest.mark.parametrize("dim", [DIM])
@pytest.mark.parametrize("coefficients", ["polar_express", "quintic"])
def test_muon_step(compare: Any, coefficients: str, dim: int) -> None:
    mine, theirs = parameters(dim), parameters(dim)
    ours = Muon(mine, lr=1e-3, weight_decay=0.1, coefficients=coefficients)
    peer = torch.optim.Muon(theirs, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours.step()
    peer.step()
    for p, q in zip(mine, theirs, strict=True):  # singular values differ, directions do not
        assert torch.cosine_similarity(p.flatten(), q.flatten(), dim=0) > 0.9
    # torch.optim.Muon multiplies in bf16, which a CPU may have to emulate.
    compare({"fasttrain": ours.step, "torch": peer.step}, warmup=1)


@pytest.mark.parametrize("rows", [1024, 2048, 4096, 8192] if CUDA else [256, 768])
def test_symmetric_matmul(compare: Any, rows: int) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float32
    n = 1 if CUDA else 4
    x = torch.randn(n, rows, rows, device=DEVICE, dtype=dtype)
    expected = torch.bmm(x, x.mT)
    scale = expected.float().abs().max().item()
    tolerance = 1e-2 if CUDA else 1e-5
    torch.testing.assert_close(symmetric_matmul(x), expected, rtol=0, atol=tolerance * scale)
    calls = {"fasttrain": lambda: symmetric_matmul(x), "torch": lambda: torch.bmm(x, x.mT)}
    rates = {"tflop_per_s_of_a_full_product": 2 * n * rows**3 / 1e12}
    compare(calls, n_calls=5 if CUDA else 1, per_call=rates)
