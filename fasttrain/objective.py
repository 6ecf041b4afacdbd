"""The loss of a model of one's own on a batch of one's own: what `fasttrain.library` minimises.

Legend: B batch, T sequence, N = B·T, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from fasttrain_kernels import cross_entropy
from torch import Tensor, nn

from fasttrain.config import TrainConfig, UserError
from fasttrain.device import Precision, resolve_compile
from fasttrain.model import Transformer

__all__ = ["Batch", "Criterion", "Objective", "shift"]

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), targets (N,) → scalar


class Batch(NamedTuple):
    """A batch on the device."""

    tokens: Tensor  # int64 (B, T)
    targets: Tensor  # int64 (N,): for each token the one to predict, or ignore_index
    n_targets: Tensor  # int64 scalar: those that count
    others: dict[str, Any]  # what else the model's forward is given


class Objective:
    """Makes batches ready, runs the model, sums the loss.

    Args:
        model: called with tokens and what else of a batch its ``forward`` takes.
        criterion: as `fasttrain.library.Trainer` takes it.
        config: label smoothing and z-loss where ``criterion`` is None; whether to compile.
        device: where batches go.
        precision: of the forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None,
        config: TrainConfig,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.model, self.criterion, self.loop = model, criterion, config.train
        self.run: Callable[..., Any] = model
        # Not by itself ("auto"): it pays after a minute, and a model of any kind may not compile.
        mode = config.run.compile
        if mode not in ("auto", "c++") and resolve_compile(config, device) != "off":
            self.run = torch.compile(model)
        self.device, self.precision = device, precision
        self.ignore_index: int = getattr(criterion, "ignore_index", -100)
        parameters = inspect.signature(model.forward).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes = set(parameters)

    def prepare(self, batch: Mapping[str, Tensor]) -> Batch:
        """Check a batch, move it to the device and find its targets.

        Raises:
            UserError: it lacks ``input_ids``, a shape is wrong, or it has a key that the model's
                ``forward`` does not take.
        """
        rest = dict(batch)
        tokens = rest.pop("input_ids", None)
        if tokens is None or tokens.ndim != 2:
            raise UserError(
                f"Trainer: a batch has {sorted(batch)}; it needs input_ids of shape (B, T)"
            )
        shifted, labels = rest.pop("target_ids", None), rest.pop("labels", None)
        mask = rest.get("attention_mask")
        for name, tensor in (("target_ids", shifted), ("labels", labels), ("attention_mask", mask)):
            if tensor is not None and tensor.shape != tokens.shape:
                raise UserError(
                    f"Trainer: {name} has shape {tuple(tensor.shape)}, and input_ids "
                    f"{tuple(tokens.shape)}; each token needs one"
                )
        if mask is not None and not self._takes("attention_mask"):
            if bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise UserError(
                    "Trainer: a batch is padded on the left, and the model's forward takes no "
                    "attention_mask, so that tokens would see the padding; pad on the right"
                )
            del rest["attention_mask"]
        if unknown := [key for key in rest if not self._takes(key)]:
            raise UserError(
                f"Trainer: a batch has {unknown[0]!r}, which the model's forward does not take; "
                "leave it out of the batch"
            )
        if shifted is None:
            shifted = shift(tokens if labels is None else labels, mask, self.ignore_index)
        elif mask is not None:
            shifted = shifted.masked_fill(mask == 0, self.ignore_index)
        targets = shifted.to(self.device, non_blocking=True).flatten()
        others: dict[str, Any] = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in rest.items()
        }
        if "use_cache" in self.takes:  # of transformers: keys and values that nobody will use
            others.setdefault("use_cache", False)
        n_targets = (targets != self.ignore_index).sum()
        return Batch(tokens.to(self.device, non_blocking=True), targets, n_targets, others)

    def _takes(self, name: str) -> bool:
        return self.takes_all or name in self.takes

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over the targets that count."""
        with self.precision.autocast():
            return self._loss_sum(self._logits(batch), batch)

    def _logits(self, batch: Batch) -> Tensor:
        out: Any = self.run(batch.tokens, **batch.others)
        if isinstance(self.model, Transformer):
            out = self.model.logits(out)
        out = getattr(out, "logits", out)
        logits: Any = out[0] if isinstance(out, tuple) else out
        if not isinstance(logits, Tensor) or logits.shape[:-1] != batch.tokens.shape:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"Trainer: the model returned {found} for tokens {tuple(batch.tokens.shape)}; it "
                "must return logits (B, T, V), an object with them, or a tuple that begins so"
            )
        return logits.flatten(0, -2)

    def _loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.criterion is None:
            loss = cross_entropy(
                logits,
                batch.targets,
                ignore_index=self.ignore_index,
                reduction="sum",
                label_smoothing=self.loop.label_smoothing,
                z_loss=self.loop.z_loss,
            )
            assert isinstance(loss, Tensor)
            return loss
        if getattr(self.criterion, "reduction", "mean") == "sum":
            return self.criterion(logits, batch.targets)
        if not batch.n_targets:  # the mean over no target is nan
            return logits.sum() * 0.0
        return self.criterion(logits, batch.targets) * batch.n_targets

    @torch.no_grad()
    def evaluate(
        self, loader: Iterable[Mapping[str, Tensor]], metrics: Mapping[str, Criterion]
    ) -> dict[str, float]:
        """Return the means over all targets of ``loader``; see `fasttrain.library.Trainer`."""
        was_training = self.model.training
        self.model.eval()
        totals = torch.zeros(2 + len(metrics), dtype=torch.float64, device=self.device)
        try:
            for raw in loader:
                batch = self.prepare(raw)
                if not batch.n_targets:
                    continue
                with self.precision.autocast():
                    logits = self._logits(batch)
                    loss = self._loss_sum(logits, batch)
                keep = batch.targets != self.ignore_index
                kept = logits[keep], batch.targets[keep]
                values = [torch.as_tensor(f(*kept)) * batch.n_targets for f in metrics.values()]
                numbers = [loss, batch.n_targets, *values]
                totals += torch.stack([n.to(self.device, torch.float64) for n in numbers])
        finally:
            self.model.train(was_training)
        loss_sum, n_targets, *sums = totals.tolist()
        if not n_targets:
            raise UserError("Trainer: the validation loader gave no target")
        loss_mean = loss_sum / n_targets
        result = {"val_loss": loss_mean, "val_ppl": math.exp(min(loss_mean, 700.0))}
        for name, value in zip(metrics, sums, strict=True):
            result[f"val_{name}"] = value / n_targets
        return result


def shift(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Return for each position the label of the next, ``ignore_index`` where there is none."""
    if mask is not None:
        labels = labels.masked_fill(mask == 0, ignore_index)
    last = torch.full_like(labels[:, :1], ignore_index)
    return torch.cat([labels[:, 1:], last], dim=1)
