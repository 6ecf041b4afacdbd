"""RMSNorm with an optional fused residual addition: Triton kernels, CPU path, module.

With h = x (or h = x + residual, rounded to its dtype first), w the weight (or 1 + weight):

    rstd = 1 / sqrt(mean(h²) + eps)          y  = h·rstd·w
    c    = mean(dy·w·h)·rstd³                dh = dy·w·rstd − h·c (+ the residual stream's gradient)
    dw   = Σ_rows dy·h·rstd

Bound by memory. Bytes an element for 16-bit tensors: forward 4 (read x, write y), with residual 8
(read x and residual, write h and y); backward 6 (read dy and x, write dx), with residual 8. Rows
longer than 8192 columns (forward: 16384) are read twice, the second time out of L2.

The weight gradient is summed in fp32 by persistent programs, each over its own rows in a fixed
order, and a second kernel adds their partial sums in a fixed order: two runs on one device agree
bit for bit.

Legend: R rows (all leading dimensions), D dim. A row's offset is int64.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from ._dispatch import (
    define_op,
    differentiable_once,
    is_composed,
    is_transformed,
    pull_back,
    use_triton,
)
from ._launch import TRITON_DTYPES, as_rows, n_multiprocessors
from ._rms_norm_kernels import (
    _rms_norm_bwd_kernel,
    _rms_norm_fwd_kernel,
    _sum_partials_kernel,
)
from ._spelling import require_tensors, tell_apart
from ._triton import triton

# Sixteen elements a thread and operand: the most that keeps the backward, which holds four operands
# (x, dy, weight, weight gradient), within the registers of sm_90 without a spill.
_TILE = 2048
# Longer rows are walked over in chunks of _TILE columns, twice.
MAX_FWD_COLS = 16384
MAX_BWD_COLS = 8192
# What a multiprocessor of sm_90 holds of the backward kernel, which takes up to 128 registers a
# thread with its next tile in flight: 4, 2 or 1 programs of 4, 8 or 16 warps.
_WARPS_PER_SM = 16


_CALL = "rms_norm(x, weight, eps=eps)"


@overload
def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    eps: float | None = ...,
    residual: None = ...,
    zero_centered: bool = ...,
) -> Tensor: ...
@overload
def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    eps: float | None = ...,
    residual: Tensor,
    zero_centered: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = 1e-6,
    residual: Tensor | None = None,
    zero_centered: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain differentiable torch for `rms_norm`; same arguments and results."""
    h = x if residual is None else x + residual
    wide = h if h.dtype == torch.float64 else h.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _resolve_eps(eps, wide.dtype))
    if weight is not None:
        scale = weight.to(wide.dtype)
        y = y * (1 + scale if zero_centered else scale)
    y = y.to(h.dtype)
    return y if residual is None else (y, h)


