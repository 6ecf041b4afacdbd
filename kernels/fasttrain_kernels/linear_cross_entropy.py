"""A linear layer and the cross-entropy of its outputs, without ever holding all logits.

    logits = hidden · weightᵀ + bias                    (one chunk of rows at a time)
    loss and dlogits as in `cross_entropy`
    dhidden = dlogits · weight,  dweight = Σ_chunks dlogitsᵀ · hidden,  dbias = Σ_rows dlogits

Cost: 6·N·D·V FLOP in three products of a chunk (cuBLAS, or the CPU's BLAS); the softmax between
them reads and writes the chunk's logits once. The gradients are computed in forward, where the
logits are at hand, and backward multiplies them by the incoming gradient: the kernel ends at once
where that is 1, decided on the device. ``reduction="none"`` computes them in backward, from logits
computed again (8·N·D·V FLOP).

Products in the dtype of ``hidden``; softmax and loss in fp32; the weight gradient is accumulated
over chunks in fp32. Every sum has a fixed order: reruns agree bit for bit on one machine. No host
sync on a GPU. On a CPU the few logits of a small problem are computed at once, by torch's own ops,
and many in fp32 in C++, where `_linear_cross_entropy_cpu.fits`.

Sources: chunked loss, Liger Kernel (arXiv:2410.10989); Cut Cross-Entropy (arXiv:2411.09009).

Legend: B batch, T sequence, N = B·T rows, D dim, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.cross_entropy import LossTerms
from ._cross_entropy_options import (
    accumulation_dtype,
    check_options,
    check_targets,
    finish,
    mean_scale,
)
from ._dispatch import is_traced, once, use_triton
from ._linear_cross_entropy_compute import (
    Gradients,
    chunk_rows,
    compute_linear_cross_entropy,
    weight_grad_dtype,
)
from .cpu.linear_cross_entropy import fits
from ._scale import scale_unless_one_
from .cross_entropy import cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

_NAMESPACE = (__package__ or "fasttrain_kernels").replace(".", "_")
# On a CPU so few logits, 4 MiB in fp32, are computed at once: what chunks take beside the products,
# 0.3 ms, is a third of everything at N=768, D=128, V=96. Beyond, chunks are the faster way.
_AT_ONCE = 2**20


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    max_chunk_mib: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Compute what `linear_cross_entropy` computes, in plain differentiable torch."""
    cast = None if bias is None else bias.to(hidden.dtype)
    logits = F.linear(hidden, weight.to(hidden.dtype), cast)
    return cross_entropy_reference(logits, targets, **options)


def _pack(grads: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dh, dw, db = (like.new_empty(0) if grad is None else grad for grad in grads)
    return dh, dw, db


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    max_chunk_mib: float | None,
    reduce: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, class_weight)
    # Gradients divided by N leave the range of fp16: there the scale is applied in backward.
    late = hidden.dtype == torch.float16
    losses, lse, correct, grads = compute_linear_cross_entropy(
        hidden, weight, bias, targets, terms, token_weight, None if late else scale,
        chunk_rows(hidden, weight.shape[0], max_chunk_mib),
        (want_hidden, want_weight, want_bias), want_correct=want_correct,
    )  # fmt: skip
    loss = losses.sum() if reduce else losses
    if late and scale is not None:
        loss = loss * scale
    return loss, lse, correct, *_pack(grads, hidden)


_forward = torch.library.custom_op(
    f"{_NAMESPACE}::linear_cross_entropy_forward", _compute, mutates_args=()
)


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight = args[:2]
    max_chunk_mib, reduce, want_hidden, want_weight, want_bias, want_correct = args[11:17]
    dtype, (n_rows, dim) = accumulation_dtype(hidden.dtype), hidden.shape
    n_cols = weight.shape[0]
    rows = chunk_rows(hidden, n_cols, max_chunk_mib)
    new = hidden.new_empty
    return (
        new(() if reduce else (n_rows,), dtype=dtype),
        new(n_rows, dtype=dtype),
        new(n_rows if want_correct else 0, dtype=dtype),
        new((n_rows, dim)) if want_hidden else new(0),
        new((n_cols, dim), dtype=weight_grad_dtype(hidden, weight, rows))
        if want_weight
        else new(0),
        new(n_cols, dtype=dtype) if want_bias else new(0),
    )


