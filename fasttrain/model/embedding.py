"""A table that tokens are looked up in, whose gradient does not depend on the threads' timing.

On a GPU only where torch is to be deterministic: the compiler's atomic additions fuse with others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Embedding"]


def _gradient(dy: Tensor, index: Tensor, n_rows: int) -> Tensor:
    gradient: Tensor = torch.ops.aten.embedding_dense_backward(dy, index, n_rows, -1, False)
    return gradient


def _like_gradient(dy: Tensor, index: Tensor, n_rows: int) -> Tensor:
    return dy.new_empty(n_rows, dy.shape[-1])


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = len(table)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (index,) = ctx.saved_tensors
        return None, torch.ops.fasttrain.embedding_backward(dy, index, ctx.n_rows)


# The gradient is an operation of its own, which the compiler calls as it is: of torch's it makes
# atomic additions by several threads, to the same row in any order, and 1.2 to 5 times as slow
# (768 × 128 to 8192 × 768 of tables of 64 to 50,304 rows; two Zen 3 cores, torch 2.13).
_OPS: Any = torch.library.Library("fasttrain", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS.define("embedding(Tensor index, Tensor table) -> Tensor")
_OPS.impl("embedding", _LookUp.apply, "CompositeImplicitAutograd")
_OPS.define("embedding_backward(Tensor dy, Tensor index, int n_rows) -> Tensor")
for _kind in ("CPU", "CUDA"):
    _OPS.impl("embedding_backward", _gradient, _kind)
torch.library.register_fake("fasttrain::embedding_backward", _like_gradient, lib=_OPS)


class Embedding(nn.Embedding):
    """Torch's, compiled with a gradient of the same bits each time; on a GPU where asked for."""

    def __init__(self, n_rows: int, dim: int) -> None:
        super().__init__(n_rows, dim)  # none of torch's options, which compiled code would ignore

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows (..., D) of the table (V, D) that ``index`` (...), int64, names."""
        plain = type(self.weight) is nn.Parameter  # not of several ranks
        exact = index.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if plain and exact and torch.compiler.is_compiling():
            y: Tensor = torch.ops.fasttrain.embedding(index, self.weight)
            return y
        return super().forward(index)
