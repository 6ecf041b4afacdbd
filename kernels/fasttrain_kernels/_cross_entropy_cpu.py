"""Cross-entropy of a block of rows in plain torch: the path of CPU tensors and of fp64.

One fused softmax writes the probabilities p over the logits; the loss is read back as −log p_t, so
a row of logits is traversed once for the loss and its gradient p − onehot(t) together. −log p_t is
as exact as lse − x_t wherever p_t is a normal number; the rare rows below that are computed again
from their logits. Branches on values cost nothing here: a CPU tensor needs no host sync.

Legend: R rows of the block, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._loss_options import LossOptions


class RowResult(NamedTuple):
    """Per-row results of one block, each (R,)."""

    losses: Tensor
    lse: Tensor
    correct: Tensor
    factor: Tensor | None  # what the gradient's rows must still be multiplied by


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    out: Tensor,
    options: LossOptions,
    *,
    want_grad: bool,
    want_correct: bool,
    logits_of: Callable[[Tensor], Tensor],
) -> RowResult:
    """Compute the losses of R rows and leave the gradient of their logits in ``out``.

    Losses and gradient are not multiplied by ``options.scale``. ``out`` is (R, V) in fp32 or fp64,
    as are the weights, and may be ``logits`` itself; without ``want_grad`` it is scratch.
    ``logits_of`` is called after ``out`` was overwritten: it returns the logits of chosen rows.
    """
    n_cols = logits.shape[1]
    class_weight, token_weight, _, ignore_index, smoothing, z_loss, softcap = options
    index = targets.long().unsqueeze(1)
    some_ignored = some_invalid = False
    low, high = (end.item() for end in targets.aminmax())
    if low < 0 or high >= n_cols or 0 <= ignore_index < n_cols:
        ignored = targets == ignore_index
        invalid = ((targets < 0) | (targets >= n_cols)) & ~ignored
        some_ignored, some_invalid = bool(ignored.any()), bool(invalid.any())
        index = index.masked_fill((ignored | invalid).unsqueeze(1), 0)

    tanh = None
    if softcap:
        tanh = torch.tanh(logits.to(out.dtype) / softcap)
        logits = torch.mul(tanh, softcap, out=out)
    x_t = logits.gather(1, index).squeeze(1).to(out.dtype)
    correct = out.new_empty(0)
    if want_correct:
        correct = (logits.argmax(dim=1) == targets).to(out.dtype)
    weighted_sum = None
    if smoothing:
        x = logits.to(out.dtype)
        weighted_sum = x.sum(dim=1) if class_weight is None else x @ class_weight
        weight_sum = n_cols if class_weight is None else float(class_weight.sum())

    torch.softmax(logits, -1, dtype=out.dtype, out=out)
    p_t = out.gather(1, index).squeeze(1)
    nll = p_t.log().neg_()
    lse = x_t + nll
    if p_t.amin().item() < (tiny := torch.finfo(p_t.dtype).tiny):
        rows = (p_t < tiny).nonzero().squeeze(1)
        full = logits_of(rows).to(nll.dtype)
        if softcap:
            full = (full / softcap).tanh() * softcap
        lse[rows] = torch.logsumexp(full, dim=1)
        nll[rows] = lse[rows] - x_t[rows]

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
    if some_ignored:
        losses = losses.masked_fill(ignored, 0.0)
        lse = lse.masked_fill(ignored, 0.0)
    if some_invalid:
        losses = losses.masked_fill(invalid, float("nan"))
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
    if some_ignored:
        out[ignored] = 0.0
    if some_invalid:
        out[invalid] = float("nan")
    return RowResult(losses, lse, correct, factor)
