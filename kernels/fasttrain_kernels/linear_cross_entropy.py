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
and many in C++, where `cpu.linear_cross_entropy.fits`.

Sources: chunked loss, Liger Kernel (arXiv:2410.10989); Cut Cross-Entropy (arXiv:2411.09009).

Legend: B batch, T sequence, N = B·T rows, D dim, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cross_entropy_cpu import cross_entropy_rows, read_targets
from ._dispatch import (
    autocasts,
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
    finish,
    resolve,
)
from ._spelling import require_tensors, tell_apart
from .cpu.linear_cross_entropy import fits, run_in_cpp
from .cross_entropy import composed_loss, cross_entropy_reference, launch_cross_entropy

# A CPU computes up to so many logits (4 MiB in fp32) at once: the overhead of chunks, 0.3 ms, is a
# third of the total at N=768, D=128, V=96. With more logits chunks are faster.
_AT_ONCE = 2**20
# Rows of a chunk. On a CPU products gain little above 512 rows (N=4096, D=256, V=4096, two Milan
# cores: 64 rows 277 ms, 256 208 ms, 512 183 ms, 1024 179 ms); on a GPU small chunks are bound by
# launches, so a chunk is as large as the budget allows.
_MAX_ROWS = {"cpu": 1024, "cuda": 8192}
# Default budget for the logits of one chunk. CPU: 512 rows and more at V=50304 in fp32. GPU: one
# chunk of 4096 rows at V=128256 in bf16.
_DEFAULT_MIB = {"cpu": 112, "cuda": 1024}
# The CPU's product with a transposed weight is 4 to 7 % faster in strips of so many columns, 6 MiB
# of weight at D=768 (V=50304, 256 to 1024 rows, two Milan cores: 163 against 156 GFLOP/s).
_STRIP_COLS = 2048
_CALL = "linear_cross_entropy(hidden, layer.weight, targets, bias=layer.bias)"


class LinearKeywords(Keywords, total=False):
    """Those of `linear_cross_entropy` that do not change the type of its result."""

    bias: Tensor | None
    max_chunk_mib: float | None
    unit_gradient: bool


@overload
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_accuracy: Literal[False] = ...,
    **options: Unpack[LinearKeywords],
) -> Tensor: ...
@overload
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: Literal[True],
    return_accuracy: bool = ...,
    **options: Unpack[LinearKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: bool = ...,
    return_accuracy: Literal[True],
    **options: Unpack[LinearKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: bool = ...,
    return_accuracy: bool = ...,
    **options: Unpack[LinearKeywords],
) -> Tensor | tuple[Tensor, ...]: ...
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    max_chunk_mib: float | None = None,
    unit_gradient: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
    **options: Unpack[Keywords],
) -> Tensor | tuple[Tensor, ...]:
    """Compute what `linear_cross_entropy` computes, in plain differentiable torch."""
    cast = None if bias is None else bias.to(hidden.dtype)
    # An ignored row adds 0 to the weight's gradient, where 0 · NaN would be NaN.
    ignored = (targets == options.get("ignore_index", -100)).unsqueeze(-1)
    logits = F.linear(hidden.masked_fill(ignored, 0.0), weight.to(hidden.dtype), cast)
    return cross_entropy_reference(
        logits, targets, return_lse=return_lse, return_accuracy=return_accuracy, **options
    )