def _resolve_eps(eps: float | None, dtype: torch.dtype) -> float:
    """Return torch's own choice where ``eps`` is None: the epsilon of what rows are summed in."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _tile(n_cols: int, max_cols: int) -> tuple[int, int, int]:
    """Return (rows a tile, columns a tile, warps): sixteen elements a thread where it can be."""
    block_n = triton.next_power_of_2(n_cols) if n_cols <= max_cols else _TILE
    block_r = max(1, _TILE // block_n) if n_cols <= max_cols else 2
    return block_r, block_n, min(16, block_r * block_n // 512)


def _normalize(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = _allocate(x, weight, residual)
    weight = None if weight is None else weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    n_cols, n_rows = x.shape[-1], rstd.numel()
    if n_rows == 0:
        return y, h, rstd
    x, n_inner, stride_outer, stride_inner = as_rows(x)
    align = math.gcd(16, stride_outer, stride_inner)
    block_r, block_n, num_warps = _tile(n_cols, MAX_FWD_COLS)
    with torch.cuda.device_of(x):
        _rms_norm_fwd_kernel[(triton.cdiv(n_rows, block_r),)](
            x,
            residual,
            weight,
            y,
            h,
            rstd,
            n_inner,
            stride_outer // align,
            stride_inner // align,
            n_rows,
            float(eps),
            ALIGN=align,
            N_COLS=n_cols,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            ZERO_CENTERED=zero_centered,
            num_warps=num_warps,
        )
    return y, h, rstd


def _allocate(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    h = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    return y, h, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _differentiate(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    zero_centered: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor]:
    dx, dw = _allocate_backward(dy, dh, x, weight, needs_dw)
    dh = None if dh is None else dh.contiguous()
    weight = None if weight is None else weight.contiguous()
    n_cols, n_rows = x.shape[-1], rstd.numel()
    if n_rows == 0:
        return dx, dw.zero_()
    x, n_inner, stride_outer, stride_inner = as_rows(x)
    align = math.gcd(16, stride_outer, stride_inner)
    block_r, block_n, num_warps = _tile(n_cols, MAX_BWD_COLS)
    resident = n_multiprocessors(x.device) * (_WARPS_PER_SM // num_warps)
    n_programs = min(triton.cdiv(n_rows, block_r), resident)
    partial = None
    if needs_dw:
        partial = torch.empty(n_programs, n_cols, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _rms_norm_bwd_kernel[(n_programs,)](
            dy.contiguous(),
            dh,
            x,
            weight,
            rstd,
            dx,
            partial,
            n_inner,
            stride_outer // align,
            stride_inner // align,
            n_rows,
            ALIGN=align,
            N_COLS=n_cols,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            HAS_DH=dh is not None,
            HAS_WEIGHT=weight is not None,
            NEEDS_DW=needs_dw,
            ZERO_CENTERED=zero_centered,
            num_warps=num_warps,
        )
        if needs_dw:
            _sum_partials_kernel[(triton.cdiv(n_cols, 32),)](
                partial, dw, n_programs, N_COLS=n_cols, BLOCK_R=64, BLOCK_N=32, num_warps=4
            )
    return dx, dw


def _allocate_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    needs_dw = rest[-1]
    dw = x.new_empty(0) if weight is None or not needs_dw else torch.empty_like(weight)
    return x.new_empty(x.shape), dw


_rms_norm_backward_op = define_op("rms_norm_backward", _differentiate, _allocate_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, ctx.eps, ctx.zero_centered = inputs
    _, h, rstd = output
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    has_residual, needs_dw = ctx.residual_dtype is not None, ctx.needs_input_grad[1]
    dw = None
    if dy is None:
        dx = dh if has_residual else None
    elif is_transformed(dy, dh):
        dx, dw = _pull_back(ctx, dy, h, weight)
        dx = dx + dh if has_residual and dh is not None else dx
    else:
        dx, dw = _rms_norm_backward_op(
            dy, dh if has_residual else None, h, weight, rstd, ctx.zero_centered, needs_dw
        )
    return (
        None if dx is None else dx.to(ctx.x_dtype),
        dw if needs_dw else None,
        None if dx is None or not has_residual else dx.to(ctx.residual_dtype),
        None,
        None,
    )


_rms_norm_op = define_op("rms_norm", _normalize, _allocate, _setup_context, _backward)


def _pull_back(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and weight through the reference."""
    compute = partial(rms_norm_reference, eps=ctx.eps, zero_centered=ctx.zero_centered)
    if weight is None:
        return pull_back(compute, (x,), dy)[0], None
    dx, dw = pull_back(compute, (x, weight), dy)
    return dx, dw


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Return Σ weights[r]·rows[r]: one product would add up thousands of rows one after another."""
    whole = weights.shape[0] // 64 * 64
    blocks = weights[:whole].view(-1, 1, 64) @ rows[:whole].view(-1, 64, rows.shape[1])
    return blocks.sum((0, 1)) + weights[whole:] @ rows[whole:]


class _EagerRMSNorm(torch.autograd.Function):
    """The same saved tensors in plain torch, for eager CPU: no wide copy of x is kept.

    That is faster than `torch.nn.functional.rms_norm` and the plain composition, most of all where
    malloc gives large blocks back to the system, as it does by default.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool
    ) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
            rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            y: Tensor = x * rstd
            if weight is not None:
                y *= weight.to(wide) + 1 if zero_centered else weight
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.zero_centered = eps, zero_centered
        return y.to(x.dtype)

    @staticmethod
    @partial(differentiable_once, "rms_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if is_transformed(dy):
            return *_pull_back(ctx, dy, x, weight), None, None
        n_cols = x.shape[-1]
        dw = None
        with torch.autocast(x.device.type, enabled=False):  # a backward inside an autocast block
            products = (dy.to(rstd.dtype) * x).reshape(-1, n_cols)
            if weight is None:
                c, dx = products.sum(-1), dy * rstd
            else:
                scale = weight.to(rstd.dtype)
                scale = 1 + scale if ctx.zero_centered else scale
                c, dx = products @ scale, (dy * scale).mul_(rstd)
                if ctx.needs_input_grad[1]:
                    dw = _weighted_sum(rstd.reshape(-1), products).to(weight.dtype)
            c = c.view(rstd.shape).mul_(rstd.pow(3)).div_(-n_cols)
            dx.addcmul_(x, c)
        return dx.to(x.dtype), dw, None, None


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"rms_norm: x must be a floating-point tensor of shape (..., D) with D >= 1, got "
            f"{x.dtype} of shape {tuple(x.shape)}."
        )
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != x.shape[-1]):
        raise ValueError(
            f"rms_norm: weight must have shape (D,) = ({x.shape[-1]},), got "
            f"{tuple(weight.shape)}; it scales the last dimension of x."
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual must have the shape of x, {tuple(x.shape)}, got "
            f"{tuple(residual.shape)}; expand it first."
        )
    for name, other in (("weight", weight), ("residual", residual)):
        if other is not None and other.device != x.device:
            raise ValueError(
                f"rms_norm: {name} is on {other.device} and x on {x.device}; move one of them."
            )


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    eps: float | None = ...,
    residual: None = ...,
    zero_centered: bool = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    eps: float | None = ...,
    residual: Tensor,
    zero_centered: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@tell_apart(
    _CALL,
    input="it is named x",
    hidden_states="it is named x",
    normalized_shape="the last dimension is normalised; leave it out",
)
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = 1e-6,
    residual: Tensor | None = None,
    zero_centered: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each row of x (or of x + residual) to unit root mean square.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64, any strides.
        weight: (D,), any floating dtype, or None for no scaling.
        eps: added to the mean square; None for torch's own, the epsilon of fp32 (fp64 for float64).
        residual: the shape of x; the residual stream that x is added to first.
        zero_centered: scale by 1 + weight instead of weight, so that zero means no scaling.

    Returns:
        The normalised tensor in the dtype of x; with `residual` the pair
        (normalised, x + residual), both in the dtype that x and residual promote to.

    Raises:
        ValueError: for shapes or devices that do not fit together.
        TypeError: for an argument that is no tensor, or that other libraries have.

    Numerics:
        fp32 inside (fp64 for float64), rounded once on the store; the weight multiplies before the
        rounding. With `residual` the rounded sum is what is normalised. A missing weight
        gradient costs nothing. Differentiable once. Under transforms of torch.func it is
        `rms_norm_reference`, differentiable any number of times.

    Memory:
        Saves x (or the sum, which is an output), the weight and 4 bytes a row. Under
        `torch.compile` it is a plain composition that the compiler fuses with its neighbours.

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    require_tensors(_CALL, x=x, weight=weight, residual=residual)
    _check(x, weight, residual)
    if is_composed(x):
        return rms_norm_reference(
            x, weight, eps=eps, residual=residual, zero_centered=zero_centered
        )
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    eps = _resolve_eps(eps, dtype)
    if use_triton(x) and x.dtype in TRITON_DTYPES:
        y, h, _ = _rms_norm_op(x, weight, residual, eps, zero_centered)
        return y if residual is None else (y, h)
    h = x if residual is None else x + residual
    y = _EagerRMSNorm.apply(h, weight, eps, zero_centered)
    return y if residual is None else (y, h)


