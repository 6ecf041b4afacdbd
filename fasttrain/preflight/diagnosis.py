"""Why does the loss not fall? A checklist, run on one batch and on a copy of the model.

Each line passes, warns or fails, and says what to do. It works for any module that maps token ids
(B, T) to logits (B, T, V), to a tuple that begins with them, or to an object with ``logits``, and
for our `Transformer`, whose forward pass ends before its head.

Legend: B batch, T sequence, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.config import UserError, counted
from fasttrain.library.objective import by_key, logits_of, shift

Status = Literal["pass", "warn", "fail"]

# A first loss above ln V means that the model is sure of what it cannot know. Initialised as GPT-2
# or as here it is within 0.3 of it.
LOSS_WARN, LOSS_FAIL = 0.5, 2.0
# Root mean square of a module's output: at initialisation 1 to 10 in this field.
RMS_WARN, RMS_FAIL = 1e2, 1e3
# Norm of the whole gradient: about 1 at initialisation.
NORM_WARN, NORM_FAIL = 1e2, 1e4
N_STEPS = 8  # on the one batch: with AdamW at 1e-3 the loss of any sound model falls by then

# What to do where a check does not pass, unless the check itself knows better.
REMEDIES = {
    "shape": "give both as (B, T) with at least one token, and as integers: .long()",
    "range": "use the model's own tokenizer, or raise its vocabulary size",
    "labels": "take inputs = ids[:, :-1], targets = ids[:, 1:], unless the model shifts itself",
    "forward": "is the batch longer than the model's positions, or on another device?",
    "finite": "look for a division, root or logarithm of zero in that layer, or train in bf16",
    "activations": "initialize with smaller values (normal with std 1/sqrt(fan-in)), or add norms",
    "first loss": "initialize the head with smaller values (normal, std 0.02), or check the labels",
    "causality": "mask attention (is_causal=True) and look for norms or shifts along the sequence",
    "frozen": "intended in fine-tuning; otherwise call .requires_grad_(True)",
    "gradient norm": "initialize with smaller values, clip (train.max_grad_norm), or warm up",
    "gradients": "use the layer in forward; look for detach(), no_grad(), .data, dead activations",
    "learning": "the model does not learn a single batch: check the lines above, and the loss",
    "optimizer": "build it from this very model's parameters, after moving or wrapping it",
    "learning rate": "0 freezes the group; above 1 is usually a mistake",
    "update": "see the gradients and rates above; a bf16 parameter may round its step away",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the checklist."""

    check: str
    status: Status
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.status:4}  {self.check}: {self.detail}"
        return f"{text}\n      → {self.remedy}" if self.remedy else text


@dataclass(slots=True)
class Diagnosis:
    """The checklist's lines in order."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether any line failed."""
        return any(f.status == "fail" for f in self.findings)

    def add(self, check: str, status: Status, detail: str, remedy: str = "") -> bool:
        """Append a line, with a remedy if it does not pass; return whether it is no failure."""
        remedy = "" if status == "pass" else remedy or REMEDIES[check]
        self.findings.append(Finding(check, status, detail, remedy))
        return status != "fail"

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ignore_index: int = -100,
) -> Diagnosis:
    """Run the checklist; model, optimizer and random state are left as they were.

    Args:
        model: maps token ids (B, T) to logits (B, T, V).
        batch: a pair ``(tokens, targets)``, or a mapping with ``input_ids`` and ``target_ids`` or
            ``labels`` (which may be the tokens themselves, as `transformers` has them); integers
            (B, T) each, on the model's device.
        optimizer: what trains it, with the learning rates that it will use; None: not checked.
        ignore_index: the target of positions that the loss leaves out.

    Returns:
        The findings in the order of the checks. A fault that makes the rest meaningless ends them.

    Raises:
        UserError: the batch has none of these forms.

    Memory: two copies of the model, of which one with AdamW's state, and its logits.
    """
    report = Diagnosis()
    checks = _Checks(report.add, model, *_unpack(report, batch, ignore_index), ignore_index)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        if checks.data() and checks.forward():
            checks.causality()
            checks.training()
            one = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
            checks.optimizers(list(one or ()))
    return report


