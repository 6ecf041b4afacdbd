"""Causal attention on a CPU in fp32, for compiled training: attention.cpp, built when called.

    P = softmax(Q·Kᵀ/√K, causal)   O = P·V   lse = the logarithm of the softmax's denominator
    dV = Pᵀ·dO   dS = P∘(dO·Vᵀ − rowsum(dO∘O))/√K   dQ = dS·K   dK = dSᵀ·Q

Forward, a task is 64 queries of a head; backward, a key-value head of a row of the batch, whose
gradients it alone adds to. So nothing is reduced over threads: results do not depend on their
number. Two Zen 3 cores that other work disturbed, medians in turn with torch 2.13's: B=8, H=4,
T=256, K=64: 2.9 ms forward and 6.7 backward, torch's 6.9 and 15.8; B=12, T=64, K=32: 0.25 and
0.48, torch's 1.02 and 2.15.

Sources: Dao et al. 2022, FlashAttention (arXiv:2205.14135), for the backward pass; Goto and van de
Geijn 2008, Anatomy of High-Performance Matrix Multiplication, for the products; Moshier, Cephes,
for the range of the exponential.

Legend: B batch, T sequence, H query heads, G key-value heads, K head_dim.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.cpu import is_supported, load
from torch import Tensor
from torch.autograd.function import once_differentiable

_IS_SUPPORTED = is_supported()


@cache
def _library() -> ctypes.CDLL:
    library = load(*(Path(__file__).with_name(n) for n in ("turns.h", "attention.cpp")))
    # Told once, a call converts its arguments in half the time.
    for function, n_tensors, n_strided in ((library.forward, 5, 3), (library.backward, 9, 4)):
        strides = [_Strides] * n_strided
        function.argtypes = [ctypes.c_void_p] * n_tensors + strides + [ctypes.c_int] * 6
        function.restype = None
    return library


_Strides = ctypes.c_long * 3


def _call(function: Any, ins: list[Tensor], outs: Sequence[Tensor], strided: list[Tensor]) -> None:
    b, t, h, dim = ins[0].shape
    pointers = [x.data_ptr() for x in (*ins, *outs)]
    strides = [_Strides(*x.stride()[:3]) for x in strided]
    function(*pointers, *strides, b, t, h, ins[1].shape[2], dim, torch.get_num_threads())


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    (b, t, h, dim), g = q.shape, k.shape[2]
    if k.shape != (b, t, g, dim) or v.shape != k.shape or dim % 16 or g == 0 or h % g:
        raise ValueError(
            f"causal_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not"
            " (B, T, H, K), (B, T, G, K) twice, with K a multiple of 16 and H of G"
        )
    if not q.dtype == k.dtype == v.dtype == torch.float32:
        raise ValueError(f"causal_attention: takes fp32, not {q.dtype}, {k.dtype} and {v.dtype}")
    q, k, v = _rows(q), _rows(k), _rows(v)
    y, lse = _outputs(q, k, v)
    _call(_library().forward, [q, k, v], [y, lse], [q, k, v])
    return y, lse


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, h, t)


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy, q, k, v = _rows(dy), _rows(q), _rows(k), _rows(v)
    grads = _gradients(dy, q, k, v, y, lse)
    _call(_library().backward, [q, k, v, y, lse, dy], grads, [q, k, v, dy])
    return grads


def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = torch.ops.fasttrain.causal_attention_forward(q, k, v)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, y, lse)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.ops.fasttrain.causal_attention_backward(dy, *ctx.saved_tensors)
        return dq, dk, dv


def _differentiable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    y, lse = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return y, lse


# Compiled code calls an operation without a gradient at 6 us, one by torch.library.custom_op with
# its own at 26: this one is made of two without.
_OPS: Any = torch.library.Library("fasttrain", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS.define("causal_attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_OPS.impl("causal_attention", _differentiable, "CompositeImplicitAutograd")
_OPS.define("causal_attention_forward(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_OPS.impl("causal_attention_forward", _forward, "CPU")
torch.library.register_fake("fasttrain::causal_attention_forward", _outputs, lib=_OPS)
_OPS.define(
    "causal_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)"
)
_OPS.impl("causal_attention_backward", _backward, "CPU")
torch.library.register_fake("fasttrain::causal_attention_backward", _gradients, lib=_OPS)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend to the tokens so far.

    Args:
        q: fp32 (B, T, H, K) on a CPU, K a multiple of 16.
        k: fp32 (B, T, G, K), G a divisor of H.
        v: as k.

    Raises:
        ValueError: the shapes or dtypes are others.

    Returns:
        Output (B, T, H, K), and the log-sum-exp of the scores (B, H, T), not differentiable.

    Numerics: fp32 throughout; reruns agree bit for bit, on any number of threads. A score of -inf
        weighs nothing; any other, or a value, that is not finite makes NaN of what depends on it,
        and so do scores of -inf alone.
    Memory: 64·(K + T) numbers a thread, in backward 128·(K + 64).
    """
    y, lse = torch.ops.fasttrain.causal_attention(q, k, v)
    return y, lse


def is_fast_here(q: Tensor) -> bool:
    """Return whether `causal_attention` takes q (B, T, H, K), and is the fast way.

    False where nothing is compiled: the C++ compiler would be started for it alone.
    """
    return (
        torch.compiler.is_compiling()
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[3] % 16 == 0
        and _IS_SUPPORTED
    )