class RMSNorm(nn.Module):
    """`rms_norm` over the last dimension with a learned weight.

    Positional arguments are those of `torch.nn.RMSNorm`.

    Args:
        dim: D, the size of the last dimension; also as a list or tuple of one number.
        eps: added to the mean square; None for torch's own, the epsilon of fp32 (fp64 for float64).
        elementwise_affine: False leaves the weight out.
        device: of the weight.
        dtype: of the weight; it may differ from the input's.
        zero_centered: the weight starts at 0 and scales by 1 + weight; else it starts at 1.

    Raises:
        ValueError: ``dim`` is more than one dimension.
        TypeError: an argument that other libraries have.
    """

    @tell_apart(
        "RMSNorm(dim, eps, zero_centered=False)",
        normalized_shape="it is named dim",
        hidden_size="it is named dim",
        bias="it has none",
        offset="offset=1 is zero_centered=True",
    )
    def __init__(
        self,
        dim: int | Sequence[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered: bool = False,
    ) -> None:
        super().__init__()
        dims = tuple(dim) if isinstance(dim, Sequence) else (dim,)
        if len(dims) != 1:
            raise ValueError(
                f"RMSNorm: dim must be one number, the size of the last dimension, got {dims}; "
                "flatten the dimensions that are normalised together."
            )
        (self.dim,), self.eps, self.zero_centered = dims, eps, zero_centered
        self.weight: nn.Parameter | None = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(self.dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that it does not scale."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    @overload
    def forward(self, x: Tensor, residual: None = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return `rms_norm(x)`, or with a residual the pair (normalised, x + residual)."""
        return rms_norm(
            x, self.weight, eps=self.eps, residual=residual, zero_centered=self.zero_centered
        )

    if TYPE_CHECKING:  # of nn.Module it returns Any

        @overload
        def __call__(self, x: Tensor, residual: None = ...) -> Tensor: ...
        @overload
        def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
        def __call__(self, x: Tensor, residual: Tensor | None = None) -> Any: ...

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return f"{self.dim}, eps={self.eps}, zero_centered={self.zero_centered}"
