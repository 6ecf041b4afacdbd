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

Every sum has a fixed order: reruns agree bit for bit. No host sync on a GPU.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); z-loss, Chowdhery et al. 2022
(arXiv:2204.02311); label smoothing, Szegedy et al. 2015 (arXiv:1512.00567); logit capping, Gemma 2
(arXiv:2408.00118).

Legend: N rows (tokens), V vocabulary.
"""

from functools import reduce
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from ._cross_entropy_cpu import cross_entropy_rows, read_targets
from ._cross_entropy_kernels import cross_entropy_kernel
from ._dispatch import (
    define_op,
    gradients_of,
    is_abstract,
    is_traced,
    is_transformed,
    pull_back,
    use_triton,
)
from ._launch import scale_unless_one_
from ._loss_options import (
    REMEDIES,
    SCHEMA,
    Keywords,
    LossOptions,
    Reduction,
    accumulation_dtype,
    class_weight_of,
    finish,
    mean_scale,
    resolve,
)
from ._spelling import require_tensors, tell_apart
from ._triton import triton

# The most bytes of a row that is kept in registers: 16 to 32 logits a thread, with options, which
# need registers too, half as many.
SINGLE_PASS_BYTES = 32 * 1024
SINGLE_PASS_BYTES_LEAST = 16 * 1024
# Wider rows go through twice, in blocks of 16 logits a thread, 8 with options. The second pass
# finds the row in L2 if what the rows in flight still need of it fits there, half of each on
# average. So rows above this size are given 256 threads with 32 logits each: two or three programs
# an SM, not three or four (bf16: 132 rows of 256 KiB are 34 MB; an H100 has 50).
WIDE_ROW_BYTES = 128 * 1024
# Logits of a block of rows on a CPU, small enough to be in cache still when the passes after the
# softmax come.
_CPU_BLOCK_BYTES = 2**20
_CALL = "cross_entropy(logits, targets, weight, reduction=…)"


class CrossEntropyKeywords(Keywords, total=False):
    """Those of `cross_entropy` that do not change the type of its result."""

    inplace: bool


@overload
def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_accuracy: Literal[False] = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor: ...
@overload
def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: Literal[True],
    return_accuracy: bool = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: bool = ...,
    return_accuracy: Literal[True],
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: bool = ...,
    return_accuracy: bool = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor | tuple[Tensor, ...]: ...
def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    scale: Tensor | None = None,
    inplace: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute what `cross_entropy` computes, in plain differentiable torch."""
    class_weight = class_weight_of("cross_entropy_reference", weight, class_weight)
    n_cols = logits.shape[-1]
    x = logits.reshape(-1, n_cols).to(accumulation_dtype(logits.dtype))
    flat = targets.reshape(-1).long()
    valid = flat != ignore_index
    # An ignored row's gradient is 0, where 0 · NaN would be NaN.
    x = x.masked_fill(~valid.unsqueeze(1), 0.0)
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    invalid = valid & ((flat < 0) | (flat >= n_cols))
    index = torch.where(valid & ~invalid, flat, torch.zeros_like(flat))
    lse = torch.logsumexp(x, dim=1)
    nll = lse - x.gather(1, index.unsqueeze(1)).squeeze(1)
    losses = (1 - label_smoothing) * nll
    if z_loss:
        losses = losses + z_loss * lse.square()
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
    # A product, so that the gradient of an invalid row is NaN too, and, as in torch, that of one
    # with a logit of +inf.
    invalid = invalid | (lse == float("inf"))
    losses = losses * torch.where(invalid, torch.full_like(losses, float("nan")), 1.0)
    losses = torch.where(valid, losses, torch.zeros_like(losses))
    loss = losses
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean":
        weight = None if token_weight is None else token_weight.reshape(-1).to(x.dtype)
        loss = loss * mean_scale(flat, ignore_index, class_weight, weight, x.dtype)
    if scale is not None:
        loss = loss * scale.to(x.dtype)
    lse = torch.where(valid, lse, torch.zeros_like(lse)).detach()
    correct = ((x.argmax(dim=1) == flat) & valid).to(x.dtype)
    results = loss, lse, correct
    return finish(results, targets, reduction, ignore_index, return_lse, return_accuracy)


