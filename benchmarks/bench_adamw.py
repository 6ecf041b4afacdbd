"""A clipped AdamW step: grad_norm and FusedAdamW against torch's clipping and its three AdamWs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fasttrain_kernels import FusedAdamW, grad_norm
from torch import nn

from benchmarks.rivals import CUDA, DEVICE

MAX_NORM = 1.0


def gpt(layers: int, dim: int, vocab: int) -> list[tuple[int, ...]]:
    """Shapes of a GPT with tied embeddings."""
    block = [(dim,), (3 * dim, dim), (dim, dim), (dim,), (4 * dim, dim), (dim, 4 * dim)]
    return [(vocab, dim), (1024, dim), *(block * layers), (dim,)]


# 0.8M parameters: bound by overhead; 124M: GPT-2 small; on a GPU also 1B.
MODELS = {"0.8M": gpt(4, 128, 256), "124M": gpt(12, 768, 50304)}
if CUDA:
    MODELS["1B"] = gpt(24, 1792, 50304)


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    params = []
    for shape in shapes:
        value = torch.randn(shape, device=DEVICE, generator=generator)
        p = nn.Parameter((0.02 * value).to(dtype))
        p.grad = (1e-3 * torch.randn(shape, device=DEVICE, generator=generator)).to(dtype)
        params.append(p)
    return params


def copied(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return the same parameters with the same gradients."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    for copy, p in zip(copies, params, strict=True):
        copy.grad = p.grad.clone() if p.grad is not None else None
    return copies


def ours(params: list[nn.Parameter]) -> Callable[[], None]:
    optimizer = FusedAdamW(params, lr=1e-5)

    def step() -> None:
        result = grad_norm([p.grad for p in params if p.grad is not None], MAX_NORM)
        optimizer.step(clip_coefficient=result.clip_coefficient, found_inf=result.found_inf)

    return step


def torchs(params: list[nn.Parameter], **options: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(params, lr=1e-5, **options)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_clipped_step(compare: Any, model: str, dtype: torch.dtype) -> None:
    if not CUDA and dtype == torch.bfloat16 and model != "0.8M":
        pytest.skip("large bf16 states are a GPU's case")
    shapes = MODELS[model]
    sets = {"fasttrain": parameters(shapes, dtype)}
    for name in ("torch fused", "torch foreach"):
        sets[name] = copied(sets["fasttrain"])
    calls = {
        "fasttrain": ours(sets["fasttrain"]),
        "torch fused": torchs(sets["torch fused"], fused=True),
        "torch foreach": torchs(sets["torch foreach"], foreach=True),
    }
    if model == "0.8M":  # a loop over tensors: minutes of the large models' time
        sets["torch default"] = copied(sets["fasttrain"])
        calls["torch default"] = torchs(sets["torch default"], foreach=False)
    for call in calls.values():
        call()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for name, params in sets.items():
        for p, q in zip(params, sets["fasttrain"], strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=1e-6, msg=name)
    n_bytes = sum(p.numel() for p in sets["fasttrain"]) * dtype.itemsize * 8  # norm 1, step 7
    rates = {"gb_per_s": n_bytes / 1e9}
    compare(calls, n_calls=20 if model == "0.8M" else 1, warmup=1, per_call=rates)
