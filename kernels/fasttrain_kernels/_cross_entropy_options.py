"""What `cross_entropy` and `linear_cross_entropy` share: validation, denominators, outputs."""

import math

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "check_options", "check_targets", "finish", "mean_scale"]

_REDUCTIONS = ("mean", "sum", "none")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which losses of logits of ``dtype`` are computed: fp32, or fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_targets(name: str, targets: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``targets`` are integers of ``shape`` on ``device``."""
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name}: targets must be class indices in int64 or int32, got {targets.dtype}; "
            "convert them with targets.long()."
        )
    if targets.shape != shape:
        raise ValueError(
            f"{name}: targets must have shape {tuple(shape)}, got {tuple(targets.shape)}; give one "
            "class index for each row of logits."
        )
    if targets.device != device:
        raise ValueError(
            f"{name}: targets are on {targets.device} but the logits are on {device}; move them "
            "to one device."
        )


def check_options(
    name: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    n_cols: int,
    shape: torch.Size,
) -> None:
    """Raise where an option has a value that has no meaning."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {_REDUCTIONS}, got {reduction!r}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must lie in [0, 1], got {label_smoothing}.")
    if not (z_loss >= 0.0 and math.isfinite(z_loss)):
        raise ValueError(f"{name}: z_loss must be finite and not negative, got {z_loss}.")
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(
            f"{name}: softcap must be positive, got {softcap}; pass None for no capping."
        )
    if n_cols == 0:
        raise ValueError(f"{name}: the vocabulary is empty; logits need at least one column.")
    if class_weight is not None and class_weight.shape != (n_cols,):
        raise ValueError(
            f"{name}: class_weight must have shape (V,) = ({n_cols},), got "
            f"{tuple(class_weight.shape)}; give one weight for each class."
        )
    if token_weight is not None and token_weight.shape != shape:
        raise ValueError(
            f"{name}: token_weight must have the shape of targets, {tuple(shape)}, got "
            f"{tuple(token_weight.shape)}."
        )
    for label, weight in (("class_weight", class_weight), ("token_weight", token_weight)):
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {label} requires grad, but no gradient is computed for it; pass "
                f"{label}.detach()."
            )


def mean_scale(
    targets: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return 1 / (sum of the row weights of all rows not ignored), or 0 where that sum is 0."""
    valid = targets != ignore_index
    if class_weight is None and token_weight is None:
        total = valid.sum().to(dtype)
    else:
        weight = valid.to(dtype)
        if class_weight is not None:
            index = targets.long().clamp(0, class_weight.shape[0] - 1)
            weight = weight * class_weight.to(dtype)[index]
        if token_weight is not None:
            weight = weight * token_weight
        total = weight.sum()
    return torch.where(total == 0, torch.zeros_like(total), 1.0 / total)


def finish(
    loss: Tensor,
    lse: Tensor,
    correct: Tensor,
    targets: Tensor,
    *,
    reduction: str,
    ignore_index: int,
    return_lse: bool,
    return_accuracy: bool,
) -> Tensor | tuple[Tensor, ...]:
    """Give the outputs of an op the shapes that its public function promises."""
    outputs = [loss.reshape(targets.shape) if reduction == "none" else loss]
    if return_lse:
        outputs.append(lse.reshape(targets.shape))
    if return_accuracy:
        if reduction == "none":
            outputs.append(correct.reshape(targets.shape))
        elif reduction == "sum":
            outputs.append(correct.sum())
        else:
            count = (targets != ignore_index).sum().clamp(min=1)
            outputs.append(correct.sum() / count)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
