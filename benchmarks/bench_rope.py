"""RoPE of queries and keys, both ways, against torch, the compiler and Liger."""

from typing import Any

import torch
from fasttrain_kernels import apply_rope
from torch import Tensor

from benchmarks.rivals import CUDA, DEVICE, DTYPE, Op, compiled, elementwise, needs_cuda

# (B, T, H, H_kv, K)
SHAPE = (8, 8192, 32, 8, 128) if CUDA else (2, 512, 12, 12, 64)


def test_rope(compare: Any) -> None:
    b, t, h, h_kv, dim = SHAPE
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
    angles = torch.arange(t, device=DEVICE)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def rotate_half(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What models write: the convention of Llama, in the inputs' dtype."""
        c, s = (torch.cat((table, table), -1).unsqueeze(-2).to(q.dtype) for table in (cos, sin))

        def turn(x: Tensor) -> Tensor:
            lo, hi = x.chunk(2, -1)
            return x * c + torch.cat((-hi, lo), -1) * s

        return turn(q), turn(k)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope(q, k, cos, sin)

    def liger() -> Op:
        from liger_kernel.ops.rope import LigerRopeFunction

        wide = [torch.cat((table, table), -1)[None].to(DTYPE) for table in (cos, sin)]

        def op(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            # It wants heads first, and rotates in place: it is given copies.
            out = LigerRopeFunction.apply(
                q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), *wide
            )
            return tuple(x.transpose(1, 2) for x in out)

        return op

    makers = {
        "fasttrain": lambda: ours,
        "torch": lambda: rotate_half,
        "torch.compile": lambda: compiled(rotate_half),
        "fasttrain compiled": lambda: compiled(ours),
        "liger (with a copy)": needs_cuda(liger),
    }
    q, dq = (torch.randn(b, t, h, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    k, dk = (torch.randn(b, t, h_kv, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    leaves = [q.requires_grad_(), k.requires_grad_()]
    n_bytes = 4 * (q.nbytes + k.nbytes)
    elementwise(compare, makers, rotate_half, leaves, [dq, dk], n_bytes)