def empty_grad(logits: Tensor) -> Tensor:
    """Allocate a gradient whose rows are misaligned by as many bytes as the rows of ``logits``."""
    n_rows, n_cols = logits.shape
    align = 16 // logits.element_size()
    stride = n_cols + (logits.stride(0) - n_cols) % align
    return logits.new_empty((n_rows, stride))[:, :n_cols]


def have_like_rows(grad: Tensor, logits: Tensor) -> bool:
    """Return whether the kernel can write a gradient of ``logits`` to the rows of ``grad``."""
    align = 16 // logits.element_size()
    is_contiguous = grad.stride(1) == 1 or grad.shape[1] == 1
    return is_contiguous and (grad.stride(0) - logits.stride(0)) % align == 0


def _configuration(
    logits: Tensor, has_edges: bool, has_options: bool
) -> tuple[bool, int, int, int]:
    """Return whether one pass is enough, the logits of a block and of the rest, and the warps."""
    n_cols, size = logits.shape[1], logits.element_size()
    if n_cols * size <= (SINGLE_PASS_BYTES_LEAST if has_options else SINGLE_PASS_BYTES):
        rest = max(16, triton.next_power_of_2(n_cols))
        return True, rest, rest, max(1, min(rest // 512, 16))
    block = 4096 if has_options else 8192
    # The interior of a row with edges may lack up to 2·15 bytes, and a block with them.
    align = 16 // size
    least, most = n_cols - (align - 1 if has_edges else 0), n_cols
    least, most = (n // align * align - 1 for n in (least, most))
    rest = block if least // block != most // block else triton.next_power_of_2(most % block + 1)
    warps = 16 if has_options or size > 2 or n_cols * size <= WIDE_ROW_BYTES else 8
    return False, block, max(16, rest), warps


def launch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    grad: Tensor | None,
    lse: Tensor,
    options: LossOptions,
    *,
    losses: Tensor | None = None,
    correct: Tensor | None = None,
    class_weight_sum: Tensor | None = None,
    upstream: Tensor | None = None,
    skip_unit: bool = False,
) -> None:
    """Launch one program for each row of ``logits``, (N, V), whose rows are contiguous.

    ``losses``, ``correct`` and ``grad`` are written where they are given; ``lse`` is written
    together with ``losses``, else read. ``grad`` may be ``logits``; its row stride and theirs must
    leave the same remainder modulo 16 bytes. ``upstream``, (N,) or () with any stride, multiplies
    the gradient; with ``skip_unit`` rows where it is 1 are left alone: theirs is there already.
    Class weights need their sum.
    """
    class_weight, token_weight, scale, ignore_index, label_smoothing, z_loss, softcap = options
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    align = 16 // logits.element_size()
    has_edges = n_cols % align != 0 or logits.stride(0) % align != 0
    has_options = (
        class_weight is not None or correct is not None or label_smoothing != 0.0 or softcap != 0.0
    )
    single, block, rest, num_warps = _configuration(logits, has_edges, has_options)
    out = logits if grad is None else grad
    per_row = 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)

    def given(x: Tensor | None) -> Tensor:
        return lse if x is None else x  # any pointer: it is not read

    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(n_rows,)](
            logits,
            out,
            targets,
            given(losses),
            lse,
            given(correct),
            given(class_weight),
            given(class_weight_sum),
            given(token_weight),
            given(scale),
            given(upstream),
            n_cols,
            ignore_index,
            logits.stride(0),
            out.stride(0),
            0 if token_weight is None else token_weight.stride(0),
            per_row,
            label_smoothing,
            z_loss,
            softcap,
            BLOCK_N=block,
            REST=rest,
            ALIGN=align,
            SINGLE_PASS=single,
            HAS_EDGES=has_edges,
            COMPUTE_LOSS=losses is not None,
            WRITE_GRAD=grad is not None,
            SKIP_UNIT=skip_unit,
            HAS_UPSTREAM=upstream is not None,
            HAS_SCALE=scale is not None,
            HAS_CLASS_WEIGHT=class_weight is not None,
            HAS_TOKEN_WEIGHT=token_weight is not None,
            HAS_SMOOTHING=label_smoothing != 0.0,
            HAS_Z_LOSS=z_loss != 0.0,
            HAS_SOFTCAP=softcap != 0.0,
            HAS_CORRECT=correct is not None,
            num_warps=num_warps,
        )


