"""Why does the loss not fall? A checklist, run on one batch and on a copy of the model.

Each line passes, warns or fails, and says what to do. It works for any module that maps token ids
(B, T) to logits (B, T, V), to a tuple that begins with them, or to an object with ``logits``, and
for our `Transformer`, whose forward pass ends before its head.

Legend: B batch, T sequence, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.config_keys import counted
from fasttrain.diagnosis_forward import (
    Diagnosis,
    Finding,
    Status,
    check_causality,
    check_data,
    check_forward,
    check_labels,
    loss_of,
    unpack,
)

__all__ = ["Diagnosis", "Finding", "diagnose"]

# Norm of the whole gradient: about 1 at initialisation.
NORM_WARN, NORM_FAIL = 1e2, 1e4
N_STEPS = 8  # on the one batch: with AdamW at 1e-3 any sound model falls visibly by then


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
