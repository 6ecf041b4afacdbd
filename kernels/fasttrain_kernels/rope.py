"""Rotary position embedding of queries and keys together, in one launch each way.

The pairs are (i, i + K/2), the convention of Llama and of Hugging Face's `rotate_half`. With angle
θ[t, i], c = cos θ and s = sin θ:

    y[i] = x[i]·c − x[i + K/2]·s          y[i + K/2] = x[i + K/2]·c + x[i]·s

The backward is the rotation by −θ: the same kernel with the sign of s turned.

Bound by memory; the tables, read by every head of a token, come out of the cache. Elementwise, so
bit for bit reproducible.

Under `torch.compile` it is a plain composition on every device: the compiler moves the same bytes
and can fuse the neighbours (a QK-norm, a cast, the layout attention wants) as well.

Legend: B batch, T sequence, H heads, K head_dim. A row is one head of one token.
"""

from typing import Any

import torch
from torch import Tensor

from ._dispatch import define_op, is_composed, is_transformed, use_triton
from ._launch import TRITON_DTYPES
from ._triton import tl, triton

_TILE_PAIRS, _NUM_WARPS = 2048, 4  # four 16-byte accesses a thread for 16-bit tensors


def apply_rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Plain differentiable torch for `apply_rope`, as the formula reads."""

    def rotate(x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        lo, hi = wide.chunk(2, dim=-1)
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, K/2) or (B, T, 1, K/2)
        return torch.cat((lo * c - hi * s, hi * c + lo * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


@triton.jit
def _rotate_tile(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    tile,
    stride_x_batch,
    stride_x_token,
    stride_x_head,
    stride_cos_batch,
    n_rows,
    n_tokens,
    n_heads,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INVERSE: tl.constexpr,
):
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    token = rows // n_heads
    batch = (token // n_tokens).to(tl.int64)
    position = (token % n_tokens).to(tl.int64)
    head = (rows % n_heads).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)[None, :]
    mask = (rows < n_rows)[:, None] & (cols < HALF)
    x = batch * stride_x_batch + position * stride_x_token + head * stride_x_head
    x_ptrs = x_ptr + x[:, None] + cols
    lo = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    hi = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    table = (batch * stride_cos_batch + position * HALF)[:, None] + cols
    c = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * (2 * HALF) + cols
    tl.store(y_ptrs, (lo * c - hi * s).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptrs + HALF, (hi * c + lo * s).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_cos_batch,
    n_q_tiles,
    n_q_rows,
    n_k_rows,
    n_tokens,
    n_q_heads,
    n_k_heads,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INVERSE: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < n_q_tiles:
        _rotate_tile(
            q_ptr,
            q_out_ptr,
            cos_ptr,
            sin_ptr,
            tile,
            stride_q_batch,
            stride_q_token,
            stride_q_head,
            stride_cos_batch,
            n_q_rows,
            n_tokens,
            n_q_heads,
            HALF,
            BLOCK_R,
            BLOCK_K,
            INVERSE,
        )
    else:
        _rotate_tile(
            k_ptr,
            k_out_ptr,
            cos_ptr,
            sin_ptr,
            tile - n_q_tiles,
            stride_k_batch,
            stride_k_token,
            stride_k_head,
            stride_cos_batch,
            n_k_rows,
            n_tokens,
            n_k_heads,
            HALF,
            BLOCK_R,
            BLOCK_K,
            INVERSE,
        )


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = _allocate(q, k, cos, sin, inverse)
    n_tokens, n_q_heads, n_k_heads, half = *q.shape[1:3], k.shape[2], q.shape[3] // 2
    n_q_rows, n_k_rows = q[..., 0].numel(), k[..., 0].numel()
    if n_q_rows + n_k_rows == 0:
        return q_out, k_out
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    block_k = triton.next_power_of_2(half)
    block_r = max(1, _TILE_PAIRS // block_k)
    n_q_tiles = triton.cdiv(n_q_rows, block_r)
    with torch.cuda.device_of(q):
        _rope_kernel[(n_q_tiles + triton.cdiv(n_k_rows, block_r),)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            *q.stride()[:3],
            *k.stride()[:3],
            n_tokens * half if cos.dim() == 3 else 0,
            n_q_tiles,
            n_q_rows,
            n_k_rows,
            n_tokens,
            n_q_heads,
            n_k_heads,
            HALF=half,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            INVERSE=inverse,
            num_warps=_NUM_WARPS,
        )
    return q_out, k_out


def _allocate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_back(op: Any, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = ctx.saved_tensors
    if is_transformed(dq, dk):
        return apply_rope_reference(dq, dk, cos, sin if ctx.inverse else -sin)
    rotated: tuple[Tensor, Tensor] = op(dq, dk, cos, sin, not ctx.inverse)
    return rotated


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *_rotate_back(_rope_op, ctx, dq, dk), None, None, None


_rope_op = define_op("rope", _rotate, _allocate, _setup_context, _backward, is_last=False)


class _EagerRoPE(torch.autograd.Function):
    """Plain torch that allocates nothing but its results, for eager CPU.

    On a CPU (2 threads, fp32, q of 4 × 512 × 12 × 64, both ways) 3.1 ms, where the formula with
    `torch.cat` takes 5.0 ms.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        if q.dtype.itemsize == 2:  # tables in half precision would round each product
            cos, sin = cos.float(), sin.float()
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        half, cc, sign = q.shape[-1] // 2, torch.cat((c, c), dim=-1), -1 if inverse else 1
        rotated = []
        for x in (q, k):
            y = x * cc
            y[..., :half].addcmul_(x[..., half:], s, value=-sign)
            y[..., half:].addcmul_(x[..., :half], s, value=sign)
            rotated.append(y.to(x.dtype))
        return tuple(rotated)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotate_back(_EagerRoPE.apply, ctx, dq, dk), None, None, None


