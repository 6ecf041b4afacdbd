"""RoPE of queries and keys, both ways, against torch, the compiler and Liger."""

from collections.abc import Callable
from typing import Any

import torch
from fasttrain_kernels import apply_rope

from benchmarks.elementwise import CUDA, DEVICE, DTYPE, agree, both_ways, record

# (B, T, H, H_kv, K)
SHAPE = (8, 8192, 32, 8, 128) if CUDA else (2, 512, 12, 12, 64)


def rotate_half(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What models write: the convention of Llama, in the inputs' dtype."""
    c, s = (torch.cat((t, t), -1).unsqueeze(-2).to(q.dtype) for t in (cos, sin))

    def turn(x: torch.Tensor) -> torch.Tensor:
        lo, hi = x.chunk(2, -1)
        return x * c + torch.cat((-hi, lo), -1) * s

    return turn(q), turn(k)


def test_rope(compare: Any, benchmark: Any) -> None:
    torch._dynamo.reset()
    b, t, h, h_kv, dim = SHAPE
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
    angles = torch.arange(t, device=DEVICE)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    q, dq = (torch.randn(b, t, h, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    k, dk = (torch.randn(b, t, h_kv, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    leaves = [q.requires_grad_(), k.requires_grad_()]
    compiled, ours_compiled = torch.compile(rotate_half), torch.compile(apply_rope)
    rivals: dict[str, Callable[..., Any]] = {
        "fasttrain": lambda q, k: apply_rope(q, k, cos, sin),
        "torch": lambda q, k: rotate_half(q, k, cos, sin),
        "torch.compile": lambda q, k: compiled(q, k, cos, sin),
        "fasttrain compiled": lambda q, k: ours_compiled(q, k, cos, sin),
    }
    if CUDA:
        try:
            from liger_kernel.ops.rope import LigerRopeFunction
        except ImportError:
            benchmark.extra_info["left_out"] = "liger: liger-kernel is missing"
        else:
            wide = [torch.cat((table, table), -1)[None].to(DTYPE) for table in (cos, sin)]

            def liger(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
                # It wants heads first, and rotates in place: it is given copies.
                out = LigerRopeFunction.apply(
                    q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), *wide
                )
                return tuple(x.transpose(1, 2) for x in out)

            rivals["liger (with a copy)"] = liger
    calls = {name: both_ways(fn, leaves, [dq, dk]) for name, fn in rivals.items()}
    agree(calls)
    result = compare(calls, rounds=20 if CUDA else 10, n_calls=10 if CUDA else 1)
    record(benchmark, result, 4 * (q.nbytes + k.nbytes))
