"""Cross-entropy of a matrix of logits on the path that its device and dtype take."""

import torch
from torch import Tensor

from .cpu.cross_entropy import LossTerms, cross_entropy_rows
from ._cross_entropy_launch import launch_cross_entropy
from ._cross_entropy_options import accumulation_dtype
from ._dispatch import use_triton

__all__ = ["compute_cross_entropy", "empty_grad", "runs_kernels"]

# Logits of a block of rows on a CPU, small enough to be in cache still when the passes after the
# softmax come.
_CPU_BLOCK_BYTES = 2**20


def runs_kernels(logits: Tensor) -> bool:
    return use_triton(logits) and logits.dtype != torch.float64


def empty_grad(logits: Tensor) -> Tensor:
    """Allocate a gradient whose rows are misaligned by as many bytes as the rows of ``logits``."""
    n_rows, n_cols = logits.shape
    align = 16 // logits.element_size()
    stride = n_cols + (logits.stride(0) - n_cols) % align
    return logits.new_empty((n_rows, stride))[:, :n_cols]


def compute_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    grad: Tensor | None,
    terms: LossTerms,
    token_weight: Tensor | None,
    scale: Tensor | None,
    *,
    lse: Tensor | None = None,
    upstream: Tensor | None = None,
    skip_unit: bool = False,
    want_correct: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, lse and hits of all rows (only those asked for), and fill ``grad``."""
    dtype = accumulation_dtype(logits.dtype)
    n_rows, n_cols = logits.shape
    losses, correct = logits.new_empty(0, dtype=dtype), logits.new_empty(0, dtype=dtype)
    want_losses = lse is None
    if lse is None:
        lse, losses = (logits.new_empty(n_rows, dtype=dtype) for _ in range(2))
    if want_correct:
        correct = logits.new_empty(n_rows, dtype=dtype)
    if runs_kernels(logits):
        class_weight = terms.class_weight
        launch_cross_entropy(
            logits,
            targets,
            grad,
            lse,
            terms,
            losses=losses if want_losses else None,
            correct=correct if want_correct else None,
            class_weight_sum=None if class_weight is None else class_weight.float().sum(),
            token_weight=token_weight,
            scale=scale,
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
    weights = None if terms.class_weight is None else terms.class_weight.to(dtype)
    terms = terms._replace(class_weight=weights)
    block = max(1, min(n_rows, _CPU_BLOCK_BYTES // (n_cols * dtype.itemsize)))
    direct = grad is not None and grad.dtype == dtype
    scratch = None if direct else logits.new_empty((block, n_cols), dtype=dtype)
    for start in range(0, n_rows, block):
        rows = slice(start, min(start + block, n_rows))
        x = logits[rows]
        if direct:
            assert grad is not None
            out = grad[rows]
            # An in-place gradient would leave nothing to compute an underflowing row from.
            source = x.clone() if out.data_ptr() == x.data_ptr() else x
        else:
            assert scratch is not None
            out, source = scratch[: x.shape[0]], x
        result = cross_entropy_rows(
            source,
            targets[rows],
            out,
            terms,
            None if token_weight is None else token_weight[rows].to(dtype),
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
        factor = result.factor
        if upstream is not None:
            part = upstream if upstream.dim() == 0 else upstream[rows]
            factor = part if factor is None else factor * part
        if scale is not None:
            factor = scale if factor is None else factor * scale
        if factor is not None:
            out.mul_(factor.unsqueeze(1) if factor.dim() else factor)
        if not direct:
            grad[rows] = out
    if want_losses and scale is not None:
        losses.mul_(scale)
    return losses, lse, correct