class Gradients(NamedTuple):
    """Gradients of the three inputs, each None where it is not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def chunk_rows(hidden: Tensor, n_cols: int, max_chunk_mib: float | None) -> int:
    """Return into how many rows a chunk is cut: even chunks, as few as the budget allows."""
    n_rows, device = hidden.shape[0], hidden.device.type
    budget = _DEFAULT_MIB.get(device, 1024) if max_chunk_mib is None else max_chunk_mib
    # A CPU holds a chunk in the dtype of the softmax, a GPU in that of the product.
    dtype = accumulation_dtype(hidden.dtype) if device == "cpu" else hidden.dtype
    most = int(budget * 2**20 / (n_cols * dtype.itemsize))
    most = max(1, min(most, _MAX_ROWS.get(device, 8192)))
    n_chunks = max(1, -(-n_rows // most))
    even = -(-n_rows // n_chunks)
    return max(1, min(most, -(-even // 16) * 16))


def weight_grad_dtype(hidden: Tensor, weight: Tensor, rows: int) -> torch.dtype:
    """Return the dtype in which forward leaves the weight gradient.

    It is accumulated in fp32, and rounded to a narrower weight's dtype by the multiplication in
    backward; only a single bf16 chunk needs no accumulator.
    """
    if hidden.dtype == weight.dtype == torch.bfloat16 and hidden.shape[0] <= rows:
        return torch.bfloat16
    return accumulation_dtype(hidden.dtype)


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write hidden·weightᵀ + bias to ``out``."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _accumulate(
    acc: Tensor, dlogits: Tensor, hidden: Tensor, first: bool, alpha: float = 1.0
) -> None:
    """Add α dlogitsᵀ·hidden to ``acc``, whose content is undefined the first time."""
    left = dlogits.t()
    if acc.dtype == hidden.dtype:
        acc.addmm_(left, hidden, beta=0 if first else 1, alpha=alpha)
    elif acc.is_cuda:
        if first:
            torch.mm(left, hidden, out_dtype=acc.dtype, out=acc)
        else:
            torch.addmm(acc, left, hidden, out_dtype=acc.dtype, out=acc)
    elif first:
        acc.copy_(left @ hidden)
    else:
        acc.add_(left @ hidden)


def compute_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    rows: int,
    want: tuple[bool, bool, bool],
    *,
    lse: Tensor | None = None,
    upstream: Tensor | None = None,
    want_correct: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Return losses, lse, hits (each (N,)) and the gradients that ``want`` names.

    A chunk has ``rows`` rows. With ``lse``, from an earlier forward, only gradients are computed;
    ``upstream``, (N,) or (), multiplies them.
    """
    device = hidden.device.type
    # Autocast would cast the operands of the products below once more, to a dtype of its own.
    autocast = autocasts(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        kernels = use_triton(hidden) and hidden.dtype != torch.float64
        n_rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
        grads = Gradients(
            torch.empty_like(hidden, memory_format=torch.contiguous_format) if want[0] else None,
            weight.new_empty(weight.shape, dtype=weight_grad_dtype(hidden, weight, rows))
            if want[1]
            else None,
            weight.new_zeros(weight.shape[0], dtype=dtype) if want[2] else None,
        )
        if n_rows == 0 and grads.weight is not None:
            grads.weight.zero_()
        exact = grads.weight is None or grads.weight.dtype == dtype
        results = None
        if not use_triton(hidden) and exact and fits(hidden, weight, bias, options):
            results = run_in_cpp(
                hidden, weight.float(), targets, options, rows, *grads[:2], upstream, want_correct
            )
        if results is None:
            weight_in = weight.to(hidden.dtype)
            bias_in = None if bias is None else bias.to(hidden.dtype)
            run = _on_kernels if kernels else _on_torch
            results = run(
                hidden,
                weight_in,
                bias_in,
                targets,
                options,
                rows,
                grads,
                lse,
                upstream,
                want_correct,
            )
        return *results, grads


def _on_kernels(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    rows: int,
    grads: Gradients,
    lse: Tensor | None,
    upstream: Tensor | None,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_cols = hidden.shape[0], weight.shape[0]
    new = hidden.new_empty
    want_losses = lse is None
    losses = new(n_rows if want_losses else 0, dtype=torch.float32)
    lse_out = new(n_rows, dtype=torch.float32) if lse is None else lse
    correct = new(n_rows if want_correct else 0, dtype=torch.float32)
    weight_sum = None if options.class_weight is None else options.class_weight.float().sum()
    # Rows start on 16-byte boundaries whatever V is, so that the kernel has no narrow accesses.
    align = 16 // hidden.element_size()
    buffer = new((min(rows, n_rows), -(-n_cols // align) * align))[:, :n_cols]
    any_grad = any(grad is not None for grad in grads)
    # In the product for the weight's gradient a row of zeros times NaN would be NaN: there ignored
    # hidden states are zeros too, in the memory of their gradient until that is computed.
    ignored = (targets == options.ignore_index).unsqueeze(1)
    zero = hidden.new_zeros(())
    needs_scratch = grads.hidden is None and grads.weight is not None
    scratch = new((min(rows, n_rows) if needs_scratch else 0, hidden.shape[1]))
    for start in range(0, n_rows, rows):
        part = slice(start, min(start + rows, n_rows))
        h = hidden[part]
        x = buffer[: h.shape[0]]
        _multiply(h, weight, bias, x)
        launch_cross_entropy(
            x,
            targets[part],
            x if any_grad else None,
            lse_out[part],
            options.of(part),
            losses=losses[part] if want_losses else None,
            correct=correct[part] if want_correct else None,
            class_weight_sum=weight_sum,
            upstream=upstream if upstream is None or upstream.dim() == 0 else upstream[part],
        )
        if grads.weight is not None:
            kept = scratch[: h.shape[0]] if grads.hidden is None else grads.hidden[part]
            torch.where(ignored[part], zero, h, out=kept)
            _accumulate(grads.weight, x, kept, start == 0)
        if grads.hidden is not None:
            torch.mm(x, weight, out=grads.hidden[part])
        if grads.bias is not None:
            grads.bias.add_(x.sum(dim=0, dtype=grads.bias.dtype))
    return losses, lse_out, correct


def _on_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    rows: int,
    grads: Gradients,
    lse: Tensor | None,
    upstream: Tensor | None,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (n_rows, n_cols), dtype = (hidden.shape[0], weight.shape[0]), accumulation_dtype(hidden.dtype)
    options, scale = options.to(dtype), options.scale
    # Rows whose target is ignored are dropped before the product: exact, and padding costs nothing.
    read = read_targets(
        "linear_cross_entropy", targets, n_cols, options.ignore_index, strict=not use_triton(hidden)
    )
    kept = None if read.ignored is None else (~read.ignored).nonzero().squeeze(1)
    read = read._replace(ignored=None)
    everything = kept is None
    n_kept = n_rows if kept is None else kept.shape[0]
    new = hidden.new_empty if everything else hidden.new_zeros
    losses, lse_out = new(n_rows, dtype=dtype), new(n_rows, dtype=dtype)
    correct = new(n_rows if want_correct else 0, dtype=dtype)
    if not everything and grads.hidden is not None:
        grads.hidden.zero_()
    if n_kept == 0 and grads.weight is not None:
        grads.weight.zero_()
    if upstream is not None and upstream.dim() == 0:
        scale, upstream = upstream if scale is None else scale * upstream, None
    narrow = hidden.dtype != dtype
    shape = (min(rows, n_kept), n_cols)
    buffer = hidden.new_empty(shape, dtype=dtype)
    narrow_buffer = hidden.new_empty(shape) if narrow else buffer
    any_grad = any(grad is not None for grad in grads)
    strip = n_cols if narrow else _STRIP_COLS
    for start in range(0, n_kept, rows):
        chunk = slice(start, min(start + rows, n_kept))
        index = chunk if kept is None else kept[chunk]
        h = hidden[index]
        x, out = narrow_buffer[: h.shape[0]], buffer[: h.shape[0]]
        for col in range(0, n_cols, strip):
            cols = slice(col, col + strip)
            _multiply(h, weight[cols], None if bias is None else bias[cols], x[:, cols])

        def logits_of(chosen: Tensor, h: Tensor = h) -> Tensor:
            return torch.nn.functional.linear(h[chosen], weight, bias)

        result = cross_entropy_rows(
            x,
            read.of(index),
            out,
            options.of(index),
            want_grad=any_grad,
            want_correct=want_correct,
            logits_of=logits_of,
        )
        losses[index], lse_out[index] = result.losses, result.lse
        if want_correct:
            correct[index] = result.correct
        if not any_grad:
            continue
        factor = result.factor
        if upstream is not None:
            factor = upstream[index] if factor is None else factor * upstream[index]
        column = None if factor is None else factor.to(dtype).unsqueeze(1)
        if narrow:
            # Scaled in fp32, so that the gradient is rounded once.
            if column is not None:
                out.mul_(column)
            x.copy_(out if scale is None else out.mul_(scale))
            column = None
        # A factor of the rows is applied to the D columns of hidden, not to the V of the logits,
        # and one of all rows by the products themselves.
        alpha = 1.0 if scale is None or narrow else scale.item()
        if grads.hidden is not None:
            dh = grads.hidden[chunk] if everything else torch.empty_like(h)
            dh.addmm_(x, weight, beta=0, alpha=alpha)
            if column is not None:
                dh.mul_(column)
            if not everything:
                grads.hidden[index] = dh
        if grads.weight is not None:
            _accumulate(grads.weight, x, h if column is None else h * column, start == 0, alpha)
        if grads.bias is not None:
            if column is None:
                grads.bias.add_(out.sum(dim=0), alpha=alpha)
            else:
                grads.bias.addmv_(out.t(), column.squeeze(1), alpha=alpha)
    if scale is not None and lse is None:
        losses.mul_(scale)
    return losses, lse_out, correct


def _pack(grads: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dh, dw, db = (like.new_empty(0) if grad is None else grad for grad in grads)
    return dh, dw, db


class _Inputs(NamedTuple):
    """The inputs of the op in the order of its schema, where each option is an argument."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    class_weight: Tensor | None  # (V,)
    token_weight: Tensor | None  # (N,)
    scale: Tensor | None  # ()
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    max_chunk_mib: float | None
    reduce: int  # 0: the losses of all rows; 1: their sum; 2: and its incoming gradient is 1
    want_hidden: bool  # the gradient of hidden; the others alike
    want_weight: bool
    want_bias: bool
    want_correct: bool


class _BackwardInputs(NamedTuple):
    """The inputs of the op that computes the gradients again."""

    upstream: Tensor  # (N,) or ()
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    lse: Tensor  # (N,)
    class_weight: Tensor | None  # (V,)
    token_weight: Tensor | None  # (N,)
    scale: Tensor | None  # ()
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    max_chunk_mib: float | None
    want_hidden: bool
    want_weight: bool
    want_bias: bool


class _Saved(NamedTuple):
    """What forward saves for backward as tensors."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    lse: Tensor  # (N,)
    class_weight: Tensor | None
    token_weight: Tensor | None
    scale: Tensor | None
    grad_hidden: Tensor | None  # for an incoming gradient of 1; None: not wanted, or not computed
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def _compute(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    hidden, weight, options = inputs.hidden, inputs.weight, LossOptions.among(inputs)
    # Gradients divided by N leave the range of fp16: there the scale is applied in backward.
    late = hidden.dtype == torch.float16
    losses, lse, correct, grads = compute_linear_cross_entropy(
        hidden,
        weight,
        inputs.bias,
        inputs.targets,
        options._replace(scale=None) if late else options,
        chunk_rows(hidden, weight.shape[0], inputs.max_chunk_mib),
        (inputs.want_hidden, inputs.want_weight, inputs.want_bias),
        want_correct=inputs.want_correct,
    )
    loss = losses.sum() if inputs.reduce else losses
    if late and options.scale is not None:
        loss = loss * options.scale
    return loss, lse, correct, *_pack(grads, hidden)


def _allocate(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    hidden, weight = inputs.hidden, inputs.weight
    dtype, (n_rows, dim) = accumulation_dtype(hidden.dtype), hidden.shape
    n_cols = weight.shape[0]
    rows = chunk_rows(hidden, n_cols, inputs.max_chunk_mib)
    new = hidden.new_empty
    grad_hidden, grad_weight, grad_bias = new(0), new(0), new(0)
    if inputs.want_hidden:
        grad_hidden = new((n_rows, dim))
    if inputs.want_weight:
        grad_weight = new((n_cols, dim), dtype=weight_grad_dtype(hidden, weight, rows))
    if inputs.want_bias:
        grad_bias = new(n_cols, dtype=dtype)
    loss = new(() if inputs.reduce else (n_rows,), dtype=dtype)
    lse = new(n_rows, dtype=dtype)
    correct = new(n_rows if inputs.want_correct else 0, dtype=dtype)
    return loss, lse, correct, grad_hidden, grad_weight, grad_bias


def _differentiate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients from the inputs, for any incoming gradient, (N,) or ()."""
    inputs = _BackwardInputs(*arguments)
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    *_, grads = compute_linear_cross_entropy(
        hidden,
        weight,
        bias,
        inputs.targets,
        LossOptions.among(inputs),
        chunk_rows(hidden, weight.shape[0], inputs.max_chunk_mib),
        (inputs.want_hidden, inputs.want_weight, inputs.want_bias),
        lse=inputs.lse,
        upstream=inputs.upstream,
    )
    if grads.weight is not None:
        grads = grads._replace(weight=grads.weight.to(weight.dtype))
    if grads.bias is not None and bias is not None:
        grads = grads._replace(bias=grads.bias.to(bias.dtype))
    return _pack(grads, hidden)


def _allocate_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _BackwardInputs(*arguments)
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    nothing = hidden.new_empty
    return (
        hidden.new_empty(hidden.shape) if inputs.want_hidden else nothing(0),
        weight.new_empty(weight.shape) if inputs.want_weight else nothing(0),
        bias.new_empty(bias.shape) if inputs.want_bias and bias is not None else nothing(0),
    )


def _flops(inputs: Any) -> int:
    """Count one product for the logits, and one for each gradient that is wanted.

    ``inputs`` has shapes in place of tensors.
    """
    n_products = 1 + inputs.want_hidden + inputs.want_weight
    n_rows, (n_cols, dim) = inputs.hidden[0], inputs.weight
    return int(2 * n_rows * n_cols * dim * n_products)


_backward = define_op(
    "linear_cross_entropy_backward",
    _differentiate,
    _allocate_gradients,
    schema="(Tensor upstream, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    f"Tensor lse, {SCHEMA}, float? max_chunk_mib, bool want_hidden, bool want_weight, "
    "bool want_bias) -> (Tensor, Tensor, Tensor)",
    flops=lambda *shapes: _flops(_BackwardInputs(*shapes)),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    named = _Inputs(*inputs)
    options = LossOptions.among(named)
    _, lse, correct, *grads = output
    grad_hidden, grad_weight, grad_bias = grads
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, correct, *grads)
    saved = _Saved(
        named.hidden,
        named.weight,
        named.bias,
        named.targets,
        lse,
        *options.tensors(),
        grad_hidden=grad_hidden if named.reduce and named.want_hidden else None,
        grad_weight=grad_weight if named.reduce and named.want_weight else None,
        grad_bias=grad_bias if named.reduce and named.want_bias else None,
    )
    ctx.save_for_backward(*saved)
    ctx.numbers = options.without_tensors()
    ctx.max_chunk_mib = named.max_chunk_mib
    ctx.is_spent = False  # backward hands the gradients out, and may write to them, once
    # Not asked for hidden: in a graph each gradient is of a gradient
    ctx.is_unit = named.reduce == 2


def _final(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``grad`` times the scalar ``factor`` (None: 1), rounded to ``dtype`` once."""
    if is_abstract(grad):
        # A graph is being traced: buffers are the compiler's, and so is this multiplication.
        return (grad if factor is None else grad * factor).to(dtype)
    if factor is not None and grad.dtype != dtype:
        return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    # An alias, whose version is its own: a retained graph unpacks the saved tensor once more. And
    # autograd keeps it as a leaf's gradient, where it would copy what something else refers to.
    grad = grad.data.contiguous()
    if factor is not None:
        scale_unless_one_(grad, factor)
    return grad.to(dtype)


def _pull_back(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
) -> tuple[Tensor, ...]:
    def compute(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        logits = F.linear(h, w.to(h.dtype), None if b is None else b.to(h.dtype))
        return composed_loss(logits, targets, options, reduce=upstream.dim() == 0)

    if bias is None:
        return *pull_back(compute, (hidden, weight), upstream), hidden.new_empty(0)
    return pull_back(compute, (hidden, weight, bias), upstream)


def _backward_formula(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return gradients_of(_Inputs)
    saved = _Saved(*ctx.saved_tensors)
    hidden, weight, bias = saved.hidden, saved.weight, saved.bias
    options = ctx.numbers.with_tensors(saved)
    needs = _Inputs(*ctx.needs_input_grad)
    want = bool(needs.hidden), bool(needs.weight), bool(needs.bias)
    grads: tuple[Tensor | None, ...] = saved.grad_hidden, saved.grad_weight, saved.grad_bias
    are_here = all(grad is not None for grad, wanted in zip(grads, want, strict=True) if wanted)
    if is_transformed(upstream):
        grads = _pull_back(upstream, hidden, weight, bias, saved.targets, options)
    elif ctx.is_spent or not are_here:  # a retained graph, or reduction "none"
        inputs = hidden, weight, bias, saved.targets, saved.lse
        grads = _backward(upstream, *inputs, *options, ctx.max_chunk_mib, *want)
    else:
        ctx.is_spent = True
        late = options.scale if hidden.dtype == torch.float16 else None
        factor = upstream if late is None else upstream * late
        grads = tuple(
            _final(grad, None if ctx.is_unit and like is not hidden else factor, like.dtype)
            if wanted and grad is not None and like is not None
            else None
            for grad, like, wanted in zip(grads, (hidden, weight, bias), want, strict=True)
        )
    grad_hidden, grad_weight, grad_bias = (
        grad if wanted else None for grad, wanted in zip(grads, want, strict=True)
    )
    return gradients_of(_Inputs, hidden=grad_hidden, weight=grad_weight, bias=grad_bias)


_forward = define_op(
    "linear_cross_entropy_forward",
    _compute,
    _allocate,
    _setup_context,
    _backward_formula,
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {SCHEMA}, "
    "float? max_chunk_mib, int reduce, bool want_hidden, bool want_weight, bool want_bias, "
    "bool want_correct) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    flops=lambda *shapes: _flops(_Inputs(*shapes)),
)


def holds_all_logits(hidden: Tensor, weight: Tensor, max_chunk_mib: float | None) -> bool:
    """Return whether all logits may be held at once: without rounding, which chunks do better."""
    return (
        max_chunk_mib is None
        and hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.float64)
        and hidden.numel() // max(1, weight.shape[1]) * weight.shape[0] <= _AT_ONCE
        and not use_triton(hidden)
    )


def _all_count(targets: Tensor, n_cols: int, ignore_index: int) -> bool:
    """Return whether there are targets, all in range, and none is ignored."""
    if targets.numel() == 0:
        return False
    low, high = (end.item() for end in targets.aminmax())
    if low < 0 or high >= n_cols:
        return False
    return not (low <= ignore_index <= high and bool((targets == ignore_index).any()))


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    name = "linear_cross_entropy"
    are_matrices = hidden.dim() == 2 and weight.dim() > 1 and hidden.shape[1] == weight.shape[-1]
    if are_matrices and hidden.shape[:-1] != targets.shape == weight.shape[:-1]:
        raise ValueError(
            f"{name}: there is a target for each row of weight {tuple(weight.shape)}, not of "
            f"hidden {tuple(hidden.shape)}; exchange them: call {_CALL}."
        )
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


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_accuracy: Literal[False] = ...,
    **options: Unpack[LinearKeywords],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: Literal[True],
    return_accuracy: bool = ...,
    **options: Unpack[LinearKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: bool = ...,
    return_accuracy: Literal[True],
    **options: Unpack[LinearKeywords],
) -> tuple[Tensor, ...]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_lse: bool = ...,
    return_accuracy: bool = ...,
    **options: Unpack[LinearKeywords],
) -> Tensor | tuple[Tensor, ...]: ...
@tell_apart(
    _CALL,
    **REMEDIES,
    input="it is named hidden",
    linear_weight="it is named weight, and torch's weight class_weight",
    linear_bias="it is named bias",
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    scale: Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    max_chunk_mib: float | None = None,
    unit_gradient: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross-entropy of ``hidden @ weight.T + bias`` without holding all logits.

    Args:
        hidden: (N, D) or (B, T, D); fp32, bf16, fp16 or fp64. Products are taken in its dtype, or
            under autocast in autocast's.
        weight: (V, D); cast to that dtype for the call where it differs, its gradient is not.
        targets: (N,) or (B, T), int64 or int32, in [0, V) or ``ignore_index``. A target outside
            is an IndexError on a CPU; on a GPU, which does not wait for the host, and compiled for
            a CPU from few logits, it yields a NaN loss and NaN gradients.
        bias: (V,).
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
        return_lse: also return the log of the sum of exponentials.
        return_accuracy: also return how often the first largest logit is the target.
        max_chunk_mib: memory for the logits of one chunk, in MiB; None for 1024 on a GPU (fewer,
            larger products are faster there) and 112 on a CPU.
        unit_gradient: the incoming gradient is 1, ``loss.backward()`` is all that is done with a
            sum or mean: compiled, this saves a pass over the weight's gradient.

    Returns:
        As `cross_entropy`.

    Raises:
        ValueError: a shape, device or option that does not fit.
        IndexError: a target out of range, on a CPU.
        TypeError: targets that are not integers, operands that are not floating-point tensors, or
            an argument that other libraries have.

    Numerics: softmax and loss in fp32 from logits in the products' dtype; dlogits rounded once to
        that dtype; the weight gradient accumulated over chunks in fp32 and rounded once to
        ``weight.dtype``. A mean over no rows is 0 with zero gradients. A row depends on itself
        alone, and an ignored one adds nothing to any gradient, even if it is NaN. Only the inputs
        that require a gradient have one computed, and in evaluation none. Deterministic.
        Differentiable once. Under transforms of torch.func it is `linear_cross_entropy_reference`,
        which holds all logits and is differentiable any number of times.

    Memory: logits of one chunk (twice in half precision on a CPU), and the gradients; on a GPU, if
        ``weight`` alone is trained, a copy of a chunk's hidden states; two packed copies of the
        weight where C++ computes it. The gradients are saved tensors: activation checkpointing
        frees them, and hooks can offload them. On a CPU up to 2²⁰ logits in fp32 or fp64 are kept
        for backward, unless ``max_chunk_mib`` is given.
    """
    name = "linear_cross_entropy"
    require_tensors(
        _CALL,
        hidden=hidden,
        weight=weight,
        targets=targets,
        bias=bias,
        class_weight=class_weight,
        token_weight=token_weight,
    )
    _check_shapes(hidden, weight, bias, targets)
    n_cols = weight.shape[0]
    given = LossOptions(class_weight, token_weight, scale, ignore_index, label_smoothing, z_loss)
    flat_targets, options = resolve(name, hidden, n_cols, targets, reduction, given, softcap)
    if max_chunk_mib is not None and not max_chunk_mib > 0:
        raise ValueError(f"{name}: max_chunk_mib must be positive, got {max_chunk_mib}.")
    device = hidden.device.type
    if autocasts(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    x = hidden.reshape(-1, hidden.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    reduce = (reduction != "none") * (1 + unit_gradient)
    is_small = holds_all_logits(hidden, weight, max_chunk_mib)
    # The compiler fuses what is between the products of a few logits.
    if is_transformed() or (is_small and torch.compiler.is_compiling()):
        return linear_cross_entropy_reference(
            hidden,
            weight,
            targets,
            bias=bias,
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
    if is_small:
        ours = z_loss or softcap or token_weight is not None or return_lse or return_accuracy
        ours = ours or is_traced(x) or fits(x, weight, bias, options)
        if not ours and _all_count(flat_targets, n_cols, ignore_index):
            loss = F.cross_entropy(
                F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)),
                flat_targets.long(),
                None if class_weight is None else class_weight.to(x.dtype),
                ignore_index=ignore_index,
                reduction="sum" if reduce else "none",
                label_smoothing=label_smoothing,
            )
            loss = loss if options.scale is None else loss * options.scale
            return loss if reduce else loss.reshape(targets.shape)
    now = torch.is_grad_enabled() and reduce > 0
    want = (now and t is not None and t.requires_grad for t in (hidden, weight, bias))
    chunk = None if max_chunk_mib is None else float(max_chunk_mib)
    results = _forward(
        x, weight, bias, flat_targets, *options, chunk, reduce, *want, return_accuracy
    )[:3]
    return finish(results, targets, reduction, ignore_index, return_lse, return_accuracy)