def _unpack(report: Diagnosis, batch: Any, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets; labels that are the tokens themselves are shifted."""
    given = by_key(batch)
    tokens = given["input_ids"]
    if "target_ids" in given:
        return tokens, given["target_ids"]
    labels = given.get("labels", tokens)
    alike = tokens.ndim == 2 and labels.shape == tokens.shape
    if alike and ((labels == tokens) | (labels == ignore_index)).all():
        remedy = "right for fasttrain.Trainer and transformers, which shift them; else shift them"
        report.add("labels", "warn", "are the tokens themselves, shifted here", remedy)
        labels = shift(labels, given.get("attention_mask"), ignore_index)
    return tokens, labels


@dataclass
class _Checks:
    """The checks of one model on one batch; where one returns False, the rest is meaningless."""

    add: Callable[..., bool]  # of the report
    model: nn.Module
    tokens: Tensor
    targets: Tensor
    ignore_index: int

    def data(self) -> bool:
        """Check shape, range and labels; return whether the model can be run on the batch."""
        add, tokens, targets = self.add, self.tokens, self.targets
        given = {"tokens": tokens, "targets": targets}
        shaped = tokens.ndim == 2 and tokens.shape == targets.shape and tokens.numel()
        if not shaped or any(ids.is_floating_point() for ids in given.values()):
            found = ", ".join(f"{n} {tuple(ids.shape)} {ids.dtype}" for n, ids in given.items())
            return add("shape", "fail", found)
        add("shape", "pass", f"{tokens.shape[0]} rows of {tokens.shape[1]} tokens")
        size, kept = _vocab_size(self.model), targets[targets != self.ignore_index]
        if size is not None:
            for name, ids in (("tokens", tokens), ("targets", kept)):
                if (wrong := ids[(ids < 0) | (ids >= size)]).numel():
                    found = f"{wrong.numel()} {name} outside [0, {size}), such as {int(wrong[0])}"
                    return add("range", "fail", found)
            add("range", "pass", f"ids {int(tokens.min())} to {int(tokens.max())} of {size}")
        if kept.numel() == 0:
            return add("targets", "fail", "all are ignored", f"keep some not {self.ignore_index}")
        if (inner := targets[:, :-1] != self.ignore_index).any():
            own, following = (
                (targets[:, :-1] == side)[inner].float().mean().item()
                for side in (tokens[:, :-1], tokens[:, 1:])
            )
            status: Status = "pass" if following == 1.0 else "warn" if following > 0.5 else "fail"
            detail = f"{following:.1%} of the targets are the next token"
            if own > max(following, 0.99):
                status = "fail"
                detail = "each target is the very token it stands at: the model would learn to copy"
            add("labels", status, detail)
        return True

    def loss(self, logits: Tensor) -> Tensor:
        flat, targets = logits.float().flatten(0, 1), self.targets.flatten()
        return F.cross_entropy(flat, targets, ignore_index=self.ignore_index)

    @torch.no_grad()
    def forward(self) -> bool:
        """Check parameters, activations, the shape of the logits and the first loss."""
        add, tokens, seen = self.add, self.tokens, list[tuple[str, float]]()
        probe = copy.deepcopy(self.model).eval()

        def record(name: str, module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                seen.append((name, out.float().square().mean().sqrt().item()))

        for name, module in probe.named_modules():
            module.register_forward_hook(partial(record, name or "the model"))
        try:
            logits = _logits(probe, tokens)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            return add("forward", "fail", f"the model raises {type(error).__name__}: {error}")
        except UserError as error:
            return add("logits", "fail", *str(error).split("; ", 1))
        first = next((name for name, rms in seen if not math.isfinite(rms)), None)
        broken = [n for n, p in self.model.named_parameters() if not p.isfinite().all()]
        if broken or first or not logits.isfinite().all():
            detail = f"NaN or infinity first comes out of {first or 'the head'}"
            if not broken:
                return add("finite", "fail", detail)
            detail += f"; not finite itself: {', '.join(broken[:3])}"
            return add("finite", "fail", detail, "reload the weights of that layer")
        add("finite", "pass", "parameters, activations and logits")
        name, rms = max(seen, key=lambda item: item[1], default=("", 0.0))
        detail = f"the largest come out of {name}, root mean square {rms:.3g}"
        add("activations", _graded(rms, RMS_WARN, RMS_FAIL), detail)
        loss, ln_v = self.loss(logits).item(), math.log(logits.shape[2])
        status, remedy = _graded(loss - ln_v, LOSS_WARN, LOSS_FAIL), ""
        if loss < ln_v - LOSS_WARN:
            status, remedy = "warn", "right for trained weights; in new ones targets leak or repeat"
        add("first loss", status, f"{loss:.3f}, ln V = {ln_v:.3f}", remedy)
        return True

    @torch.no_grad()
    def causality(self) -> None:
        """Check that changing the tokens from the middle on leaves the logits before it alone."""
        tokens, middle = self.tokens, self.tokens.shape[1] // 2
        if middle == 0:
            return
        probe = copy.deepcopy(self.model).eval()
        for p in probe.parameters():
            if not p.any():  # projections and gates that start at zero would hide the attention
                p.normal_(std=p.shape[-1] ** -0.5 if p.ndim else 1.0)
        size = _vocab_size(self.model) or int(tokens.max()) + 1
        changed = tokens.clone()
        changed[:, middle:] = (changed[:, middle:] + 1) % size
        a, b = _logits(probe, tokens)[:, :middle], _logits(probe, changed)[:, :middle]
        largest = (a - b).abs().max().item()
        # Rounding differs with the values that share a block: some ulps of the narrowest dtype.
        narrow = torch.is_autocast_enabled(tokens.device.type) or a.dtype != torch.float32
        tolerance = (5e-2 if narrow else 1e-4) * max(a.abs().max().item(), 1e-3)
        if largest <= tolerance:
            self.add("causality", "pass", "no position depends on a later token")
            return
        moved = ((a - b).abs().amax(dim=(0, 2)) > tolerance).nonzero()[0].item()
        detail = f"logits at position {moved} change by {largest:.3g} with tokens from {middle} on"
        self.add("causality", "fail", detail)

    def step(self, probe: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> float:
        """Train a copy on the batch for a step; return the loss. The gradients stay."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = self.loss(_logits(probe, self.tokens))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    def training(self) -> None:
        """Train a copy on the batch: gradients everywhere, of a sane size, and a falling loss."""
        add = self.add
        if frozen := [n for n, p in self.model.named_parameters() if not p.requires_grad]:
            add("frozen", "warn", f"no gradient for {_named(frozen)}")
        probe = copy.deepcopy(self.model).train()
        params = {n: p for n, p in probe.named_parameters() if p.requires_grad}
        if not params:
            add("gradients", "fail", "no parameter takes one", "call .requires_grad_(True)")
            return
        adamw = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.0)
        lost, losses = set(params), list[float]()
        # Several steps, as behind a matrix that starts at zero the first has no gradient.
        for _ in range(N_STEPS):
            losses.append(self.step(probe, [adamw]))
            grads = {n: p.grad for n, p in params.items() if p.grad is not None}
            lost -= {n for n, grad in grads.items() if grad.any()}
            if len(losses) == 1 and grads and not self.norm(grads):
                return
        detail = f"all {len(params)} parameters get one"
        if lost:
            detail = f"none in {N_STEPS} steps for {_named([n for n in params if n in lost])}"
        add("gradients", "fail" if lost else "pass", detail)
        detail = f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f} in {N_STEPS} AdamW steps"
        add("learning", "pass" if losses[-1] < losses[0] else "warn", detail)

    def norm(self, grads: dict[str, Tensor]) -> bool:
        """Check the norm of the gradient; return whether it is finite."""
        norms = {n: grad.float().norm().item() for n, grad in grads.items()}
        total = math.hypot(*norms.values())
        if not math.isfinite(total):
            # Backward runs from the end: the last of these layers was the first to break.
            last = [n for n, v in norms.items() if not math.isfinite(v)][-1]
            remedy = "look for a root, norm or division of zero there, or train in bf16"
            return self.add("gradient norm", "fail", f"not finite, first in {last}", remedy)
        detail = f"{total:.3g}, most of it in {max(norms, key=lambda n: norms[n])}"
        self.add("gradient norm", _graded(total, NORM_WARN, NORM_FAIL), detail)
        return True

    def optimizers(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Check learning rates, and that a step changes every parameter that it should."""
        if not optimizers:
            return
        add, groups = self.add, [g for o in optimizers for g in o.param_groups]
        held = {id(p) for g in groups for p in g["params"]}
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if outside := [n for n, p in trained.items() if id(p) not in held]:
            add("optimizer", "fail", _named(outside, " in no optimizer"))
        rates = [float(g["lr"]) for g in groups]
        if not any(rates):
            remedy = "raise it, or look at the schedule: a warmup must not stay at zero"
            add("learning rate", "fail", "zero: nothing will change", remedy)
            return
        status: Status = "warn" if 0.0 in rates or max(rates) > 1.0 else "pass"
        add("learning rate", status, ", ".join(f"{r:.3g}" for r in rates))
        probe, steppers = copy.deepcopy((self.model, optimizers))
        for _ in range(3):
            self.step(probe, steppers)
        after = dict(probe.named_parameters())
        same = [n for n, p in trained.items() if torch.equal(after[n], p) and n not in outside]
        detail = f"3 steps do not change {_named(same)}" if same else "they change every parameter"
        add("update", "pass" if not same else "warn" if 0.0 in rates else "fail", detail)


def _graded(value: float, warn: float, fail: float) -> Status:
    return "fail" if value > fail else "warn" if value > warn else "pass"


def _named(names: list[str], where: str = "") -> str:
    return f"{counted(len(names), 'parameter')}{where}: {', '.join(names[:3])}"


def _vocab_size(model: nn.Module) -> int | None:
    """Return how many tokens the model knows: what it says, else the rows of its first table."""
    for owner in (model, getattr(model, "config", None)):
        size = getattr(owner, "vocab_size", None)
        if isinstance(size, int):
            return size
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    torch.clear_autocast_cache()  # it would hold old weights
    return logits_of(model(tokens), tokens)
