"""Blocks of the Transformer as one operation on a CPU, written in C++: blocks.cpp.

Tokens go through norm, product, activation and the next product a few at a time, while they are in
the cache; there is nothing of Python's between. What products made is saved for backward, all else
is computed again. Under autocast products take bf16, as do the tensors that are saved for them; the
residual stream, norms, softmax and sums are fp32.

Source: Dao et al. 2022, FlashAttention (arXiv:2205.14135), for what is recomputed.

Legend: B batch, T sequence, D dim, H query heads, G key-value heads, K head_dim, F hidden_dim.
"""

import ctypes
import struct
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._dispatch import define_op, differentiable_once, is_abstract, is_transformed
from . import load, pointers

KINDS = ("gelu", "relu2", "swiglu")


def build(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library of one dtype, built where it is not yet; RuntimeError: it cannot be."""
    return load("product.h", "attention.cpp", "blocks.cpp", dtype=dtype)


_Optional = Tensor | None
_OWN = 11  # tensors of a block: value, weights in the order of their use, mix, last norm
_REMEDY = "set model.blocks_fn = fasttrain.model.run_blocks"


class _Shape(NamedTuple):
    """The C++'s Shape; in an op's arguments it is flat."""

    n_tokens: int
    t: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    is_centred: bool
    kind: int  # of KINDS
    n_threads: int
    trains: bool
    eps: float

    def pack(self) -> bytes:
        """Return it as the C++ reads it."""
        return struct.pack("11lf", *self)

    def flops(self, n_blocks: int) -> tuple[int, int]:
        """Return the operations of the products with matrices, and of one product of attention.

        Of the T·T scores all count, as in `torch.utils.flop_counter`.
        """
        n_up = 2 if KINDS[self.kind] == "swiglu" else 1
        width = 2 * (self.n_heads + self.n_kv_heads) * self.head_dim + (n_up + 1) * self.hidden_dim
        matrices = 2 * self.n_tokens * self.dim * width
        attention = 2 * self.n_tokens * self.t * self.n_heads * self.head_dim
        return n_blocks * matrices, n_blocks * attention


_SHAPE = (
    "int n_tokens, int t, int dim, int n_heads, int n_kv_heads, int head_dim, int hidden_dim, "
    "bool is_centred, int kind, int n_threads, bool trains, float eps"
)


def _pointers(tensors: Iterable[_Optional]) -> Any:
    """Return addresses, or for tensors without data whether there is one: sizes depend on that."""
    tensors = list(tensors)
    if any(t is not None and is_abstract(t) for t in tensors):
        return (ctypes.c_void_p * len(tensors))(*[None if t is None else 1 for t in tensors])
    return pointers(tensors)


def _blocks_of(xs: Sequence[Tensor], own: Sequence[_Optional], angles: Any = ()) -> Any:
    """Return what the C++ takes as inputs or gradients, block by block."""
    blocks = (own[i : i + _OWN] for i in range(0, len(own), _OWN))
    return _pointers(t for x, of in zip(xs, blocks, strict=True) for t in (x, *of, *angles))


def _allocate(
    x: Tensor,
    angles: Sequence[_Optional],
    own: Sequence[_Optional],
    dtype: torch.dtype,
    *shape: Any,
) -> list[Tensor]:
    """Return y, what each block saves, and the inputs of all blocks but the first."""
    n, packed = len(own) // _OWN, _Shape(*shape).pack()
    xs = [torch.empty_like(x) for _ in range(n - 1)]
    y = torch.empty_like(x, dtype=torch.float32 if own[-1] is None else dtype)
    inputs, library = _blocks_of([x, *xs], own, angles), build(dtype)
    sizes = [library.block_saved(packed, inputs, i) for i in range(n)]
    return [y, *(x.new_empty(size, 64, dtype=torch.uint8) for size in sizes), *xs]


def _compute(
    x: Tensor,
    angles: Sequence[_Optional],
    own: Sequence[_Optional],
    dtype: torch.dtype,
    *shape: Any,
) -> list[Tensor]:
    y, *made = results = _allocate(x, angles, own, dtype, *shape)
    n = len(own) // _OWN
    inputs, saved = _blocks_of([x, *made[n:]], own, angles), pointers(made[:n])
    end = ctypes.c_void_p(y.data_ptr())
    build(dtype).blocks_forward(_Shape(*shape).pack(), n, inputs, saved, end)
    return results


def _allocate_grads(
    dy: Tensor,
    angles: Sequence[_Optional],
    own: Sequence[_Optional],
    saved: Sequence[Tensor],
    xs: Sequence[Tensor],
    *_: Any,
) -> list[Tensor]:
    """Return the gradients of x and of what there is of ``own``."""
    return [torch.empty_like(t) for t in (xs[0], *own) if t is not None]


def _differentiate(
    dy: Tensor,
    angles: Sequence[_Optional],
    own: Sequence[_Optional],
    saved: Sequence[Tensor],
    xs: Sequence[Tensor],
    dtype: torch.dtype,
    *shape: Any,
) -> list[Tensor]:
    results = _allocate_grads(dy, angles, own, saved, xs)
    n, (dx, *grads) = len(xs), results
    inputs, outputs = _blocks_of(xs, own, angles), _blocks_of([dx] * n, _spread(grads, own))
    end = ctypes.c_void_p(dy.data_ptr())
    packed = _Shape(*shape).pack()
    build(dtype).blocks_backward(packed, n, inputs, pointers(saved), outputs, end)
    return results


def _spread(grads: Iterable[Tensor], own: Iterable[_Optional]) -> list[_Optional]:
    """Return the gradients in the places of what they are of."""
    grad = iter(grads)
    return [None if t is None else next(grad) for t in own]


def _flops(n_own: int, n_products: tuple[int, int], shape: Sequence[Any]) -> int:
    matrices, attention = _Shape(*shape).flops(n_own // _OWN)
    return n_products[0] * matrices + n_products[1] * attention


# Attention recomputes its scores in backward.
_forward_op = define_op(
    "blocks_forward",
    _compute,
    _allocate,
    schema=f"(Tensor x, Tensor?[] angles, Tensor?[] own, ScalarType dtype, {_SHAPE}) -> Tensor[]",
    flops=lambda x, angles, own, dtype, *shape: _flops(len(own), (1, 2), shape),
)
_backward_op = define_op(
    "blocks_backward",
    _differentiate,
    _allocate_grads,
    schema="(Tensor dy, Tensor?[] angles, Tensor?[] own, Tensor[] saved, Tensor[] xs, "
    f"ScalarType dtype, {_SHAPE}) -> Tensor[]",
    flops=lambda dy, angles, own, saved, xs, dtype, *shape: _flops(len(own), (2, 5), shape),
)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, shape: _Shape, *tensors: Any) -> Tensor:
        (x, *angles), own = tensors[:3], list(tensors[3:])
        n = len(own) // _OWN
        y, *made = _forward_op(x, angles, own, dtype, *shape)
        ctx.dtype, ctx.shape = dtype, shape
        ctx.save_for_backward(*angles, *made[:n], x, *made[n:], *own)
        result: Tensor = y
        return result

    @staticmethod
    @partial(differentiable_once, "run_blocks_on_cpu", instead="fasttrain.model.run_blocks")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if is_transformed(dy):
            raise RuntimeError(f"run_blocks_on_cpu: takes no batches of gradients; {_REMEDY}")
        cos, sin, *tensors = ctx.saved_tensors
        n = len(tensors) // (2 + _OWN)
        saved, xs, own = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        dx, *grads = _backward_op(
            dy.contiguous(), [cos, sin], own, saved, xs, ctx.dtype, *ctx.shape
        )
        return None, None, dx, None, None, *_spread(grads, own)


def run_blocks_on_cpu(
    blocks: Iterable[Any],
    last_norm: Any,
    x: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    mask: object,
    caches: object,
    start: int,
    values: Sequence[Tensor] | None,
) -> Tensor:
    """Return what blocks make of x one after the other, as `fasttrain.model.run_blocks` does.

    Args:
        blocks: parameters of one `fasttrain.model.Block` each; all widths are multiples of 16.
        last_norm: the norm after the blocks, of the same kind as theirs, or None.
        x: fp32 (B, T, D).
        rope: cos and sin of the positions, each fp32 (T, K/2), or None.
        mask: must be None; attention is causal.
        caches: must be None, and ``start`` 0; nothing is cached in training.
        start: see ``caches``.
        values: fp32 (B, T, G·K) of each block, mixed into its values; or None.

    Returns:
        (B, T, D), differentiable once: fp32, or behind ``last_norm`` in the dtype of the products,
        which is that of autocast, fp32 or bf16.

    Numerics: reruns agree bit for bit, on any number of threads.
    Memory: saves (H + 2G)·K, twice that with QK-norm or mixed values, + H·K + F (SwiGLU 2F) numbers
        a token and block in the dtype of the products, 2·D in fp32, and in training the weights in
        that dtype; in backward about as much again, of one block, for a moment. Gradients of
        weights that accumulate are held twice.
    """
    if mask is not None or caches is not None or start or x.numel() == 0:
        raise ValueError(
            f"run_blocks_on_cpu: x {tuple(x.shape)} has no tokens, or attention is not plain"
            " causal; use the blocks themselves"
        )
    if is_transformed():
        raise ValueError(
            "run_blocks_on_cpu: transforms of torch.func and forward-mode differentiation do not "
            f"see into it; {_REMEDY}"
        )
    own: list[_Optional] = []
    for i, block in enumerate(blocks):
        attention, mlp = block.attention, block.mlp
        mix = None if values is None else attention.value_mix
        own += [None if mix is None or values is None else values[i]]
        own += [block.attention_norm.weight, attention.qkv.weight]
        own += [None if n is None else n.weight for n in (attention.q_norm, attention.k_norm)]
        own += [attention.out.weight, block.mlp_norm.weight, mlp.up.weight, mlp.down.weight, mix]
        own += [None]
    own[-1] = None if last_norm is None else last_norm.weight
    b, t, d = x.shape
    norm = block.attention_norm  # all have the same shape
    shape = _Shape(
        b * t,
        t,
        d,
        attention.n_heads,
        attention.n_kv_heads,
        attention.head_dim,
        mlp.down.in_features,
        isinstance(norm, nn.LayerNorm),
        KINDS.index(mlp.kind),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        norm.eps,
    )
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
    tensors = [None if t is None else t.contiguous() for t in (x, *(rope or (None,) * 2), *own)]
    for tensor in tensors:  # a model may have been moved since it was trained, or a part of it
        if tensor is not None and not (tensor.dtype == torch.float32 and tensor.is_cpu):
            raise ValueError(
                f"run_blocks_on_cpu: takes fp32 on a CPU, not {tensor.dtype} on {tensor.device}; "
                f"{_REMEDY}"
            )
    y: Tensor = _Blocks.apply(dtype, shape, *tensors)
    return y
