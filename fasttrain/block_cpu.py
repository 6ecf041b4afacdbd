"""A block of the Transformer as one operation on a CPU in fp32, written in C++: block_cpu.cpp.

Tokens go through norm, product, activation and the next product a few at a time, while they are in
the cache; there is nothing of Python's between. Saved for backward are the block's input, queries,
keys and values, the attention's output, the hidden states in the middle and those of the
feed-forward layer before its activation; all else is computed again.

Sources: Dao et al. 2022, FlashAttention (arXiv:2205.14135), for what is recomputed; Goto and van de
Geijn 2008, Anatomy of High-Performance Matrix Multiplication.

Legend: B batch, T sequence, D dim, H query heads, G key-value heads, K head_dim, F hidden_dim.
"""

import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels._cpu import PRODUCT, is_supported, load
from torch import Tensor, nn

from fasttrain.config import TrainConfig, UserError

__all__ = ["build", "fits", "run_block_on_cpu"]

_FOLDER = Path(__file__).parent
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
        library = load(PRODUCT, _FOLDER / "attention_cpu.cpp", _FOLDER / "block_cpu.cpp")
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
    """Return the addresses of tensors as a struct of pointers."""
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: _Shape, x: Tensor, *others: Tensor | None) -> Tensor:
        library, inputs, size = _library(), _pointers((x, *others)), ctypes.byref(shape)
        saved = x.new_empty(library.block_saved(size, inputs))
        space = x.new_empty(library.block_space(size, False))
        y = torch.empty_like(x)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (saved, space, y)]
        library.block_forward(size, inputs, *pointers)
        ctx.shape = shape
        ctx.save_for_backward(saved, x, *others)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, *inputs = ctx.saved_tensors
        *differentiable, _, _, mix = inputs  # cos and sin
        dy, size = dy.contiguous(), ctypes.byref(ctx.shape)
        grads = [None if t is None else torch.empty_like(t) for t in (*differentiable, mix)]
        space = dy.new_empty(_library().block_space(size, True))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (saved, space, dy)]
        _library().block_backward(size, _pointers(inputs), *pointers, _pointers(grads))
        *others, dmix = grads
        return None, *others, None, None, dmix


def fits(config: TrainConfig) -> bool:
    """Return whether `run_block_on_cpu` can train a config's model on the CPU of this machine."""
    model = config.model
    widths = (model.dim, model.hidden_dim or 16, model.head_dim or model.dim // model.n_heads)
    window = model.sliding_window_tokens
    return (
        is_supported()
        and config.run.dtype in ("auto", "fp32")
        and not any(n % 16 for n in widths)
        and not model.bias
        and model.dropout == 0
        and (window is None or window >= config.data.seq_len)
        and config.data.attention_across_documents
        and config.train.activation_checkpointing == "none"
    )


def run_block_on_cpu(
    block: Any,
    x: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    mask: object,
    cache: object,
    start: int,
    value: Tensor | None,
) -> Tensor:
    """Return what a block makes of x, as its own forward does, of a config that `fits`.

    Args:
        block: a `fasttrain.model.Block`.
        x: fp32 (B, T, D).
        rope: cos and sin of the positions, each fp32 (T, K/2), or None.
        mask: None: attention is causal.
        cache: None, and ``start`` 0: nothing is cached in training.
        start: see ``cache``.
        value: fp32 (B, T, G·K), mixed into the values; or None.

    Returns:
        fp32 (B, T, D), differentiable once.

    Numerics: fp32 throughout; reruns agree bit for bit, on any number of threads.
    Memory: saves (H + 2G)·K, twice that with QK-norm or mixed values, + H·K + D + F (SwiGLU 2F)
        numbers a token; in backward about as much again for a moment.
    """
    if mask is not None or cache is not None or start or x.numel() == 0:
        raise ValueError(
            f"run_block_on_cpu: x {tuple(x.shape)} has no tokens, or attention is not plain causal;"
            " use the block itself"
        )
    attention, mlp = block.attention, block.mlp
    for tensor in (x, attention.qkv.weight):  # a model may have been moved since it was trained
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"run_block_on_cpu: takes fp32 on a CPU, not {tensor.dtype} on {tensor.device};"
                " set model.block_fn = fasttrain.model.run_block"
            )
    b, t, d = x.shape
    norm, q_norm, k_norm = block.attention_norm, attention.q_norm, attention.k_norm
    sizes = (b * t, t, d, attention.n_heads, attention.n_kv_heads, attention.head_dim)
    kind = (mlp.down.in_features, isinstance(norm, nn.LayerNorm), _KINDS.index(mlp.kind))
    shape = _Shape(*sizes, *kind, torch.get_num_threads(), norm.eps)
    if attention.value_mix is None or value is None:
        value = mix = None
    else:
        value, mix = value.contiguous(), attention.value_mix
    y: Tensor = _Block.apply(  # type: ignore[no-untyped-call]
        *(shape, x.contiguous(), value, norm.weight, attention.qkv.weight),
        *(None if norm is None else norm.weight for norm in (q_norm, k_norm)),
        *(attention.out.weight, block.mlp_norm.weight, mlp.up.weight, mlp.down.weight),
        *((None, None) if rope is None else rope),
        mix,
    )
    return y
