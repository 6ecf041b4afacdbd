"""Causal attention on a CPU, for compiled training: attention.cpp, built when called.

    P = softmax(Q·Kᵀ/√K, causal)   O = P·V   lse = the logarithm of the softmax's denominator
    dV = Pᵀ·dO   dS = P∘(dO·Vᵀ − rowsum(dO∘O))/√K   dQ = dS·K   dK = dSᵀ·Q

Products take fp32 or bf16; all else is fp32. A task is a key-value head of a row of the batch. It
alone adds to its gradients: nothing is reduced over threads, and results do not depend on their
number.

Source: Dao et al. 2022, FlashAttention (arXiv:2205.14135), for the backward pass.

Legend: B batch, T sequence, H query heads, G key-value heads, K head_dim.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import NAMESPACE
from . import PRODUCT, is_fast, load

SOURCE = Path(__file__).with_name("attention.cpp")
_FAST = [dtype for dtype in (torch.float32, torch.bfloat16) if is_fast(dtype)]
_Shape, _Strides = ctypes.c_long * 6, ctypes.c_long * 3


@cache
def _functions(dtype: torch.dtype) -> tuple[Any, Any]:
    library = load(PRODUCT, SOURCE, dtype=dtype)
    functions = library.attention_forward, library.attention_backward
    # Told once, a call converts its arguments in half the time.
    for function, n_tensors, n_strided in zip(functions, (5, 9), (3, 4), strict=True):
        function.argtypes = [_Shape, *[ctypes.c_void_p] * n_tensors, *[_Strides] * n_strided]
        function.restype = None
    return functions


def _call(function: Any, ins: list[Tensor], outs: Sequence[Tensor], strided: list[Tensor]) -> None:
    b, t, h, dim = ins[0].shape
    pointers = [x.data_ptr() for x in (*ins, *outs)]
    strides = [_Strides(*x.stride()[:3]) for x in strided]
    shape = _Shape(b, t, h, ins[1].shape[2], dim, torch.get_num_threads())
    function(shape, *pointers, *strides)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    (b, t, h, dim), g = q.shape, k.shape[2]
    if k.shape != (b, t, g, dim) or v.shape != k.shape or dim % 16 or g == 0 or h % g:
        raise ValueError(
            f"causal_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not"
            " (B, T, H, K), (B, T, G, K) twice, with K a multiple of 16 and H of G"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"causal_attention: takes fp32 or bf16, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    q, k, v = _rows(q), _rows(k), _rows(v)
    y, lse = _outputs(q, k, v)
    _call(_functions(q.dtype)[0], [q, k, v], [y, lse], [q, k, v])
    return y, lse


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, t), dtype=torch.float32)


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy, q, k, v = _rows(dy), _rows(q), _rows(k), _rows(v)
    grads = _gradients(dy, q, k, v, y, lse)
    _call(_functions(q.dtype)[1], [q, k, v, y, lse, dy], grads, [q, k, v, dy])
    return grads


def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_OPS_OF_TORCH: Any = getattr(torch.ops, NAMESPACE)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = _OPS_OF_TORCH.causal_attention_forward(q, k, v)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, y, lse)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _OPS_OF_TORCH.causal_attention_backward(dy, *ctx.saved_tensors)
        return dq, dk, dv


def _differentiable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    y, lse = _Attention.apply(q, k, v)
    return y, lse


# Compiled code calls an operation without a gradient at 6 us, one by torch.library.custom_op with
# its own at 26: this one is made of two without.
_OPS: Any = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPS.define("causal_attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_OPS.impl("causal_attention", _differentiable, "CompositeImplicitAutograd")
_OPS.define("causal_attention_forward(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_OPS.impl("causal_attention_forward", _forward, "CPU")
torch.library.register_fake(f"{NAMESPACE}::causal_attention_forward", _outputs, lib=_OPS)
_OPS.define(
    "causal_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)"
)
_OPS.impl("causal_attention_backward", _backward, "CPU")
torch.library.register_fake(f"{NAMESPACE}::causal_attention_backward", _gradients, lib=_OPS)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend to the tokens so far.

    Args:
        q: fp32 or bf16 (B, T, H, K) on a CPU, K a multiple of 16.
        k: (B, T, G, K), G a divisor of H.
        v: as k.

    Raises:
        ValueError: the shapes or dtypes are others.

    Returns:
        Output (B, T, H, K), and the log-sum-exp of the scores (B, H, T) in fp32, without gradient.

    Numerics: softmax and sums in fp32; its weights and gradients are rounded to the dtype given.
        Reruns agree bit for bit, on any number of threads. A score of -inf weighs nothing; any
        other, or a value, that is not finite makes NaN of what depends on it, and so do scores of
        -inf alone.
    Memory: 2·T·K + 64·(2·T + K) numbers a thread, in backward 3·T·K + 5·64·(K + 64).
    """
    y, lse = _OPS_OF_TORCH.causal_attention(q, k, v)
    return y, lse


def is_fast_here(q: Tensor) -> bool:
    """Return whether `causal_attention` takes q (B, T, H, K), and is the fast way.

    False where nothing is compiled: the C++ compiler would be started for it alone.
    """
    return (
        torch.compiler.is_compiling()
        and q.device.type == "cpu"
        and q.shape[3] % 16 == 0
        and q.dtype in _FAST
    )
