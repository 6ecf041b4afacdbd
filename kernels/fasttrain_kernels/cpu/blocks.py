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
from typing import Any

import torch
from torch import Tensor, nn

from . import load, pointers

KINDS = ("gelu", "relu2", "swiglu")


def build(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library of one dtype, built where it is not yet; RuntimeError: it cannot be."""
    return load("product.h", "attention.cpp", "blocks.cpp", dtype=dtype)


_Optional = Tensor | None
_OWN = 11  # tensors of a block: value, weights in the order of their use, mix, last norm


def _blocks_of(xs: Sequence[Tensor], own: Sequence[_Optional], angles: Any = ()) -> Any:
    """Return what the C++ takes as inputs or gradients, block by block."""
    blocks = (own[i : i + _OWN] for i in range(0, len(own), _OWN))
    return pointers(t for x, of in zip(xs, blocks, strict=True) for t in (x, *of, *angles))


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, shape: bytes, *tensors: Any) -> Tensor:
        (x, cos, sin), own = tensors[:3], tensors[3:]
        n, library = len(own) // _OWN, build(dtype)
        xs = [x, *(torch.empty_like(x) for _ in range(n - 1))]
        y = torch.empty_like(x, dtype=torch.float32 if own[-1] is None else dtype)
        inputs = _blocks_of(xs, own, (cos, sin))
        sizes = [library.block_saved(shape, inputs, i) for i in range(n)]
        saved = [x.new_empty(size, 64, dtype=torch.uint8) for size in sizes]
        library.blocks_forward(shape, n, inputs, pointers(saved), ctypes.c_void_p(y.data_ptr()))
        ctx.library, ctx.shape = library, shape
        ctx.save_for_backward(cos, sin, *saved, *xs, *own)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *tensors = ctx.saved_tensors
        library, shape, dy, n = ctx.library, ctx.shape, dy.contiguous(), len(tensors) // (2 + _OWN)
        saved, xs, own = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        dx = torch.empty_like(xs[0])
        grads = [None if t is None else torch.empty_like(t) for t in own]
        inputs, outputs = _blocks_of(xs, own, (cos, sin)), _blocks_of([dx] * n, grads)
        end = ctypes.c_void_p(dy.data_ptr())
        library.blocks_backward(shape, n, inputs, pointers(saved), outputs, end)
        return None, None, dx, None, None, *grads


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
        blocks: of a `fasttrain.model.Block` each; all widths are multiples of 16.
        last_norm: the norm behind them, of the kind that they have, or None.
        x: fp32 (B, T, D).
        rope: cos and sin of the positions, each fp32 (T, K/2), or None.
        mask: None: attention is causal.
        caches: None, and ``start`` 0: nothing is cached in training.
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
    sizes = (b * t, t, d, attention.n_heads, attention.n_kv_heads, attention.head_dim)
    kind = (mlp.down.in_features, isinstance(norm, nn.LayerNorm), KINDS.index(mlp.kind))
    run = (torch.get_num_threads(), torch.is_grad_enabled())
    shape = struct.pack("11lf", *sizes, *kind, *run, norm.eps)  # the C++'s Shape
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
    tensors = [None if t is None else t.contiguous() for t in (x, *(rope or (None,) * 2), *own)]
    for tensor in tensors:  # a model may have been moved since it was trained, or a part of it
        if tensor is not None and not (tensor.dtype == torch.float32 and tensor.is_cpu):
            raise ValueError(
                f"run_blocks_on_cpu: takes fp32 on a CPU, not {tensor.dtype} on {tensor.device}; "
                "set model.blocks_fn = fasttrain.model.run_blocks"
            )
    y: Tensor = _Blocks.apply(dtype, shape, *tensors)
    return y
