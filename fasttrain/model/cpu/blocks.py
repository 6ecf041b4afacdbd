"""Blocks of the Transformer as one operation on a CPU in fp32, written in C++: blocks.cpp.

Tokens go through norm, product, activation and the next product a few at a time, while they are in
the cache; there is nothing of Python's between. Saved for backward are a block's input, queries,
keys and values, the attention's output, the hidden states in the middle and those of the
feed-forward layer before its activation; all else is computed again.

Sources: Dao et al. 2022, FlashAttention (arXiv:2205.14135), for what is recomputed; Goto and van de
Geijn 2008, Anatomy of High-Performance Matrix Multiplication.

Legend: B batch, T sequence, D dim, H query heads, G key-value heads, K head_dim, F hidden_dim.
"""

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.cpu import PRODUCT, is_supported, load
from torch import Tensor, nn

from fasttrain.config import TrainConfig, UserError

_FOLDER = Path(__file__).parent
_SOURCES = ("turns.h", "attention.cpp", "rows.h", "blocks.cpp")
_KINDS = ("gelu", "relu2", "swiglu")


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("m", "t", "dim", "heads", "kv", "head_dim")),
        *((name, ctypes.c_long) for name in ("hidden", "centred", "mlp", "threads")),
        ("eps", ctypes.c_float),
    ]


@cache
def _library() -> ctypes.CDLL:
    try:
        library = load(PRODUCT, *(_FOLDER / name for name in _SOURCES))
    except RuntimeError as e:
        raise UserError(f"the C++ of a block was not built; use run.compile=off: {e}") from e
    library.block_saved.restype = library.block_space.restype = ctypes.c_long
    return library


def build() -> None:
    """Build the library, before a run begins rather than in its first step.

    Raises:
        UserError: it cannot be built here.
    """
    _library()


def _pointers(tensors: Iterable[Tensor | None]) -> Any:
    """Return the addresses of tensors as an array of pointers."""
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


_Optional = Tensor | None
_OWN = 10  # tensors of a block: its value, its weights in the order of their use, its mix


def _inputs(xs: Sequence[Tensor], angles: Sequence[_Optional], own: Sequence[_Optional]) -> Any:
    """Return what the C++ takes as its inputs, block by block."""
    blocks = (own[i : i + _OWN] for i in range(0, len(own), _OWN))
    return _pointers(t for x, of in zip(xs, blocks, strict=True) for t in (x, *of, *angles))


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shape: _Shape,
        x: Tensor,
        norm: _Optional,
        cos: _Optional,
        sin: _Optional,
        *own: _Optional,
    ) -> Tensor:
        library, size, n = _library(), ctypes.byref(shape), len(own) // _OWN
        xs = [x, *(torch.empty_like(x) for _ in range(n))]
        inputs = _inputs(xs[:-1], (cos, sin), own)
        saved = [x.new_empty(library.block_saved(size, inputs)) for _ in range(n)]
        space = x.new_empty(library.block_space(size, False))
        y = xs[-1] if norm is None else torch.empty_like(x)
        last = _pointers((norm, None, xs[-1], y, None))
        pointers = (_pointers(saved), ctypes.c_void_p(space.data_ptr()), _pointers(xs[1:]), last)
        library.blocks_forward(size, n, inputs, *pointers)
        ctx.shape = shape
        last_x = None if norm is None else xs[-1]
        ctx.save_for_backward(norm, cos, sin, last_x, *saved, *xs[:-1], *own)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        norm, cos, sin, y, *tensors = ctx.saved_tensors
        n = len(tensors) // (2 + _OWN)
        saved, xs, own = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        library, size, dy = _library(), ctypes.byref(ctx.shape), dy.contiguous()
        dx, grads = torch.empty_like(dy), [None if t is None else torch.empty_like(t) for t in own]
        dnorm = None if norm is None else torch.empty_like(norm)
        space = dy.new_empty(library.block_space(size, True))
        pointers = (
            *(_inputs(xs, (cos, sin), own), _pointers(saved), ctypes.c_void_p(space.data_ptr())),
            *(_inputs([dx] * n, (), grads), _pointers((norm, dy, y, None, dnorm))),
        )
        library.blocks_backward(size, n, *pointers)
        return None, dx, dnorm, None, None, *grads