@torch.library.custom_op(f"{_NAMESPACE}::linear_cross_entropy_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    max_chunk_mib: float | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients from the inputs, for any incoming gradient, (N,) or ()."""
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, class_weight)
    grads = compute_linear_cross_entropy(
        hidden, weight, bias, targets, terms, token_weight, scale,
        chunk_rows(hidden, weight.shape[0], max_chunk_mib),
        (want_hidden, want_weight, want_bias), lse=lse, upstream=upstream,
    )[3]  # fmt: skip
    if grads.weight is not None:
        grads = grads._replace(weight=grads.weight.to(weight.dtype))
    if grads.bias is not None and bias is not None:
        grads = grads._replace(bias=grads.bias.to(bias.dtype))
    return _pack(grads, hidden)


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = args[1:4]
    want_hidden, want_weight, want_bias = args[-3:]
    new = hidden.new_empty
    return (
        new(hidden.shape) if want_hidden else new(0),
        weight.new_empty(weight.shape) if want_weight else new(0),
        bias.new_empty(bias.shape) if want_bias and bias is not None else new(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ignore_index, smoothing, z_loss, softcap, chunk, reduce = inputs[:13]
    _, lse, correct, *grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, correct, *grads)
    ctx.options = (ignore_index, smoothing, z_loss, softcap, chunk)
    ctx.save_for_backward(*tensors, lse)
    # Kept outside the saved tensors: backward hands them out, and may write to them, once.
    ctx.grads = tuple(grads) if reduce and any(inputs[13:16]) else None


def _final(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad`` times the scalar ``factor``, rounded to ``dtype`` once."""
    if type(factor) is not Tensor:
        # A graph is being traced: buffers are the compiler's, and so is this multiplication.
        return (grad * factor).to(dtype)
    if grad.dtype == dtype:
        scale_unless_one_(grad, factor)
        return grad
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _backward_formula(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    unused = (None,) * 14
    if upstream is None:
        return (None, None, None, *unused)
    hidden, weight, bias, targets, class_weight, token_weight, scale, lse = ctx.saved_tensors
    want = ctx.needs_input_grad[:3]
    grads, ctx.grads = ctx.grads, None
    if grads is None:  # reduction "none", or handed out before (a retained graph)
        grads = _backward(
            upstream, hidden, weight, bias, targets, lse, class_weight, token_weight, scale,
            *ctx.options, *want,
        )  # fmt: skip
    else:
        late = hidden.dtype == torch.float16 and scale is not None
        factor = upstream * scale if late else upstream
        grads = tuple(
            _final(grad, factor, like.dtype) if wanted else None
            for grad, like, wanted in zip(grads, (hidden, weight, bias), want, strict=True)
        )
    return (*(g if wanted else None for g, wanted in zip(grads, want, strict=True)), *unused)


_forward.register_autograd(_backward_formula, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same op for tensors that nobody traces."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            result = _backward_formula(ctx, *grads)
        return once(result, "linear_cross_entropy")


def _is_small(hidden: Tensor, weight: Tensor, max_chunk_mib: float | None) -> bool:
    """Return whether all logits may be held at once: without rounding, which chunks do better."""
    return (
        max_chunk_mib is None
        and hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.float64)
        and hidden.numel() // max(1, weight.shape[1]) * weight.shape[0] <= _AT_ONCE
        and not use_triton(hidden)
    )


def _all_in_range(targets: Tensor, n_cols: int) -> bool:
    if targets.numel() == 0:
        return False
    low, high = targets.aminmax()
    return low.item() >= 0 and high.item() < n_cols


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    name = "linear_cross_entropy"
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden (..., D) and weight (V, D) must agree in D, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; weight is laid out as in nn.Linear."
        )
    if not (hidden.dtype.is_floating_point and weight.dtype.is_floating_point):
        raise TypeError(
            f"{name}: hidden and weight must be floating point, got {hidden.dtype} and "
            f"{weight.dtype}."
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"{name}: weight is on {weight.device} but hidden is on {hidden.device}; move them to "
            "one device."
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"{name}: bias must have shape (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}."
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    max_chunk_mib: float | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross-entropy of ``hidden @ weight.T + bias`` without holding all logits.

    Args:
        hidden: (N, D) or (B, T, D); fp32, bf16, fp16 or fp64. Products are taken in its dtype, or
            under autocast in autocast's.
        weight: (V, D); cast to that dtype for the call where it differs, its gradient is not.
        targets: (N,) or (B, T), int64 or int32, in [0, V) or ``ignore_index``. A target outside
            yields a NaN loss and NaN gradients.
        bias: (V,).
        ignore_index: target value whose rows add nothing to loss, gradient or count.
        reduction: "mean" (over the summed row weights of rows not ignored), "sum" or "none".
        label_smoothing: ε in [0, 1], the share of the target spread evenly over all classes.
        z_loss: z ≥ 0, adds z·lse² to each row, weighted like the row.
        softcap: s > 0, replaces a logit l by s·tanh(l/s); None for no cap.
        class_weight: (V,), multiplies a row by the weight of its target. Gets no gradient.
        token_weight: shape of ``targets``, multiplies a row. Gets no gradient.
        return_lse: also return the log of the sum of exponentials.
        return_accuracy: also return how often the first largest logit is the target.
        max_chunk_mib: memory for the logits of one chunk, in MiB; None for 1024 on a GPU (fewer,
            larger products are faster there) and 112 on a CPU.

    Returns:
        As `cross_entropy`.

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: targets that are not integers, or operands that are not floating point.

    Numerics: softmax and loss in fp32 from logits in the products' dtype; dlogits rounded once to
        that dtype; the weight gradient accumulated over chunks in fp32 and rounded once to
        ``weight.dtype``. A mean over no rows is 0 with zero gradients. Only the inputs that
        require a gradient have one computed, and in evaluation none. Deterministic. Differentiable
        once.

    Memory: logits of one chunk (twice in half precision on a CPU), and the gradients. On a CPU up
        to 2²⁰ logits in fp32 or fp64 are kept for backward, unless ``max_chunk_mib`` is given.
    """
    name = "linear_cross_entropy"
    _check_shapes(hidden, weight, bias)
    check_targets(name, targets, hidden.shape[:-1], hidden.device)
    check_options(
        name, reduction, label_smoothing, z_loss, softcap, class_weight, token_weight,
        weight.shape[0], targets.shape,
    )  # fmt: skip
    if max_chunk_mib is not None and not max_chunk_mib > 0:
        raise ValueError(f"{name}: max_chunk_mib must be positive, got {max_chunk_mib}.")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    flat_targets = targets.reshape(-1).contiguous()
    flat_weight = None if token_weight is None else token_weight.reshape(-1)
    scale = None
    if reduction == "mean":
        dtype = accumulation_dtype(hidden.dtype)
        scale = mean_scale(flat_targets, ignore_index, class_weight, flat_weight, dtype)
    x = hidden.reshape(-1, hidden.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    reduce = reduction != "none"
    if _is_small(hidden, weight, max_chunk_mib):
        if torch.compiler.is_compiling():  # which fuses what is between the products
            return linear_cross_entropy_reference(
                hidden, weight, targets, bias=bias, ignore_index=ignore_index, reduction=reduction,
                label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
                class_weight=class_weight, token_weight=token_weight, return_lse=return_lse,
                return_accuracy=return_accuracy,
            )  # fmt: skip
        ours = z_loss or softcap or token_weight is not None or return_lse or return_accuracy
        terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap or 0.0, class_weight)
        ours = ours or is_traced(x) or fits(x, weight, bias, terms)
        if not ours and _all_in_range(flat_targets, weight.shape[0]):
            loss = F.cross_entropy(
                F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)),
                flat_targets.long(),
                None if class_weight is None else class_weight.to(x.dtype),
                ignore_index=ignore_index,
                reduction="sum" if reduce else "none",
                label_smoothing=label_smoothing,
            )
            loss = loss if scale is None else loss * scale
            return loss if reduce else loss.reshape(targets.shape)
    now = torch.is_grad_enabled() and reduce
    op: Callable[..., tuple[Tensor, ...]] = _forward if is_traced(x) else _Eager.apply
    loss, lse, correct, *_ = op(
        x, weight, bias, flat_targets, class_weight, flat_weight, scale, ignore_index,
        label_smoothing, z_loss, 0.0 if softcap is None else softcap,
        None if max_chunk_mib is None else float(max_chunk_mib), reduce,
        now and hidden.requires_grad, now and weight.requires_grad,
        now and bias is not None and bias.requires_grad,
        return_accuracy,
    )  # fmt: skip
    return finish(
        loss, lse, correct, targets,
        reduction=reduction, ignore_index=ignore_index,
        return_lse=return_lse, return_accuracy=return_accuracy,
    )  # fmt: skip
