"""Why does the loss not fall? A checklist, run on one batch and on a copy of the model.

Each line passes, warns or fails, and says what to do. It works for any module that maps token ids
(B, T) to logits (B, T, V), to a tuple that begins with them, or to an object with ``logits``, and
for our `Transformer`, whose forward pass ends before its head.

Legend: B batch, T sequence, V vocabulary.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.config.keys import counted
from fasttrain.objective import by_key, logits_of, shift

# Norm of the whole gradient: about 1 at initialisation.

NORM_WARN, NORM_FAIL = 1e2, 1e4
N_STEPS = 8  # on the one batch: with AdamW at 1e-3 any sound model falls visibly by then
Status = Literal["pass", "warn", "fail"]

# A first loss above ln V means that the model is sure of what it cannot know. Initialised as GPT-2
# or as here it is within 0.3 of it.
LOSS_WARN, LOSS_FAIL = 0.5, 2.0
# Root mean square of a module's output: at initialisation 1 to 10 in this field.
RMS_WARN, RMS_FAIL = 1e2, 1e3


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

    def add(self, check: str, status: Status, detail: str, remedy: str = "") -> None:
        """Append a line; the remedy is for one that does not pass."""
        self.findings.append(Finding(check, status, detail, remedy if status != "pass" else ""))

    def passed(self, check: str, detail: str) -> None:
        self.add(check, "pass", detail)

    def warn(self, check: str, detail: str, remedy: str) -> None:
        self.add(check, "warn", detail, remedy)

    def fail(self, check: str, detail: str, remedy: str) -> None:
        self.add(check, "fail", detail, remedy)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


# ---- data ----------------------------------------------------------------------------------------


def unpack(report: Diagnosis, batch: Any, ignore_index: int) -> tuple[Tensor, Tensor]:
    if hasattr(batch, "targets"):
        return batch.tokens, batch.targets
    given = by_key(batch)
    tokens = given["input_ids"]
    if "target_ids" in given:
        return tokens, given["target_ids"]
    labels = given.get("labels", tokens)
    alike = tokens.ndim == 2 and labels.shape == tokens.shape
    if alike and ((labels == tokens) | (labels == ignore_index)).all():
        report.warn(
            "labels",
            "are the tokens themselves, shifted here",
            "right for fasttrain.Trainer and transformers, which shift them; else shift them",
        )
        labels = shift(labels, given.get("attention_mask"), ignore_index)
    return tokens, labels


def _vocab_size(model: nn.Module) -> int | None:
    """Return how many tokens the model knows: what it says, else the rows of its first table."""
    for owner in (model, getattr(model, "config", None)):
        size = getattr(owner, "vocab_size", None)
        if isinstance(size, int):
            return size
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def check_data(
    report: Diagnosis, model: nn.Module, tokens: Tensor, targets: Tensor, ignore_index: int
) -> bool:
    """Check shape and range; return whether the model can be run on the batch."""
    if tokens.ndim != 2 or tokens.shape != targets.shape or tokens.numel() == 0:
        report.fail(
            "shape",
            f"tokens {tuple(tokens.shape)}, targets {tuple(targets.shape)}",
            "give both as (B, T) with at least one token",
        )
        return False
    if tokens.is_floating_point() or targets.is_floating_point():
        report.fail("shape", f"{tokens.dtype} tokens, {targets.dtype} targets", "use .long()")
        return False
    report.passed("shape", f"{tokens.shape[0]} rows of {tokens.shape[1]} tokens")
    size = _vocab_size(model)
    kept = targets[targets != ignore_index]
    if size is not None:
        for name, ids in (("tokens", tokens), ("targets", kept)):
            wrong = (ids < 0) | (ids >= size)
            if wrong.any():
                report.fail(
                    "range",
                    f"{int(wrong.sum())} {name} outside [0, {size}), such as {int(ids[wrong][0])}",
                    "use the model's own tokenizer, or raise its vocabulary size",
                )
                return False
        report.passed("range", f"ids {int(tokens.min())} to {int(tokens.max())} of {size}")
    if kept.numel() == 0:
        report.fail("targets", "all are ignored: no loss", f"keep some other than {ignore_index}")
        return False
    if (tokens == tokens[0, 0]).all() and tokens.numel() > 1:
        report.warn("variety", "all tokens are the same", "look at the data")
    elif tokens.shape[0] > 1 and (tokens == tokens[:1]).all():
        report.warn("variety", "all rows are the same", "look at how batches are drawn")
    return True


def check_labels(report: Diagnosis, tokens: Tensor, targets: Tensor, ignore_index: int) -> None:
    inner = targets[:, :-1] != ignore_index
    if not inner.any():
        return
    here, there = targets[:, :-1][inner], tokens[:, 1:][inner]
    share = (here == there).float().mean().item()
    same = (here == tokens[:, :-1][inner]).float().mean().item()
    if share == 1.0:
        report.passed("labels", "each target is the next token")
    elif same > max(share, 0.99):
        report.fail(
            "labels",
            "each target is the very token it stands at: the model would learn to copy",
            "shift: inputs = ids[:, :-1], targets = ids[:, 1:] (not where the model shifts itself)",
        )
    else:
        report.add(
            "labels",
            "warn" if share > 0.5 else "fail",
            f"{share:.1%} of the targets are the next token",
            "unless that is meant, take inputs = ids[:, :-1] and targets = ids[:, 1:]",
        )


# ---- forward -------------------------------------------------------------------------------------


def _logits(model: nn.Module, tokens: Tensor) -> Any:
    torch.clear_autocast_cache()  # it would hold old weights
    return logits_of(model(tokens))


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = _logits(model, tokens)
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=ignore_index
    )


@contextmanager
def _outputs(model: nn.Module, seen: list[tuple[str, float]]) -> Iterator[None]:
    """Collect the name and the output's root mean square of each module, innermost first."""

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                seen.append((name, out.detach().float().square().mean().sqrt().item()))

        return note

    handles = [m.register_forward_hook(hook(n or "the model")) for n, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_forward(
    report: Diagnosis, model: nn.Module, tokens: Tensor, targets: Tensor, ignore_index: int
) -> bool:
    """Check parameters, activations, the shape of the logits and the first loss."""
    broken = [n for n, p in model.named_parameters() if not p.isfinite().all()]
    seen: list[tuple[str, float]] = []
    try:
        with torch.no_grad(), _evaluating(model), _outputs(model, seen):
            logits = _logits(model, tokens)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        report.fail(
            "forward",
            f"the model raises {type(error).__name__}: {error}",
            "is the batch longer than the model's positions, or on another device?",
        )
        return False
    if not isinstance(logits, Tensor) or logits.shape[:-1] != tokens.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        report.fail(
            "logits",
            f"{found} for tokens {tuple(tokens.shape)}",
            "return one row of logits for each token: (B, T, V)",
        )
        return False
    first = next((name for name, rms in seen if not math.isfinite(rms)), None)
    if broken or first or not logits.isfinite().all():
        held = f"; not finite itself: {', '.join(broken[:3])}" if broken else ""
        report.fail(
            "finite",
            f"NaN or infinity first comes out of {first or 'the head'}{held}",
            "reload the weights of that layer"
            if broken
            else "look for a division, root or logarithm of zero in that layer, or train in bf16",
        )
        return False
    report.passed("finite", "parameters, activations and logits")
    name, rms = max(seen, key=lambda item: item[1], default=("", 0.0))
    status: Status = "fail" if rms > RMS_FAIL else "warn" if rms > RMS_WARN else "pass"
    report.add(
        "activations",
        status,
        f"the largest come out of {name}, root mean square {rms:.3g}",
        "initialise smaller: normal with 1/sqrt(fan-in), or add norms",
    )
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=ignore_index
    ).item()
    ln_v = math.log(logits.shape[2])
    detail = f"{loss:.3f}, ln V = {ln_v:.3f}"
    if loss > ln_v + LOSS_WARN:
        status = "fail" if loss > ln_v + LOSS_FAIL else "warn"
        remedy = "initialise the head smaller, such as normal with 0.02; or the labels are wrong"
        report.add("first loss", status, detail, remedy)
    elif loss < ln_v - LOSS_WARN:
        remedy = "right for trained weights; in new ones targets leak or repeat"
        report.warn("first loss", detail, remedy)
    else:
        report.passed("first loss", detail)
    return True


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def check_causality(report: Diagnosis, model: nn.Module, tokens: Tensor) -> None:
    """Check that other tokens from the middle on leave the logits before it alone."""
    middle = tokens.shape[1] // 2
    if middle == 0:
        return
    probe = copy.deepcopy(model).eval()
    for p in probe.parameters():
        if not p.any():  # projections and gates that start at zero would hide what attention sees
            p.normal_(std=p.shape[-1] ** -0.5 if p.ndim else 1.0)
    size = _vocab_size(model) or int(tokens.max()) + 1
    changed = tokens.clone()
    changed[:, middle:] = (changed[:, middle:] + 1) % size
    a, b = _logits(probe, tokens)[:, :middle], _logits(probe, changed)[:, :middle]
    largest = (a - b).abs().max().item()
    # Rounding differs with the values that share a block: some ulps of the narrowest dtype used.
    narrow = torch.is_autocast_enabled(tokens.device.type) or a.dtype != torch.float32
    tolerance = (5e-2 if narrow else 1e-4) * max(a.abs().max().item(), 1e-3)
    if largest > tolerance:
        moved = ((a - b).abs().amax(dim=(0, 2)) > tolerance).nonzero()[0].item()
        report.fail(
            "causality",
            f"logits at position {moved} change by {largest:.3g} with tokens from {middle} on",
            "mask attention (is_causal=True) and look for norms or shifts along the sequence",
        )
    else:
        report.passed("causality", "no position depends on a later token")


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
        batch: a pair ``(tokens, targets)``, a mapping with ``input_ids`` and ``target_ids`` or
            ``labels`` (which may be the tokens themselves, as `transformers` has them), or an
            object with ``tokens`` and ``targets``; integers (B, T) each, on the model's device.
        optimizer: what trains it, with the learning rates that it will use; None: not checked.
        ignore_index: the target of positions that the loss leaves out.

    Returns:
        The findings in the order of the checks. A fault that makes the rest meaningless ends them.

    Raises:
        UserError: the batch has none of these forms.

    Memory: two copies of the model, of which one with AdamW's state, and its logits.
    """
    report = Diagnosis()
    optimizers = (
        [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    )
    tokens, targets = unpack(report, batch, ignore_index)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        if not check_data(report, model, tokens, targets, ignore_index):
            return report
        check_labels(report, tokens, targets, ignore_index)
        if not check_forward(report, model, tokens, targets, ignore_index):
            return report
        check_causality(report, model, tokens)
        _check_training(report, model, tokens, targets, ignore_index)
        _check_optimizers(report, model, optimizers, tokens, targets, ignore_index)
    return report


# ---- backward and update -------------------------------------------------------------------------


def _check_training(
    report: Diagnosis, model: nn.Module, tokens: Tensor, targets: Tensor, ignore_index: int
) -> None:
    """Train a copy on the one batch: gradients everywhere, of a sane size, and a falling loss."""
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        report.warn(
            "frozen",
            f"no gradient for {counted(len(frozen), 'parameter')}: {', '.join(frozen[:3])}",
            "right where meant, as in fine-tuning; else .requires_grad_(True)",
        )
    probe = copy.deepcopy(model).train()
    params = {n: p for n, p in probe.named_parameters() if p.requires_grad}
    if not params:
        report.fail("gradients", "no parameter takes one", "call .requires_grad_(True)")
        return
    adamw = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.0)
    reached: set[str] = set()
    losses: list[float] = []
    for _ in range(N_STEPS):
        loss = loss_of(probe, tokens, targets, ignore_index)
        losses.append(loss.item())
        adamw.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        grads = {n: p.grad for n, p in params.items() if p.grad is not None}
        reached |= {n for n, grad in grads.items() if grad.any()}
        if len(losses) == 1 and grads and not _norm(report, grads):
            return
        adamw.step()
    # Several steps, for behind a matrix that starts at zero there is no gradient in the first.
    lost = [n for n in params if n not in reached]
    if lost:
        report.fail(
            "gradients",
            f"none in {N_STEPS} steps for {counted(len(lost), 'parameter')}: {', '.join(lost[:3])}",
            "use the layer in forward; look for detach(), no_grad(), .data or a dead activation",
        )
    else:
        report.passed("gradients", f"all {len(params)} parameters get one")
    status: Status = "pass" if losses[-1] < losses[0] else "warn"
    report.add(
        "learning",
        status,
        f"the batch's loss goes from {losses[0]:.3f} to {losses[-1]:.3f} in {N_STEPS} AdamW steps",
        "one batch is not learnt: see the lines above, and the loss",
    )


def _norm(report: Diagnosis, grads: dict[str, Tensor]) -> bool:
    norms = {n: grad.float().norm().item() for n, grad in grads.items()}
    total = math.sqrt(sum(v * v for v in norms.values()))
    if not math.isfinite(total):
        # Backward runs from the end: the last of these layers was the first to break.
        last = [n for n, v in norms.items() if not math.isfinite(v)][-1]
        report.fail(
            "gradient norm",
            f"not finite, first in {last}",
            "look for a root, norm or division of zero there, or train in bf16",
        )
        return False
    status: Status = "fail" if total > NORM_FAIL else "warn" if total > NORM_WARN else "pass"
    largest = max(norms, key=lambda n: norms[n])
    report.add(
        "gradient norm",
        status,
        f"{total:.3g}, most of it in {largest}",
        "initialise smaller, clip (train.max_grad_norm), warm up",
    )
    return True


def _check_optimizers(
    report: Diagnosis,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    tokens: Tensor,
    targets: Tensor,
    ignore_index: int,
) -> None:
    """Check learning rates, and that a step changes every parameter that it should."""
    if not optimizers:
        return
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    outside = [n for n, p in names.items() if id(p) not in held]
    if outside:
        report.fail(
            "optimizer",
            f"{counted(len(outside), 'parameter')} in no optimizer: {', '.join(outside[:3])}",
            "build it from this very model's parameters, after moving or wrapping it",
        )
    rates = [float(g["lr"]) for o in optimizers for g in o.param_groups]
    if not any(rates):
        report.fail(
            "learning rate",
            "zero: nothing will change",
            "raise it, or look at the schedule: a warmup must not start at zero and stay there",
        )
        return
    status: Status = "warn" if 0.0 in rates or max(rates) > 1.0 else "pass"
    report.add(
        "learning rate",
        status,
        ", ".join(f"{r:.3g}" for r in rates),
        "zero leaves its group as it is; above 1 is rarely meant",
    )
    probe, steppers = copy.deepcopy((model, optimizers))
    before = {n: p.detach().clone() for n, p in probe.named_parameters() if p.requires_grad}
    for _ in range(3):
        loss = loss_of(probe, tokens, targets, ignore_index)
        for stepper in steppers:
            stepper.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for stepper in steppers:
            stepper.step()
    same = [n for n, p in probe.named_parameters() if n in before and torch.equal(p, before[n])]
    same = [n for n in same if n not in outside]
    if same:
        report.add(
            "update",
            "fail" if 0.0 not in rates else "warn",
            f"3 steps do not change {counted(len(same), 'parameter')}: {', '.join(same[:3])}",
            "see the gradients and learning rates above; a bf16 parameter may round its step away",
        )
    else:
        report.passed("update", "a step changes every parameter")
