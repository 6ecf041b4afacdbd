"""Loss and gradients of a linear layer followed by cross-entropy, one chunk of rows at a time."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu.cross_entropy import LossTerms, cross_entropy_rows
from ._cross_entropy_launch import launch_cross_entropy
from ._cross_entropy_options import accumulation_dtype
from ._dispatch import use_triton
from .cpu.linear_cross_entropy import fits, run_in_cpp

__all__ = ["Gradients", "chunk_rows", "compute_linear_cross_entropy", "weight_grad_dtype"]

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


def _per_row(value: Tensor | None, rows: slice) -> Tensor | None:
    return value if value is None or value.dim() == 0 else value[rows]


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def compute_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    scale: Tensor | None,
    rows: int,
    want: tuple[bool, bool, bool],
    *,
    lse: Tensor | None = None,
    upstream: Tensor | None = None,
    want_correct: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Return losses, lse, hits (each (N,)) and the wanted gradients (hidden, weight, bias).

    Args:
        hidden: (N, D), its last dimension contiguous.
        weight: (V, D), cast to ``hidden``'s dtype for the products.
        bias: (V,) or None.
        targets: (N,) contiguous integers.
        terms: the options of the loss.
        token_weight: (N,) or None.
        scale: () multiplies losses and gradients, or None.
        rows: rows of a chunk.
        want: which gradients.
        lse: (N,) from an earlier forward: then only gradients are computed.
        upstream: (N,) or (), multiplies the gradients.
        want_correct: whether to count the rows whose first largest logit is the target.
    """
    device = hidden.device.type
    # Autocast would cast the operands of the products below once more, to a dtype of its own.
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        weight_in = weight.to(hidden.dtype)
        bias_in = None if bias is None else bias.to(hidden.dtype)
        kernels = use_triton(hidden) and hidden.dtype != torch.float64
        run = _on_kernels if kernels else _on_torch
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
        if not use_triton(hidden) and fits(hidden, weight_in, bias, terms):
            return *run_in_cpp(
                hidden, weight_in, targets, terms, token_weight, scale, rows, *grads[:2], upstream,
                want_correct,
            ), grads  # fmt: skip
        return run(
            hidden, weight_in, bias_in, targets, terms, token_weight, scale, rows, grads, lse,
            upstream, want_correct,
        )  # fmt: skip


def _on_kernels(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    scale: Tensor | None,
    rows: int,
    grads: Gradients,
    lse: Tensor | None,
    upstream: Tensor | None,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    n_rows, n_cols = hidden.shape[0], weight.shape[0]
    new = hidden.new_empty
    want_losses = lse is None
    losses = new(n_rows if want_losses else 0, dtype=torch.float32)
    lse_out = new(n_rows, dtype=torch.float32) if lse is None else lse
    correct = new(n_rows if want_correct else 0, dtype=torch.float32)
    weight_sum = None if terms.class_weight is None else terms.class_weight.float().sum()
    # Rows start on 16-byte boundaries whatever V is, so that the kernel has no narrow accesses.
    align = 16 // hidden.element_size()
    buffer = new((min(rows, n_rows), -(-n_cols // align) * align))[:, :n_cols]
    any_grad = any(grad is not None for grad in grads)
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
            terms,
            losses=losses[part] if want_losses else None,
            correct=correct[part] if want_correct else None,
            class_weight_sum=weight_sum,
            token_weight=_per_row(token_weight, part),
            scale=scale,
            upstream=_per_row(upstream, part),
        )
        if grads.hidden is not None:
            torch.mm(x, weight, out=grads.hidden[part])
        if grads.weight is not None:
            _accumulate(grads.weight, x, h, start == 0)
        if grads.bias is not None:
            grads.bias.add_(x.sum(dim=0, dtype=grads.bias.dtype))
    return losses, lse_out, correct, grads


def _on_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    terms: LossTerms,
    token_weight: Tensor | None,
    scale: Tensor | None,
    rows: int,
    grads: Gradients,
    lse: Tensor | None,
    upstream: Tensor | None,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    (n_rows, n_cols), dtype = (hidden.shape[0], weight.shape[0]), accumulation_dtype(hidden.dtype)
    if terms.class_weight is not None:
        terms = terms._replace(class_weight=terms.class_weight.to(dtype))
    # Rows whose target is ignored are dropped before the product: exact, and padding costs nothing.
    ignored = targets == terms.ignore_index
    everything = not bool(ignored.any())
    kept = None if everything else (~ignored).nonzero().squeeze(1)
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
        h, t = hidden[index], targets[index]
        x, out = narrow_buffer[: h.shape[0]], buffer[: h.shape[0]]
        for col in range(0, n_cols, strip):
            cols = slice(col, col + strip)
            _multiply(h, weight[cols], None if bias is None else bias[cols], x[:, cols])

        def logits_of(chosen: Tensor, h: Tensor = h) -> Tensor:
            return torch.nn.functional.linear(h[chosen], weight, bias)

        result = cross_entropy_rows(
            x,
            t,
            out,
            terms,
            None if token_weight is None else token_weight[index].to(dtype),
            want_grad=any_grad,
            want_correct=want_correct,
            logits_of=logits_of,
        )
        losses[index], lse_out[index] = result.losses, result.lse
        if want_correct:
            correct[index] = result.correct
        if not any_grad:
            continue
        factor = result.factor if upstream is None else _product(result.factor, upstream[index])
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
    return losses, lse_out, correct, grads
