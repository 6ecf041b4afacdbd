"""Cross-entropy of logits, its gradient computed while the logits are read.

For a row x (after an optional cap s·tanh(x/s)) with target t, r = token_weight·class_weight[t],
label smoothing ε and W = Σ class_weight (V without class weights):

    lse  = log Σ_c exp(x_c)
    loss = r·((1−ε)·(lse − x_t) + z·lse²) + token_weight·(ε/V)·(W·lse − Σ_c w_c·x_c)
    dx_c = p_c·(r·(1−ε + 2·z·lse) + token_weight·(ε/V)·W) − token_weight·(ε/V)·w_c − r·(1−ε)·[c = t]

Bytes moved for a bf16 logit: 4, loss and gradient together (one read, one write), bound by memory.
Backward costs nothing when the incoming gradient is 1: the kernel looks at it on the device, and
only otherwise computes the gradient again from the logits (4 more bytes, and rounded only once).
With ``reduction="none"``, for fp16 (whose range a gradient divided by N leaves) and under
`torch.compile` (which must not see buffers reused) the gradient is computed in backward: 6 bytes.

Softmax, loss and gradient are computed in fp32 (fp64 for fp64 logits), the gradient rounded once.
Every sum has a fixed order: reruns agree bit for bit. No host sync on a GPU.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); z-loss, Chowdhery et al. 2022
(arXiv:2204.02311); label smoothing, Szegedy et al. 2015 (arXiv:1512.00567); logit capping, Gemma 2
(arXiv:2408.00118).

Legend: N rows (tokens), V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from ._cross_entropy_compute import compute_cross_entropy, empty_grad
from .cpu.cross_entropy import LossTerms
from ._cross_entropy_options import (
    accumulation_dtype,
    check_options,
    check_targets,
    finish,
    mean_scale,
)
from ._scale import scale_unless_one_

__all__ = ["cross_entropy", "cross_entropy_reference"]

# The ops' namespace is the package's name: a vendored copy does not clash with the original.
_NAMESPACE = (__package__ or "fasttrain_kernels").replace(".", "_")


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    inplace: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute what `cross_entropy` computes, in plain differentiable torch."""
    n_cols = logits.shape[-1]
    x = logits.reshape(-1, n_cols).to(accumulation_dtype(logits.dtype))
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    flat = targets.reshape(-1).long()
    valid = flat != ignore_index
    invalid = valid & ((flat < 0) | (flat >= n_cols))
    index = torch.where(valid & ~invalid, flat, torch.zeros_like(flat))
    lse = torch.logsumexp(x, dim=1)
    nll = lse - x.gather(1, index.unsqueeze(1)).squeeze(1)
    losses = (1 - label_smoothing) * nll + z_loss * lse.square()
    if class_weight is not None:
        losses = losses * class_weight.to(x.dtype)[index]
    if label_smoothing:
        if class_weight is None:
            smooth = n_cols * lse - x.sum(dim=1)
        else:
            smooth = class_weight.to(x.dtype).sum() * lse - x @ class_weight.to(x.dtype)
        losses = losses + label_smoothing / n_cols * smooth
    if token_weight is not None:
        losses = losses * token_weight.reshape(-1).to(x.dtype)
    # A product, so that the gradient of an invalid row is NaN too.
    losses = losses * torch.where(invalid, torch.full_like(losses, float("nan")), 1.0)
    losses = torch.where(valid, losses, torch.zeros_like(losses))
    loss = losses
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean":
        weight = None if token_weight is None else token_weight.reshape(-1).to(x.dtype)
        loss = loss * mean_scale(flat, ignore_index, class_weight, weight, x.dtype)
    return finish(
        loss,
        torch.where(valid, lse, torch.zeros_like(lse)).detach(),
        ((x.argmax(dim=1) == flat) & valid).to(x.dtype),
        targets,
        reduction=reduction,
        ignore_index=ignore_index,
        return_lse=return_lse,
        return_accuracy=return_accuracy,
    )


