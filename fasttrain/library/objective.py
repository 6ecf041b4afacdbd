"""The loss of a custom model on a custom batch: what `Trainer` and `train_loop` minimise.

Legend: B batch, T sequence, N = B·T, V vocabulary.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from fasttrain_kernels import cross_entropy
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fasttrain.config import UserError
from fasttrain.distributed.sharding import evaluating
from fasttrain.distributed.world import SharedError, World
from fasttrain.model.transformer import Embedding
from fasttrain.resolve import Resolved

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), targets (N,) → scalar
# Whose mean is the sum of the weighted losses over the sum of the targets' class weights
WEIGHTED_MEANS = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
IDS, MASK = ("input_ids", "target_ids", "labels"), "attention_mask"  # keys of a batch


class PreparedBatch(NamedTuple):
    """A batch on the device."""

    tokens: Tensor  # int64 (B, T)
    targets: Tensor  # int64 (N,): for each token the one to predict, or ignore_index
    target_range: tuple[int, int]  # least and greatest target that counts
    n_targets: int | Tensor  # that count; a tensor where the batch came on a device
    is_new: bool  # a row is longer or an id higher than in all batches before, or an id negative
    others: dict[str, Any]  # what else the model's forward is given


def without_compiler(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile(model)`` wraps, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def signature_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return what a model's forward takes; wrappers that hand everything on are looked through.

    These are ``torch.compile(model)`` and modules whose forward takes ``*args`` or ``**kwargs``
    alone and that have ``get_base_model()``, as PEFT's, or a single child.
    """
    model = without_compiler(model)
    parameters = inspect.signature(model.forward).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not parameters or any(p.kind not in variable for p in parameters.values()):
        return parameters
    base = getattr(model, "get_base_model", None)
    children = [*model.children()]
    if callable(base) and isinstance(inner := base(), nn.Module) and inner is not model:
        return signature_of(inner)
    return signature_of(children[0]) if len(children) == 1 else parameters


def option_of(criterion: Criterion | None, name: str, default: Any) -> Any:
    """Return an attribute of a criterion, or a keyword of the `functools.partial` that it is."""
    while isinstance(criterion, partial):
        if name in criterion.keywords:
            return criterion.keywords[name]
        criterion = criterion.func
    return getattr(criterion, name, default)


def _class_weight(criterion: Criterion | None) -> Tensor | None:
    """Return the class weights of a criterion that returns a mean; only of torch's own."""
    weight = option_of(criterion, "weight", None)
    if not isinstance(weight, Tensor) or option_of(criterion, "reduction", "mean") != "mean":
        return None
    kind = criterion.func if isinstance(criterion, partial) else type(criterion)
    if kind not in WEIGHTED_MEANS:
        name = getattr(kind, "__name__", type(kind).__name__)
        raise UserError(
            f"criterion: {name} has class weights and returns a mean, and what it divides by is "
            'not known, so that batches cannot be weighed; give it reduction="sum"'
        )
    return weight.detach()


def _sum_of(criterion: Any, logits: Tensor, targets: Tensor) -> Any:
    """Return the sum whose mean one of `WEIGHTED_MEANS` returns, by what it is set to now."""
    if isinstance(criterion, partial):
        return criterion(logits, targets, reduction="sum")
    summing = copy.copy(criterion)
    summing.reduction = "sum"
    return summing(logits, targets)