def fits(config: TrainConfig) -> bool:
    """Return whether `run_blocks_on_cpu` can train a config's model on the CPU of this machine."""
    return why_unfit(config) is None


def why_unfit(config: TrainConfig) -> str | None:
    """Return why `run_blocks_on_cpu` cannot train a config's model here; None where it can."""
    model, widest = config.model, torch.backends.cpu.get_cpu_capability()
    if not is_supported():
        lacks = "g++ is missing" if widest == "AVX2" else f"this CPU has {widest}"
        return f"C++ blocks need AVX2 alone and g++; {lacks}"
    if config.run.dtype not in ("auto", "fp32"):
        return f"C++ blocks compute in fp32, not {config.run.dtype}"
    widths = (model.dim, model.hidden_dim or 16, model.head_dim or model.dim // model.n_heads)
    window = model.sliding_window_tokens
    for key, is_done in (
        ("model widths that are no multiples of 16", not any(n % 16 for n in widths)),
        (f"model.mlp={model.mlp}", model.mlp in _KINDS),
        ("model.bias", not model.bias),
        ("model.dropout", model.dropout == 0),
        ("model.sliding_window_tokens", window is None or window >= config.data.seq_len),
        ("data.attention_across_documents=false", config.data.attention_across_documents),
        ("activation checkpointing", config.train.activation_checkpointing == "none"),
    ):
        if not is_done:
            return f"C++ blocks lack {key}"
    return None


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
    """Return what blocks make of x one after the other, of a config that `fits`.

    Args:
        blocks: of a `fasttrain.model.Block` each.
        last_norm: the norm behind them, of the kind that they have, or None.
        x: fp32 (B, T, D).
        rope: cos and sin of the positions, each fp32 (T, K/2), or None.
        mask: None: attention is causal.
        caches: None, and ``start`` 0: nothing is cached in training.
        start: see ``caches``.
        values: fp32 (B, T, G·K) of each block, mixed into its values; or None.

    Returns:
        fp32 (B, T, D), differentiable once.

    Numerics: fp32 throughout; reruns agree bit for bit, on any number of threads.
    Memory: saves (H + 2G)·K, twice that with QK-norm or mixed values, + H·K + 2·D + F (SwiGLU 2F)
        numbers a token and block; in backward about as much again, of one block, for a moment. The
        gradients of all weights come at once: where they accumulate, that is a second copy.
    """
    if mask is not None or caches is not None or start or x.numel() == 0:
        raise ValueError(
            f"run_blocks_on_cpu: x {tuple(x.shape)} has no tokens, or attention is not plain"
            " causal; use the blocks themselves"
        )
    own: list[Tensor | None] = []
    for i, block in enumerate(blocks):
        attention, mlp = block.attention, block.mlp
        mix = None if values is None else attention.value_mix
        own += [None if mix is None or values is None else values[i]]
        own += [block.attention_norm.weight, attention.qkv.weight]
        own += [None if n is None else n.weight for n in (attention.q_norm, attention.k_norm)]
        own += [attention.out.weight, block.mlp_norm.weight, mlp.up.weight, mlp.down.weight, mix]
    b, t, d = x.shape
    norm = block.attention_norm  # all have the same shape
    sizes = (b * t, t, d, attention.n_heads, attention.n_kv_heads, attention.head_dim)
    kind = (mlp.down.in_features, isinstance(norm, nn.LayerNorm), _KINDS.index(mlp.kind))
    shape = _Shape(*sizes, *kind, torch.get_num_threads(), norm.eps)
    last = None if last_norm is None else last_norm.weight
    tensors = [
        None if t is None else t.contiguous() for t in (x, last, *(rope or (None,) * 2), *own)
    ]
    for tensor in tensors:  # a model may have been moved since it was trained, or a part of it
        if tensor is not None and not (tensor.dtype == torch.float32 and tensor.is_cpu):
            raise ValueError(
                f"run_blocks_on_cpu: takes fp32 on a CPU, not {tensor.dtype} on {tensor.device}; "
                "set model.blocks_fn = fasttrain.model.run_blocks"
            )
    y: Tensor = _Blocks.apply(shape, *tensors)  # type: ignore[no-untyped-call]
    return y