@torch.library.custom_op(f"{_NAMESPACE}::cross_entropy_forward", mutates_args=())
def _forward(
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduce: bool,
    want_grad: bool,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, class_weight)
    grad = empty_grad(logits) if want_grad else None
    losses, lse, correct = compute_cross_entropy(
        logits, targets, grad, terms, token_weight, scale, want_correct=want_correct
    )
    return losses.sum() if reduce else losses, lse, correct, _or_empty(grad, logits)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, reduce, want_grad, want_correct = args[0], *args[-3:]
    dtype, n_rows = accumulation_dtype(logits.dtype), logits.shape[0]
    return (
        logits.new_empty(() if reduce else (n_rows,), dtype=dtype),
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty(n_rows if want_correct else 0, dtype=dtype),
        _or_empty(empty_grad(logits) if want_grad else None, logits),
    )


@torch.library.custom_op(f"{_NAMESPACE}::cross_entropy_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, class_weight)
    grad = empty_grad(logits)
    compute_cross_entropy(
        logits, targets, grad, terms, token_weight, scale, lse=lse, upstream=upstream
    )
    return grad


@_backward.register_fake
def _(*args: Any) -> Tensor:
    return empty_grad(args[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, class_weight, token_weight, scale, *options = inputs
    _, lse, correct, grad = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, correct, grad)
    ctx.save_for_backward(logits, targets, lse, class_weight, token_weight, scale)
    ctx.options = options[:4]
    # Kept outside the saved tensors: backward hands it out, and may write to it, once.
    ctx.grad = grad if options[5] else None


def _backward_formula(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    unused = (None,) * 11
    if upstream is None:
        return (None, *unused)
    logits, targets, lse, class_weight, token_weight, scale = ctx.saved_tensors
    grad, ctx.grad = ctx.grad, None
    # Computed here where it was not in forward, where it was handed out before (a retained graph),
    # and where a graph is traced, which must not write to buffers of another op.
    if grad is None or type(upstream) is not Tensor:
        grad = _backward(
            upstream, logits, targets, lse, class_weight, token_weight, scale, *ctx.options
        )
    else:
        _rescale_(grad, upstream, logits, targets, lse, class_weight, token_weight, scale,
                  *ctx.options)  # fmt: skip
    return (grad, *unused)


@torch.library.custom_op(f"{_NAMESPACE}::cross_entropy_rescale_", mutates_args=("grad",))
def _rescale_(
    grad: Tensor,
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Make ``grad``, computed for an incoming gradient of 1, that for ``upstream``."""
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, class_weight)
    compute_cross_entropy(
        logits, targets, grad, terms, token_weight, scale,
        lse=lse, upstream=upstream, skip_unit=True,
    )  # fmt: skip


@_rescale_.register_fake
def _(*_args: Any) -> None:
    return None


_forward.register_autograd(_backward_formula, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """The same, with the gradient written over the logits. Eager only: see `cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        terms: LossTerms,
        token_weight: Tensor | None,
        scale: Tensor | None,
        reduce: bool,
        want_correct: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.in_forward = reduce and logits.dtype != torch.float16
        losses, lse, correct = compute_cross_entropy(
            logits, targets, logits.detach() if ctx.in_forward else None, terms, token_weight,
            scale, want_correct=want_correct,
        )  # fmt: skip
        if ctx.in_forward:
            # Whoever else saved these logits for backward must hear that they are gone.
            torch.autograd.graph.increment_version(logits)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, correct)
        ctx.tensors = (logits.detach(), targets, lse, token_weight, scale)
        ctx.terms = terms
        return losses.sum() if reduce else losses, lse, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        if upstream is None:
            return (None,) * 7
        if ctx.tensors is None:
            raise RuntimeError(
                "cross_entropy: inplace=True keeps one gradient, in the memory of the logits, and "
                "it was handed out already; use inplace=False to run backward more than once."
            )
        (grad, targets, lse, token_weight, scale), ctx.tensors = ctx.tensors, None
        if ctx.in_forward:
            scale_unless_one_(grad, upstream)
        else:
            compute_cross_entropy(
                grad, targets, grad, ctx.terms, token_weight, scale, lse=lse, upstream=upstream
            )
        return (grad, *(None,) * 6)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    inplace: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross-entropy of logits and class indices, and its gradient in the same pass.

    Options mean what they mean in `torch.nn.functional.cross_entropy` where that has them.

    Args:
        logits: (N, V) or (..., V); fp32, bf16, fp16 or fp64. V is the last dimension.
        targets: (N,) or (...), int64 or int32, in [0, V) or ``ignore_index``. A target outside
            yields a NaN loss and a NaN gradient for its row.
        ignore_index: target value whose rows add nothing to loss, gradient or count.
        reduction: "mean" (over the summed row weights of rows not ignored), "sum" or "none".
        label_smoothing: ε in [0, 1], the share of the target spread evenly over all classes.
        z_loss: z ≥ 0, adds z·lse² to each row, weighted like the row.
        softcap: s > 0, replaces a logit l by s·tanh(l/s); None for no cap.
        class_weight: (V,), multiplies a row by the weight of its target. Gets no gradient.
        token_weight: shape of ``targets``, multiplies a row. Gets no gradient.
        inplace: permits the gradient to overwrite the logits, which then must not be used again,
            nor backward be run twice. Used where it can be: contiguous logits, outside
            `torch.compile`.
        return_lse: also return the log of the sum of exponentials.
        return_accuracy: also return how often the first largest logit is the target.

    Returns:
        The loss in fp32 (fp64 for fp64 logits): a scalar, or in the shape of ``targets`` for
        "none". With ``return_lse`` then lse (shape of ``targets``, 0 where ignored), with
        ``return_accuracy`` then the accuracy: hits per target for "none", their number for "sum",
        their share of the targets not ignored for "mean". Neither has a gradient.

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: targets that are not integers.

    Numerics: fp32 throughout, gradient rounded once. If no row counts (all ignored, or weights that
        sum to zero) the mean is 0 with a zero gradient, where torch gives NaN. Deterministic.

    Memory: the logits and a gradient as large, from forward to backward; the gradient comes with
        backward for fp16 and under `torch.compile`, and takes the logits' place with ``inplace``.
        O(N) where no gradient is required.
    """
    name, n_cols = "cross_entropy", logits.shape[-1] if logits.dim() else 0
    check_targets(name, targets, logits.shape[:-1], logits.device)
    check_options(
        name, reduction, label_smoothing, z_loss, softcap, class_weight, token_weight, n_cols,
        targets.shape,
    )  # fmt: skip
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{name}: logits must be floating point, got {logits.dtype}.")
    flat_targets = targets.reshape(-1).contiguous()
    flat_weight = None if token_weight is None else token_weight.reshape(-1)
    scale = None
    if reduction == "mean":
        dtype = accumulation_dtype(logits.dtype)
        scale = mean_scale(flat_targets, ignore_index, class_weight, flat_weight, dtype)
    x = logits.reshape(-1, n_cols)
    reduce, needs_grad = reduction != "none", torch.is_grad_enabled() and logits.requires_grad
    compiling = torch.compiler.is_compiling()
    cap = 0.0 if softcap is None else softcap
    if inplace and needs_grad and not compiling and logits.is_contiguous():
        terms = LossTerms(ignore_index, label_smoothing, z_loss, cap, class_weight)
        loss, lse, correct = _InPlace.apply(  # type: ignore[no-untyped-call]
            x, flat_targets, terms, flat_weight, scale, reduce, return_accuracy
        )
    else:
        if n_cols > 1 and x.stride(1) != 1:
            x = x.contiguous()
        want_grad = needs_grad and reduce and not compiling and x.dtype != torch.float16
        loss, lse, correct, _ = _forward(
            x, flat_targets, class_weight, flat_weight, scale, ignore_index, label_smoothing,
            z_loss, cap, reduce, want_grad, return_accuracy,
        )  # fmt: skip
    return finish(
        loss, lse, correct, targets,
        reduction=reduction, ignore_index=ignore_index,
        return_lse=return_lse, return_accuracy=return_accuracy,
    )  # fmt: skip
