"""Cross-entropy of a block of rows in plain torch: the path of CPU tensors and of fp64.

One fused softmax writes the probabilities p over the logits; the loss is read back as −log p_t, so
a row of logits is traversed once for the loss and its gradient p − onehot(t) together. −log p_t is
as exact as lse − x_t wherever p_t is a normal number; the rare rows below that are computed again
from their logits. Branches on values cost nothing here: a CPU tensor needs no host sync. A row
depends on itself alone, whatever NaN or ±inf others hold.

Legend: R rows of the block, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._loss_options import LossOptions

# Rows that are computed again at once: all of them may be such rows, and their logits take memory.
_AGAIN = 64


class Targets(NamedTuple):
    """Targets of R rows, and which rows have none."""

    values: Tensor  # (R,)
    columns: Tensor  # (R, 1), int64, 0 in rows without a target
    ignored: Tensor | None  # (R,), None if no row is ignored
    invalid: Tensor | None  # (R,), None if all are in range

    def of(self, rows: slice | Tensor) -> "Targets":
        """Return those of some of the rows."""
        values, columns, ignored, invalid = (None if x is None else x[rows] for x in self)
        assert values is not None
        assert columns is not None
        return Targets(values, columns, ignored, invalid)


def read_targets(
    name: str, targets: Tensor, n_cols: int, ignore_index: int, *, strict: bool
) -> Targets:
    """Return what the targets of all rows, (N,), are.

    Raises:
        IndexError: a target is out of range, and ``strict``.
    """
    columns = targets.long().unsqueeze(1)
    if targets.numel() == 0:
        return Targets(targets, columns, None, None)
    low, high = (end.item() for end in targets.aminmax())
    if low >= 0 and high < n_cols and not 0 <= ignore_index < n_cols:
        return Targets(targets, columns, None, None)
    ignored = targets == ignore_index
    invalid = ((targets < 0) | (targets >= n_cols)) & ~ignored
    some_invalid = bool(invalid.any())
    if strict and some_invalid:
        row = int(invalid.nonzero()[0])
        value = targets[row].item()
        raise IndexError(
            f"{name}: target {value} of row {row} is outside [0, V) = [0, {n_cols}) and is not "
            f"ignore_index = {ignore_index}; pass ignore_index={value} if such rows are to be "
            "ignored, else correct the targets or the number of classes."
        )
    columns = columns.masked_fill((ignored | invalid).unsqueeze(1), 0)
    some_ignored = bool(ignored.any())
    return Targets(
        targets, columns, ignored if some_ignored else None, invalid if some_invalid else None
    )


class RowResult(NamedTuple):
    """Per-row results of one block, each (R,)."""

    losses: Tensor
    lse: Tensor
    correct: Tensor
    factor: Tensor | None  # what the gradient's rows must still be multiplied by


def cross_entropy_rows(
    logits: Tensor,
    targets: Targets,
    out: Tensor,
    options: LossOptions,
    *,
    want_grad: bool,
    want_correct: bool,
    logits_of: Callable[[Tensor], Tensor],
) -> RowResult:
    """Compute the losses of R rows and leave the gradient of their logits in ``out``.

    Losses and gradient are not multiplied by ``options.scale``, and the gradient of ignored rows is
    undefined: 0 is left to the caller, behind all factors. ``out`` is (R, V) in fp32 or fp64, as
    are the weights, and may be ``logits`` itself; without ``want_grad`` it is scratch.
    ``logits_of`` is called after ``out`` was overwritten: it returns the logits of chosen rows.
    """
    n_cols = logits.shape[1]
    class_weight, token_weight, _, _, smoothing, z_loss, softcap = options
    values, index, ignored, invalid = targets

    tanh = None
    if softcap:
        tanh = torch.tanh(logits.to(out.dtype) / softcap)
        logits = torch.mul(tanh, softcap, out=out)
    x_t = logits.gather(1, index).squeeze(1).to(out.dtype)
    correct = out.new_empty(0)
    if want_correct:
        hits = logits.argmax(dim=1) == values
        correct = (hits if ignored is None else hits & ~ignored).to(out.dtype)
    weighted_sum = None
    if smoothing:
        x = logits.to(out.dtype)
        weighted_sum = x.sum(dim=1) if class_weight is None else x @ class_weight
        weight_sum = n_cols if class_weight is None else float(class_weight.sum())

    torch.softmax(logits, -1, dtype=out.dtype, out=out)
    p_t = out.gather(1, index).squeeze(1)
    nll = p_t.log().neg_()
    lse = x_t + nll
    tiny = torch.finfo(p_t.dtype).tiny
    if not p_t.amin().item() >= tiny:  # NaN where any row's is
        again = ~(p_t >= tiny)
        if ignored is not None:
            again &= ~ignored
        for rows in again.nonzero().squeeze(1).split(_AGAIN):
            full = logits_of(rows).to(nll.dtype)
            if softcap:
                full = (full / softcap).tanh() * softcap
            lse[rows] = torch.logsumexp(full, dim=1)
            nll[rows] = lse[rows] - x_t[rows]
        nll.masked_fill_(lse == math.inf, math.nan)  # ∞ − ∞, as torch has it

    row_weight = token_weight
    if class_weight is not None:
        target_weight = class_weight[index.squeeze(1)]
        row_weight = target_weight if token_weight is None else token_weight * target_weight
    losses = nll
    if smoothing:
        losses = nll * (1 - smoothing)
    if z_loss:
        losses = losses + z_loss * lse.square()
    if row_weight is not None:
        losses = losses * row_weight
    if weighted_sum is not None:
        smooth_loss = (lse * weight_sum - weighted_sum) * (smoothing / n_cols)
        losses = losses + (smooth_loss if token_weight is None else smooth_loss * token_weight)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
        lse = lse.masked_fill(ignored, 0.0)
    if invalid is not None:
        losses = losses.masked_fill(invalid, math.nan)
    if not want_grad:
        return RowResult(losses, lse, correct, None)

    factor = row_weight
    if smoothing or z_loss:
        # d loss / d x = p·coefficient − uniform·w − hit·onehot(t)
        one = torch.ones_like(lse)
        row = one if row_weight is None else row_weight
        uniform = (one if token_weight is None else token_weight) * (smoothing / n_cols)
        coefficient = row * (1 - smoothing + 2 * z_loss * lse)
        if smoothing:
            coefficient = coefficient + uniform * weight_sum
        out.mul_(coefficient.unsqueeze(1))
        if smoothing and class_weight is None:
            out.sub_(uniform.unsqueeze(1))
        elif smoothing and class_weight is not None:
            out.addr_(uniform, class_weight, alpha=-1)
        out.scatter_add_(1, index, (row * (smoothing - 1)).unsqueeze(1))
        factor = None
    else:
        out.scatter_(1, index, (p_t - 1).unsqueeze(1))
    if tanh is not None:
        out.mul_(tanh.square_().neg_().add_(1))
    if invalid is not None:
        out[invalid] = math.nan
    return RowResult(losses, lse, correct, factor)