def compute_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    grad: Tensor | None,
    options: LossOptions,
    *,
    lse: Tensor | None = None,
    upstream: Tensor | None = None,
    skip_unit: bool = False,
    want_correct: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, lse and hits of all rows (only those asked for), and fill ``grad``."""
    dtype = accumulation_dtype(logits.dtype)
    n_rows, n_cols = logits.shape
    want_losses = lse is None
    losses = logits.new_empty(n_rows if want_losses else 0, dtype=dtype)
    correct = logits.new_empty(n_rows if want_correct else 0, dtype=dtype)
    lse = logits.new_empty(n_rows, dtype=dtype) if lse is None else lse
    if use_triton(logits) and logits.dtype != torch.float64:
        class_weight = options.class_weight
        launch_cross_entropy(
            logits,
            targets,
            grad,
            lse,
            options,
            losses=losses if want_losses else None,
            correct=correct if want_correct else None,
            class_weight_sum=None if class_weight is None else class_weight.float().sum(),
            upstream=upstream,
            skip_unit=skip_unit,
        )
        return losses, lse, correct

    if skip_unit and grad is not None and upstream is not None:
        if bool((upstream == 1).all()):
            return losses, lse, correct
        if grad.dtype == dtype:
            grad.mul_(upstream)
            return losses, lse, correct
    options, scale = options.to(dtype), options.scale
    read = read_targets(
        "cross_entropy", targets, n_cols, options.ignore_index, strict=not use_triton(logits)
    )
    block = max(1, min(n_rows, _CPU_BLOCK_BYTES // (n_cols * dtype.itemsize)))
    direct = grad if grad is not None and grad.dtype == dtype else None
    scratch = logits.new_empty((block if direct is None else 0, n_cols), dtype=dtype)
    for start in range(0, n_rows, block):
        rows = slice(start, min(start + block, n_rows))
        x = logits[rows]
        out = scratch[: x.shape[0]] if direct is None else direct[rows]
        # An in-place gradient would leave nothing to compute an underflowing row from.
        source = x.clone() if out.data_ptr() == x.data_ptr() else x
        result = cross_entropy_rows(
            source,
            read.of(rows),
            out,
            options.of(rows),
            want_grad=grad is not None,
            want_correct=want_correct,
            logits_of=source.__getitem__,
        )
        if want_losses:
            losses[rows], lse[rows] = result.losses, result.lse
        if want_correct:
            correct[rows] = result.correct
        if grad is None:
            continue
        part = upstream[rows] if upstream is not None and upstream.dim() else upstream
        if factors := [f for f in (result.factor, part, scale) if f is not None]:
            factor = reduce(torch.mul, factors)
            out.mul_(factor.unsqueeze(1) if factor.dim() else factor)
        if read.ignored is not None:
            out[read.ignored[rows]] = 0.0
        if direct is None:
            grad[rows] = out
    if want_losses and scale is not None:
        losses.mul_(scale)
    return losses, lse, correct


class _Inputs(NamedTuple):
    """The inputs of the op in the order of its schema, where each option is an argument."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    class_weight: Tensor | None  # (V,)
    token_weight: Tensor | None  # (N,)
    scale: Tensor | None  # ()
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduce: bool
    want_grad: bool
    want_correct: bool