def _compose(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate in the form that TorchInductor vectorises.

    On a CPU (2 threads, fp32, q of 8 × 256 × 6 × 64 and half as many keys, between a norm and a
    transposition, both ways) 2.8 ms, where `torch.cat` of the halves takes 8.6 ms.
    """
    pairs = x.unflatten(-1, (2, -1))  # (B, T, H, 2, K/2)
    pairs = pairs if x.dtype == torch.float64 else pairs.float()
    c = cos[..., None, None, :]
    s = torch.stack((-sin, sin), dim=-2).unsqueeze(-3)
    y: Tensor = (pairs * c + pairs.flip(-2) * s).flatten(-2)
    return y.to(x.dtype)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their position's angles.

    Args:
        q: (B, T, H, K) floating point, K even, any strides.
        k: (B, T, H_kv, K), any strides.
        cos: (T, K/2) or (B, T, K/2), floating point (fp32 keeps the angles of long sequences
            apart), the cosine of the angles of these T positions. No gradient flows to it.
        sin: as cos.

    Returns:
        The rotated q and k, in their shapes and dtypes.

    Raises:
        ValueError: if a shape, a device or a dtype does not fit.

    Numerics:
        fp32 inside (fp64 for float64), rounded once. Differentiable any number of times.

    Memory:
        Saves the tables alone. Moves 4 bytes an element each way (16-bit tensors).

    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    _check(q, k, cos, sin)
    cos, sin = cos.detach(), sin.detach()
    if torch.compiler.is_compiling():
        return _compose(q, cos, sin), _compose(k, cos, sin)
    if is_composed(q):
        return apply_rope_reference(q, k, cos, sin)
    if use_triton(q) and q.dtype in TRITON_DTYPES and k.dtype in TRITON_DTYPES:
        q, k = _rope_op(q, k, cos, sin, False)
    else:
        q, k = _EagerRoPE.apply(q, k, cos, sin, False)
    return q, k


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or q.shape[-1] % 2 or q.shape[-1] == 0:
        raise ValueError(
            f"apply_rope: q must have shape (B, T, H, K) with an even K, got {tuple(q.shape)}."
        )
    (b, t, _, dim), half = q.shape, q.shape[-1] // 2
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[-1] != dim:
        raise ValueError(
            f"apply_rope: k must have shape (B, T, H_kv, K) = ({b}, {t}, H_kv, {dim}), got "
            f"{tuple(k.shape)}; heads come after the sequence."
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((t, half), (b, t, half)) or table.shape != cos.shape:
            raise ValueError(
                f"apply_rope: {name} must have shape (T, K/2) = ({t}, {half}) or (B, T, K/2), cos "
                f"and sin alike, got {tuple(table.shape)}; slice the table to the positions of q."
            )
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if x.device != q.device:
            raise ValueError(f"apply_rope: {name} is on {x.device} and q on {q.device}; move one.")
        if not x.is_floating_point():
            raise ValueError(f"apply_rope: {name} must be floating point, got {x.dtype}.")