class Objective:
    """Prepares batches, runs the model, sums the loss; the arguments are `Trainer`'s.

    A model may return an ``aux_loss`` beside its logits, such as that which balances a router's
    experts. It is added to the loss that is trained on, times ``router_aux_loss_coef`` of the
    model's config if there is one; an evaluation leaves it out.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None,
        resolved: Resolved,
    ) -> None:
        loop = resolved.config.train
        self.run: Callable[..., Any] = model
        self.model = without_compiler(model)
        self.criterion = criterion
        _class_weight(criterion)  # refuses one that cannot be summed
        of_router = getattr(getattr(model, "config", None), "router_aux_loss_coef", None)
        self.aux_weight = 1.0 if of_router is None else float(of_router)
        # Not by itself ("auto"): it pays after a minute, and a model of any kind may not compile.
        if resolved.compile_mode != "off":
            self.run = torch.compile(model)
        self.device, self.precision = resolved.device, resolved.precision
        # Of the default criterion
        self.options: Any = {"ignore_index": self.ignore_index, "z_loss": loop.z_loss}
        self.options |= {"label_smoothing": loop.label_smoothing, "reduction": "sum"}
        self.takes = signature_of(model)
        self._seen = (0, -1)  # longest row, highest id
        # Hooks that come and go would have a model compiled twice: there, no look at its tables.
        self._looks = self.run is self.model and not any(
            hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)
            for m in model.modules()
        )

    @property
    def ignore_index(self) -> int:
        """The target that does not count."""
        index: int = option_of(self.criterion, "ignore_index", -100)
        return index

    def prepare(self, batch: Any) -> PreparedBatch:
        """Check a batch, move it to the device and find its targets."""
        rest = by_key(batch)
        shapes = {name: tuple(rest[name].shape) for name in (*IDS, MASK) if name in rest}
        for name, shape in shapes.items():
            if len(shape) != 2 or 0 in shape or shape != shapes["input_ids"]:
                raise UserError(
                    f"batch: its shapes are {shapes}; give (B, T) to each, with at least one token "
                    "(a DataLoader makes batches of a Dataset's rows)"
                )
            if name in IDS and rest[name].is_floating_point():
                found = rest[name].dtype
                raise UserError(f"batch: {name} is {found}; token ids are integers: .long()")
        tokens, mask = rest.pop("input_ids"), rest.get(MASK)
        shifted, labels = rest.pop("target_ids", None), rest.pop("labels", None)
        if mask is not None and not self._takes(MASK):
            if bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise UserError(
                    "batch: is padded on the left, and the model's forward takes no "
                    "attention_mask, so that tokens would see the padding; pad on the right"
                )
            del rest[MASK]
        if unknown := [key for key in rest if not self._takes(key)]:
            raise UserError(
                f"batch: has {unknown[0]!r}, which the model's forward does not take; name targets "
                "labels or target_ids, and leave out what is not needed"
            )
        if shifted is None:
            shifted = shift(tokens if labels is None else labels, mask, self.ignore_index)
        elif mask is not None:
            shifted = shifted.masked_fill(mask == 0, self.ignore_index)
        ignored = shifted == self.ignore_index
        kept, counted = shifted.masked_fill(ignored, 0), (~ignored).sum()
        target_range, is_new = _range(kept) if kept.is_cpu else (0, 0), self._is_new(tokens)
        moved = partial(Tensor.to, device=self.device, non_blocking=True)
        targets = moved(shifted).flatten()
        n_targets = int(counted) if counted.is_cpu else moved(counted)
        others = {k: moved(v) if isinstance(v, Tensor) else v for k, v in rest.items()}
        if "use_cache" in self.takes:  # of transformers: keys and values that nobody will use
            others.setdefault("use_cache", False)
        return PreparedBatch(moved(tokens), targets, target_range, n_targets, is_new, others)

    def count(self, batch: PreparedBatch) -> float | Tensor:
        """Return what the loss of a step is divided by, of one batch.

        It is the number of targets that count, or the sum of their class weights.
        """
        class_weight = _class_weight(self.criterion)
        if class_weight is None:
            return batch.n_targets
        counts = batch.targets != self.ignore_index
        weights = class_weight.to(batch.targets.device)[batch.targets * counts]
        total = (weights * counts).sum()
        return float(total) if total.is_cpu else total

    def _is_new(self, tokens: Tensor) -> bool:
        if not self._looks or not (tokens.is_cpu or self._seen == (0, -1)):
            return False  # of batches on a device only the first: to look waits for it
        (low, high), before = _range(tokens), self._seen
        self._seen = (max(before[0], tokens.shape[1]), max(before[1], high))
        return low < 0 or self._seen != before

    def _takes(self, name: str) -> bool:
        return name in self.takes or any(p.kind is p.VAR_KEYWORD for p in self.takes.values())

    def loss_sum(self, _: nn.Module, batch: PreparedBatch, scale: Tensor) -> Tensor:
        """Return the summed loss of the targets that count, times ``scale``.

        It is the criterion of a `TrainStep`.
        """
        logits, out = self._forward(batch)
        loss = self._loss_sum(logits, batch, scale)
        auxiliary = out.get("aux_loss") if isinstance(out, Mapping) else getattr(out, "aux_loss", 0)
        if isinstance(auxiliary, Tensor) and auxiliary.requires_grad:  # a mean over the batch
            share = self.aux_weight * self.count(batch)
            if isinstance(share, Tensor):
                auxiliary = torch.where(share == 0, 0.0, auxiliary.to(share.device).mean())
            if isinstance(share, Tensor) or share:  # of no token the mean, and its gradient, is nan
                loss = loss + auxiliary.to(loss.device).mean() * (share * scale)
        return loss

    def _forward(self, batch: PreparedBatch) -> tuple[Tensor, Any]:
        """Return the logits (N, V) of a batch, and all that the model returned."""
        hooked = register_module_forward_pre_hook
        with hooked(self._check_table) if batch.is_new else nullcontext():
            out = self.run(batch.tokens, **batch.others)
        logits = logits_of(out, batch.tokens)
        low, high = batch.target_range
        if (low < 0 or high >= logits.shape[-1]) and (
            self.criterion is None or isinstance(self.criterion, nn.CrossEntropyLoss)
        ):
            raise UserError(
                f"batch: a target is {low if low < 0 else high}, and the model returns "
                f"{logits.shape[-1]} logits; use the model's own tokenizer, and "
                f"{self.ignore_index} where there is no target"
            )
        return logits.flatten(0, -2), out

    def _check_table(self, table: nn.Module, args: tuple[Any, ...]) -> None:
        """Refuse a row that a table does not have: to look it up on CUDA would end the process."""
        # Other tables may make rows of what they are given.
        if type(table) not in (nn.Embedding, Embedding) or not (args and args[0].numel()):
            return
        (low, high), n_rows = _range(args[0]), cast(nn.Embedding, table).num_embeddings
        if low < 0 or high >= n_rows:
            names = {module: name for name, module in self.model.named_modules()}
            raise UserError(
                f"model: index {low if low < 0 else high} is outside the {n_rows} rows of "
                f"{names.get(table) or 'its table'}; for token ids use the model's own tokenizer "
                "or a larger table, for positions shorter sequences"
            )

    def _loss_sum(
        self, logits: Tensor, batch: PreparedBatch, scale: Tensor | None = None
    ) -> Tensor:
        if self.criterion is None:
            return cast(Tensor, cross_entropy(logits, batch.targets, scale=scale, **self.options))
        factor = (
            torch.ones((), dtype=torch.float32, device=logits.device) if scale is None else scale
        )
        if _class_weight(self.criterion) is not None:
            return _scalar(_sum_of(self.criterion, logits, batch.targets)) * factor
        if option_of(self.criterion, "reduction", "mean") == "sum":
            return _scalar(self.criterion(logits, batch.targets)) * factor
        if not batch.n_targets:  # the mean over no target is nan, and so is 0 times a logit of -inf
            return (logits.nan_to_num(0.0, 0.0, 0.0) * 0.0).sum()
        return _scalar(self.criterion(logits, batch.targets)) * (batch.n_targets * factor)

    @torch.no_grad()
    def evaluate(
        self, loader: Iterable[Any], metrics: Mapping[str, Criterion], world: World
    ) -> dict[str, float]:
        """Return the means over all targets of all ranks; see `fasttrain.library.Trainer`."""
        # The loss and what it is divided by, the targets, the metrics
        totals = torch.zeros(3 + len(metrics), dtype=torch.float64, device=self.device)
        with evaluating(self.model, world):
            for (raw,) in together(loader, 1, world) if world.sharded else zip(loader):
                batch = self.prepare(raw)
                with self.precision.autocast():
                    logits, _ = self._forward(batch)
                    loss = self._loss_sum(logits, batch)
                keep = batch.targets != self.ignore_index
                kept, n_kept = (logits[keep], batch.targets[keep]), keep.sum()
                if not n_kept:  # but other ranks waited for this one's forward
                    continue
                exact: Any = {"device": self.device, "dtype": torch.float64}
                values = [torch.as_tensor(f(*kept), **exact) * n_kept for f in metrics.values()]
                numbers = [loss, self.count(batch), n_kept, *values]
                totals += torch.stack([torch.as_tensor(n, **exact) for n in numbers])
        loss_sum, divisor, n_targets, *sums = world.sum(totals).tolist()
        if not n_targets:
            raise UserError("Trainer: the validation loader gave no target")
        mean = loss_sum / divisor if divisor else math.nan
        result = {"val_loss": mean, "val_ppl": math.exp(min(mean, 700.0))}
        others = zip(metrics, sums, strict=True)
        return result | {f"val_{name}": value / n_targets for name, value in others}


def together(batches: Iterable[Any], n: int, world: World) -> Iterator[list[Any]]:
    """Yield ``n`` batches at a time, fewer at the end, the same number on all ranks."""
    batches = iter(batches)
    while True:
        group, failed = [], None
        try:
            group = list(islice(batches, n))
        except RuntimeError as error:
            failed = error
        sizes = world.gather(None if failed else len(group))
        if None in sizes:
            raise failed or RuntimeError("the loader of another rank failed")
        if any(size != sizes[0] for size in sizes):
            raise (UserError if world.leads else SharedError)(
                f"the loaders of ranks 0 to {world.size - 1} gave {sizes} batches for a step; give "
                "each a DistributedSampler, or the same number of batches"
            )
        if not group:
            return
        yield group


def by_key(batch: Any) -> dict[str, Any]:
    """Return a batch as a dict. A tensor becomes ``input_ids``; a pair has ``target_ids`` too.

    Ids of any integer dtype become int64.
    """
    parts: Any = [batch] if isinstance(batch, Tensor) else batch
    if isinstance(parts, list | tuple) and len(parts) in (1, 2):
        parts = dict(zip(("input_ids", "target_ids"), parts, strict=False))
    if not isinstance(parts, Mapping):
        size = f" and length {len(parts)}" if isinstance(parts, list | tuple) else ""
        raise UserError(
            f"batch: is of type {type(batch).__name__}{size}; give a pair (input_ids, target_ids), "
            "or a mapping with input_ids and labels or target_ids (a list of rows becomes one in "
            "the DataLoader's collate_fn)"
        )
    given = {key: value for key, value in parts.items() if value is not None}
    if "input_ids" not in given:
        raise UserError(
            f"batch: has {list(given)} and no input_ids; name the tokens input_ids, and their "
            "targets labels (to be shifted) or target_ids (shifted already)"
        )
    for name in (*IDS, MASK):
        if not isinstance(value := given.get(name), Tensor | None):
            kind = type(value).__name__
            raise UserError(
                f"batch: {name} is of type {kind}; give a tensor of shape (B, T): have the "
                "DataLoader's collate_fn pad the rows to one length and stack them "
                "(torch.nn.utils.rnn.pad_sequence, or a data collator of transformers)"
            )
        if value is not None and name != MASK and not value.is_floating_point():
            given[name] = value.long()
    return given


def logits_of(out: Any, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V) of ``tokens`` in a model's output, or raise UserError."""
    out = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", out)
    out = out[0] if isinstance(out, list | tuple) and out else out
    if not isinstance(out, Tensor) or out.shape[:-1] != tokens.shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"model: returned {found} for tokens {tuple(tokens.shape)}; it must return one row of "
            "logits for each token: logits (B, T, V), an object with .logits, or a tuple that "
            "begins with them"
        )
    return out


def _scalar(loss: Any) -> Tensor:
    """Return what a criterion returned, or refuse what is not one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"criterion: returned {kind}; it must return one number, the mean over the targets, "
            'or their sum (of torch\'s own: reduction="mean" or reduction="sum")'
        )
    return loss


def _range(ids: Tensor) -> tuple[int, int]:
    return int(ids.min()), int(ids.max())


def shift(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Return for each position the label of the next, ``ignore_index`` where there is none."""
    if mask is not None:
        labels = labels.masked_fill(mask == 0, ignore_index)
    last = torch.full_like(labels[:, :1], ignore_index)
    return torch.cat([labels[:, 1:], last], dim=1)