class _BackwardInputs(NamedTuple):
    """The inputs of the op that computes the gradient again."""

    upstream: Tensor  # (N,) or ()
    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    lse: Tensor  # (N,)
    class_weight: Tensor | None  # (V,)
    token_weight: Tensor | None  # (N,)
    scale: Tensor | None  # ()
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


class _Saved(NamedTuple):
    """What forward saves for backward as tensors."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    lse: Tensor  # (N,)
    class_weight: Tensor | None
    token_weight: Tensor | None
    scale: Tensor | None
    grad: Tensor | None  # (N, V), for an incoming gradient of 1; None: not computed yet


def _compute(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    grad = empty_grad(inputs.logits) if inputs.want_grad else None
    losses, lse, correct = compute_cross_entropy(
        inputs.logits,
        inputs.targets,
        grad,
        LossOptions.among(inputs),
        want_correct=inputs.want_correct,
    )
    loss = losses.sum() if inputs.reduce else losses
    return loss, lse, correct, _or_empty(grad, inputs.logits)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _allocate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _Inputs(*arguments)
    logits = inputs.logits
    dtype, n_rows = accumulation_dtype(logits.dtype), logits.shape[0]
    return (
        logits.new_empty(() if inputs.reduce else (n_rows,), dtype=dtype),
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty(n_rows if inputs.want_correct else 0, dtype=dtype),
        _or_empty(empty_grad(logits) if inputs.want_grad else None, logits),
    )


def _differentiate(*arguments: Any) -> Tensor:
    inputs = _BackwardInputs(*arguments)
    grad = empty_grad(inputs.logits)
    compute_cross_entropy(
        inputs.logits,
        inputs.targets,
        grad,
        LossOptions.among(inputs),
        lse=inputs.lse,
        upstream=inputs.upstream,
    )
    return grad


_backward = define_op(
    "cross_entropy_backward",
    _differentiate,
    lambda *arguments: empty_grad(_BackwardInputs(*arguments).logits),
    schema=f"(Tensor upstream, Tensor logits, Tensor targets, Tensor lse, {SCHEMA}) -> Tensor",
)


def composed_loss(logits: Tensor, targets: Tensor, options: LossOptions, *, reduce: bool) -> Tensor:
    """Return the op's first output in plain torch: the losses of all rows, or their sum."""
    class_weight, token_weight, scale, ignore_index, label_smoothing, z_loss, softcap = options
    loss = cross_entropy_reference(
        logits,
        targets,
        ignore_index=ignore_index,
        reduction="sum" if reduce else "none",
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap or None,
        class_weight=class_weight,
        token_weight=token_weight,
    )
    return loss if scale is None else loss * scale


