"""The options of `cross_entropy` and `linear_cross_entropy`: checked once, carried as one value."""

import math
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


class Keywords(TypedDict, total=False):
    """The options that all losses and their references have, for their signatures."""

    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    z_loss: float
    softcap: float | None
    class_weight: Tensor | None
    token_weight: Tensor | None
    scale: Tensor | None


# What to write instead of arguments of torch, Liger Kernel, flash-attention and others.
REMEDIES = {
    "size_average": 'use reduction="mean", "sum" or "none"',
    "reduce": 'use reduction="mean", "sum" or "none"',
    "target": "it is named targets",
    "labels": "it is named targets",
    "ce_weight": "it is named class_weight",
    "lse_square_scale": "it is named z_loss",
    "logit_softcapping": "it is named softcap",
    "return_z_loss": "compute it as z_loss·lse² from return_lse=True",
    "return_token_accuracy": "it is named return_accuracy",
    "shift": "shift the targets by one yourself, with ignore_index at the end",
}


class LossOptions(NamedTuple):
    """What the loss of N rows consists of, apart from their V logits and their targets.

    Ops have flat arguments: their schemas contain `SCHEMA`, their callers pass ``*options``, and a
    NamedTuple of an op's inputs has the same fields.
    """

    class_weight: Tensor | None = None  # (V,)
    token_weight: Tensor | None = None  # (N,), any stride
    scale: Tensor | None = None  # (), multiplies losses and gradients
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0 means none

    @classmethod
    def among(cls, inputs: Any) -> "LossOptions":
        """Return the options among an op's ``inputs``, a NamedTuple that has the same fields."""
        return cls(*[getattr(inputs, name) for name in cls._fields])

    def to(self, dtype: torch.dtype) -> "LossOptions":
        """Return them with the weights in a dtype."""
        classes, tokens = self.class_weight, self.token_weight
        return self._replace(
            class_weight=None if classes is None else classes.to(dtype),
            token_weight=None if tokens is None else tokens.to(dtype),
        )

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what an autograd function saves as tensors."""
        return self.class_weight, self.token_weight, self.scale

    def without_tensors(self) -> "LossOptions":
        """Return the numbers alone, which an autograd function keeps beside its saved tensors."""
        return self._replace(class_weight=None, token_weight=None, scale=None)

    def with_tensors(self, saved: Any) -> "LossOptions":
        """Return these numbers with the tensors that a backward pass has ``saved``, by name."""
        return self._replace(
            class_weight=saved.class_weight, token_weight=saved.token_weight, scale=saved.scale
        )

    def of(self, rows: slice | Tensor) -> "LossOptions":
        """Return those of some of the rows."""
        weight = self.token_weight
        return self._replace(token_weight=None if weight is None else weight[rows])


SCHEMA = (
    "Tensor? class_weight, Tensor? token_weight, Tensor? scale, SymInt ignore_index, "
    "float label_smoothing, float z_loss, float softcap"
)


def class_weight_of(name: str, weight: Tensor | None, class_weight: Tensor | None) -> Tensor | None:
    """Return the class weights, which torch names ``weight``."""
    if weight is not None and class_weight is not None:
        raise ValueError(f"{name}: weight is torch's name for class_weight; pass one of them.")
    return class_weight if weight is None else weight


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which losses of logits of ``dtype`` are computed: fp32, or fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve(
    name: str,
    rows: Tensor,
    n_cols: int,
    targets: Tensor,
    reduction: str,
    options: LossOptions,
    softcap: float | None,
) -> tuple[Tensor, LossOptions]:
    """Return the targets of N rows and the options of a call, or raise where they do not fit.

    The logits have the dtype and device of ``rows``, and shape ``(*rows.shape[:-1], n_cols)``.
    """
    class_weight, token_weight, scale, ignore_index, label_smoothing, z_loss, _ = options
    shape, device = rows.shape[:-1], rows.device
    if targets.dtype not in (torch.int64, torch.int32):
        remedy = "convert them with targets.long()"
        if targets.is_floating_point() and targets.shape == (*shape, n_cols):
            remedy = "probabilities of classes are torch.nn.functional.cross_entropy's alone"
        raise TypeError(
            f"{name}: targets must be class indices in int64 or int32, got {targets.dtype}; "
            f"{remedy}."
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
    if reduction not in get_args(Reduction):
        allowed = get_args(Reduction)
        raise ValueError(f"{name}: reduction must be one of {allowed}, got {reduction!r}.")
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
    if scale is not None and (scale.dim() != 0 or scale.device != device):
        raise ValueError(
            f"{name}: scale must be a scalar tensor on {device}, got shape {tuple(scale.shape)} on "
            f"{scale.device}."
        )
    constants = {"class_weight": class_weight, "token_weight": token_weight, "scale": scale}
    for label, weight in constants.items():
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {label} requires grad, but no gradient is computed for it; pass "
                f"{label}.detach()."
            )
    targets = targets.reshape(-1).contiguous()
    weight = None if token_weight is None else token_weight.reshape(-1)
    dtype = accumulation_dtype(rows.dtype)
    scale = None if scale is None else scale.to(dtype)
    if reduction == "mean":
        mean = mean_scale(targets, ignore_index, class_weight, weight, dtype)
        scale = mean if scale is None else mean * scale
    return targets, LossOptions(
        class_weight, weight, scale, ignore_index, label_smoothing, z_loss, softcap or 0.0
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
        # Not a product: the weight of an ignored row may be NaN, or infinite.
        total = torch.where(valid, weight, torch.zeros_like(weight)).sum()
    return torch.where(total == 0, torch.zeros_like(total), 1.0 / total)


def finish(
    results: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
    reduction: str,
    ignore_index: int,
    return_lse: bool,
    return_accuracy: bool,
) -> Tensor | tuple[Tensor, ...]:
    """Give loss, lse and hits of an op the shapes that its public function promises."""
    loss, lse, correct = results
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