def _pull_back(upstream: Tensor, logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    def compute(x: Tensor) -> Tensor:
        return composed_loss(x, targets, options, reduce=upstream.dim() == 0)

    return pull_back(compute, (logits,), upstream)[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    named = _Inputs(*inputs)
    _, lse, correct, grad = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, correct, grad)
    options = LossOptions.among(named)
    tensors = options.tensors()
    kept = grad if named.want_grad else None
    ctx.save_for_backward(*_Saved(named.logits, named.targets, lse, *tensors, kept))
    ctx.numbers = options.without_tensors()
    ctx.is_spent = False  # backward hands the gradient out, and may write to it, once


def _backward_formula(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return gradients_of(_Inputs)
    saved = _Saved(*ctx.saved_tensors)
    logits, grad = saved.logits, saved.grad
    options = ctx.numbers.with_tensors(saved)
    if is_transformed(upstream):
        pulled = _pull_back(upstream, logits, saved.targets, options)
        return gradients_of(_Inputs, logits=pulled)
    # Computed here where it was not in forward, where it was handed out before (a retained graph),
    # where a graph is traced, which must not write to buffers of another op, and where hooks for
    # saved tensors have given it rows that the kernel cannot take beside those of the logits.
    is_here = grad is not None and not ctx.is_spent and not is_abstract(upstream)
    if grad is None or not (is_here and have_like_rows(grad, logits)):
        again = _backward(upstream, logits, saved.targets, saved.lse, *options)
        return gradients_of(_Inputs, logits=again)
    ctx.is_spent = True
    # An alias, whose version is its own: a retained graph unpacks the saved tensor once more. And
    # autograd keeps it as a leaf's gradient, where it would copy what something else refers to.
    grad = grad.data
    compute_cross_entropy(
        logits, saved.targets, grad, options, lse=saved.lse, upstream=upstream, skip_unit=True
    )
    return gradients_of(_Inputs, logits=grad)


_forward = define_op(
    "cross_entropy_forward",
    _compute,
    _allocate,
    _setup_context,
    _backward_formula,
    schema=f"(Tensor logits, Tensor targets, {SCHEMA}, bool reduce, bool want_grad, "
    "bool want_correct) -> (Tensor, Tensor, Tensor, Tensor)",
)


class _InPlaceInputs(NamedTuple):
    """The inputs of `_InPlace`, which is no op and takes the options as one value."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    options: LossOptions
    reduce: bool
    want_correct: bool


class _InPlace(torch.autograd.Function):
    """The same, with the gradient written over the logits. Eager only: see `cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = _InPlaceInputs(*arguments)
        logits, options = inputs.logits, inputs.options
        ctx.in_forward = inputs.reduce and logits.dtype != torch.float16
        grad = logits.detach() if ctx.in_forward else None
        losses, lse, correct = compute_cross_entropy(
            logits, inputs.targets, grad, options, want_correct=inputs.want_correct
        )
        if ctx.in_forward:
            # Autograd then refuses other backwards that saved these logits.
            torch.autograd.graph.increment_version(logits)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, correct)
        saved = _Saved(logits, inputs.targets, lse, *options.tensors(), grad=None)
        ctx.save_for_backward(*saved)
        ctx.numbers = options.without_tensors()
        ctx.is_spent = False
        return losses.sum() if inputs.reduce else losses, lse, correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return gradients_of(_InPlaceInputs)
        if ctx.is_spent:
            raise RuntimeError(
                "cross_entropy: inplace=True keeps one gradient, in the memory of the logits, and "
                "it was handed out already; use inplace=False to run backward more than once."
            )
        saved = _Saved(*ctx.saved_tensors)
        logits = saved.logits
        options = ctx.numbers.with_tensors(saved)
        if is_transformed(upstream):
            if ctx.in_forward:
                return gradients_of(_InPlaceInputs, logits=logits.data * upstream)
            pulled = _pull_back(upstream, logits, saved.targets, options)
            return gradients_of(_InPlaceInputs, logits=pulled)
        ctx.is_spent = True
        grad = logits.data
        if ctx.in_forward:
            scale_unless_one_(grad, upstream)
        else:
            compute_cross_entropy(
                grad, saved.targets, grad, options, lse=saved.lse, upstream=upstream
            )
            torch.autograd.graph.increment_version(logits)
        return gradients_of(_InPlaceInputs, logits=grad)


@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    return_accuracy: Literal[False] = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: Literal[True],
    return_accuracy: bool = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: bool = ...,
    return_accuracy: Literal[True],
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = ...,
    *,
    return_lse: bool = ...,
    return_accuracy: bool = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor | tuple[Tensor, ...]: ...
@tell_apart(_CALL, **REMEDIES, input="it is named logits")
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    scale: Tensor | None = None,
    inplace: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross-entropy of logits and class indices, and its gradient in the same pass.

    Options mean what they mean in `torch.nn.functional.cross_entropy` where that has them. Classes
    are the last dimension here, and targets are their indices alone.

    Args:
        logits: (N, V) or (..., V); fp32, bf16, fp16 or fp64. V is the last dimension.
        targets: (N,) or (...), int64 or int32, in [0, V) or ``ignore_index``. A target outside
            is an IndexError on a CPU; on a GPU, which does not wait for the host, it yields a NaN
            loss and a NaN gradient for its row.
        weight: torch's name for ``class_weight``.
        ignore_index: target value whose rows add nothing to loss, gradient or count, whatever they
            hold.
        reduction: "mean" (over the summed row weights of rows not ignored), "sum" or "none".
        label_smoothing: ε in [0, 1], the share of the target spread evenly over all classes.
        z_loss: z ≥ 0, adds z·lse² to each row, weighted like the row.
        softcap: s > 0, replaces a logit l by s·tanh(l/s); None for no cap.
        class_weight: (V,), multiplies a row by the weight of its target. Gets no gradient.
        token_weight: shape of ``targets``, multiplies a row. Gets no gradient.
        scale: a scalar tensor on the device that multiplies the loss and, at no cost, the gradient.
            A step of several micro-batches passes "sum" and one over its number of targets. Gets
            no gradient. None: 1.
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
        IndexError: a target out of range, on a CPU.
        TypeError: targets that are not integers, or an argument that other libraries have.

    Numerics: fp32 throughout, gradient rounded once. If no row counts (all ignored, or weights that
        sum to zero) the mean is 0 with a zero gradient, where torch gives NaN. A row depends on
        itself alone: NaN and ±inf do what they do in torch, and in their row only. Deterministic.
        Differentiable once. Under transforms of torch.func it is `cross_entropy_reference`,
        differentiable any number of times.

    Memory: the logits and a gradient as large, from forward to backward; the gradient comes with
        backward for fp16 and under `torch.compile`, and takes the logits' place with ``inplace``.
        Both are saved tensors: activation checkpointing frees them, and hooks can offload them.
        O(N) where no gradient is required.
    """
    name = "cross_entropy"
    class_weight = class_weight_of(name, weight, class_weight)
    require_tensors(
        _CALL,
        logits=logits,
        targets=targets,
        class_weight=class_weight,
        token_weight=token_weight,
        scale=scale,
    )
    n_cols = logits.shape[-1] if logits.dim() else 0
    if logits.dim() > 2 and targets.shape != logits.shape[:-1]:
        n_rows, n_classes, *others = logits.shape
        if targets.shape == (n_rows, *others):
            raise ValueError(
                f"{name}: logits {tuple(logits.shape)} have their {n_classes} classes in dimension "
                "1, as torch's (N, C, d1, …); here they are the last: pass logits.movedim(1, -1)."
            )
    given = LossOptions(class_weight, token_weight, scale, ignore_index, label_smoothing, z_loss)
    flat_targets, options = resolve(name, logits, n_cols, targets, reduction, given, softcap)
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{name}: logits must be floating point, got {logits.dtype}.")
    if is_transformed():
        return cross_entropy_reference(
            logits,
            targets,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            class_weight=class_weight,
            token_weight=token_weight,
            scale=scale,
            return_lse=return_lse,
            return_accuracy=return_accuracy,
        )
    x = logits.reshape(-1, n_cols)
    reduce, needs_grad = reduction != "none", torch.is_grad_enabled() and logits.requires_grad
    compiling = torch.compiler.is_compiling()
    if inplace and needs_grad and not is_traced(x) and logits.is_contiguous():
        results = _InPlace.apply(x, flat_targets, options, reduce, return_accuracy)
    else:
        if n_cols > 1 and x.stride(1) != 1:
            x = x.contiguous()
        want_grad = needs_grad and reduce and not compiling and x.dtype != torch.float16
        results = _forward(x, flat_targets, *options, reduce, want_grad, return_accuracy)[:3]
    return finish(results, targets, reduction, ignore_index, return_lse, return_accuracy)
