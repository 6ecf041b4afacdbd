"""One step: the same numbers for any split into micro-batches, clipping, skipping, fp16 scaling."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import resolve as settings
from fasttrain.config import TrainConfig, config_from_dict
from fasttrain.data.loader import Batch
from fasttrain.device import resolve_precision
from fasttrain.engine import step as step_module
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.saving import collect
from fasttrain.engine.step import (
    EMPTY,
    FINE,
    IGNORE_INDEX,
    NONFINITE,
    OVERFLOW,
    SPIKE,
    Ema,
    TrainStep,
)
from fasttrain.model.transformer import Transformer, run_block, run_blocks
from fasttrain.resolve import resolve

CPU = torch.device("cpu")
SMALL = {
    "run": {"compile": "off", "dtype": "fp32"},
    "model": {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2},
    "data": {"path": "unused", "seq_len": 12},
    "train": {"steps": 4, "max_grad_norm": 0.5},
}


LOOK_UPS = {"positions": "learned", "bigram_vocab_size": 8, "value_embeddings": True}


def make(
    dtype: str = "fp32",
    optimizer: str = "adamw",
    model: object = None,
    *,
    rounds_once: bool = False,
    **train: object,
) -> TrainStep:
    """Make a step; ``rounds_once``: as one that accumulates on a GPU."""
    values = {**SMALL, "run": {"compile": "off", "dtype": dtype}, "optim": {"name": optimizer}}
    values["train"] = {**SMALL["train"], **train}
    config: TrainConfig = config_from_dict({**values, "model": {**SMALL["model"], **(model or {})}})
    torch.manual_seed(0)
    model = Transformer(config.model, seq_len=config.data.seq_len)
    precision = resolve_precision(dtype, CPU)
    optimizers = build_optimizers(model, config.optim, precision.compute)
    resolved = replace(resolve(config, CPU), rounds_once=rounds_once)
    return TrainStep(model, optimizers, resolved)


def make_batch(tokens: Tensor, targets: Tensor) -> Batch:
    return Batch(tokens, targets, None, len(tokens))


def uneven_rows() -> tuple[Tensor, Tensor]:
    """Eight rows with very different numbers of targets; the last two rows have none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (8, 12), generator=generator)
    targets = torch.randint(0, 64, (8, 12), generator=generator)
    for row, n_ignored in enumerate((0, 1, 11, 5, 0, 9, 12, 12)):
        targets[row, 12 - n_ignored :] = IGNORE_INDEX
    return tokens, targets


def split(rows: tuple[Tensor, Tensor], n: int) -> list[Batch]:
    return [make_batch(*pair) for pair in zip(*(t.chunk(n) for t in rows), strict=True)]


def verdicts(step: TrainStep) -> list[int]:
    """Return the verdicts on the steps since this was last called."""
    return [numbers.verdict for numbers in step.numbers()]


class Recorder:
    """An optimizer that changes nothing, and keeps the gradients that it is given."""

    reads_clip_on_device = True

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.param_groups = [{"params": [*parameters], "lr": 0.0}]
        self.grads: list[Tensor] = []
        self.places: set[tuple[int, ...]] = set()

    def step(self, **_: Tensor) -> None:
        grads = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        self.grads = [grad.clone() for grad in grads]
        self.places.add(tuple(grad.data_ptr() for grad in grads))


def gradients(step: TrainStep, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the gradients of a step before clipping."""
    recorder = Recorder(step.parameters)
    step.optimizers = [recorder]
    step(batches, 0.0)
    assert len(recorder.grads) == len(step.parameters)
    return [grad / step.grad_scale for grad in recorder.grads]


@pytest.mark.parametrize("n_micro_batches", [2, 4, 8])
def test_R20_loss_and_gradient_do_not_depend_on_the_split(n_micro_batches: int) -> None:
    rows = uneven_rows()
    whole, parts = make(), make()
    expected = gradients(whole, split(rows, 1))
    actual = gradients(parts, split(rows, n_micro_batches))
    assert parts.loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)
    assert parts.norm.item() == pytest.approx(whole.norm.item(), rel=1e-5)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_R20_the_loss_is_the_mean_over_the_targets_that_count() -> None:
    step = make()
    tokens, targets = uneven_rows()
    with torch.no_grad():
        logits = step.model(tokens)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    step(split((tokens, targets), 4), 0.0)
    assert step.loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("judges", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "torch.optim.AdamW"])
def test_R20_a_step_without_any_target_is_finite_and_makes_no_update(
    optimizer: str, judges: bool
) -> None:
    def made() -> TrainStep:
        step = make(optimizer=optimizer.replace("torch.optim.AdamW", "adamw"), **train)
        if optimizer.startswith("torch"):
            step.optimizers = [torch.optim.AdamW(step.parameters, weight_decay=0.5)]
        step.judges = judges
        return step

    train: dict[str, Any] = {"on_spike": "skip", "ema_decay": 0.5}
    step, clean = made(), made()
    tokens, targets = uneven_rows()
    for one in (step, clean):
        one(split((tokens, targets), 1), 1e-2)
        assert verdicts(one) == [FINE]
    step([make_batch(tokens, torch.full_like(targets, IGNORE_INDEX))] * 2, 1e-2)
    assert step.loss.item() == 0.0
    assert step.norm.item() == 0.0
    assert verdicts(step) == [EMPTY]
    for one in (step, clean):
        one(split((tokens, targets), 1), 1e-2)
    after = everything(step)
    assert all(torch.equal(after[name], t) for name, t in everything(clean).items())


class BadGradient(torch.autograd.Function):
    """Returns a loss as it is, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, bad: float) -> Tensor:
        ctx.bad = bad
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.bad, None


def everything(step: TrainStep) -> dict[str, Tensor]:
    """Return copies of parameters, their average, moments, step counts, scale, spike window."""
    groups = collect(step)
    return {f"{g}/{n}": t.detach().clone() for g in groups for n, t in groups[g].items()}


@pytest.mark.parametrize("at_first", [True, False])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_R18_a_nonfinite_second_micro_batch_leaves_everything_bit_unchanged(
    optimizer: str, bad: float, where: str, at_first: bool
) -> None:
    train: dict[str, Any] = {"on_spike": "skip", "ema_decay": 0.5}
    step, clean = (make(optimizer=optimizer, **train) for _ in range(2))
    batches = split(uneven_rows(), 4)
    if not at_first:
        for one in (step, clean):
            one(batches, 1e-2)
            assert verdicts(one) == [FINE]
    before = everything(step)
    criterion, calls = step.criterion, iter(range(10))

    def poisoned(model: Transformer, *inputs: Tensor | None) -> Tensor:
        loss = criterion(model, *inputs)
        if next(calls) != 1:
            return loss
        return loss * bad if where == "loss" else BadGradient.apply(loss, bad)

    step.criterion = poisoned
    step(batches, 1e-2)
    assert verdicts(step) == [NONFINITE]
    after = everything(step)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    for name in after.keys() - before.keys():  # moments that the first step made are still empty
        assert not after[name].any(), name

    for one in (step, clean):  # and training goes on as if nothing had been
        one(batches, 1e-2)
        assert verdicts(one) == [FINE]
    resumed = everything(step)
    assert all(torch.equal(resumed[name], t) for name, t in everything(clean).items())
    assert not torch.equal(resumed["model/embedding.weight"], before["model/embedding.weight"])


def test_R20_an_all_masked_micro_batch_adds_nothing() -> None:
    tokens, targets = uneven_rows()
    ignored = make_batch(tokens, torch.full_like(targets, IGNORE_INDEX))
    plain, padded = make(), make()
    expected = gradients(plain, split((tokens, targets), 2))
    actual = gradients(padded, [ignored, *split((tokens, targets), 2), ignored])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert padded.loss.item() == plain.loss.item()


def test_a_spike_is_no_reason_to_change_the_fp16_scale() -> None:
    step = make("fp16", on_spike="skip", spike_window_steps=8)
    batches = split(uneven_rows(), 1)
    for _ in range(6):
        step(batches, 0.0)
    scale, before = step.grad_scale.item(), step.parameters[0].detach().clone()
    criterion = step.criterion
    step.criterion = lambda *batch: criterion(*batch) * 3
    step(batches, 1e-2)
    assert verdicts(step)[-1] == SPIKE
    assert step.grad_scale.item() == scale
    assert torch.equal(step.parameters[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_steps_that_are_not_skipped_has_the_bits_of_a_plain_one_in_fp32(
    dtype: torch.dtype,
) -> None:
    model = torch.nn.Linear(33, 7, dtype=dtype)
    plain, told = [p.detach().float() for p in model.parameters()], Ema(model, 0.75)
    plain = [p.clone() for p in plain]
    for _ in range(5):
        with torch.no_grad():
            model.weight.normal_()
        torch._foreach_lerp_(plain, [p.detach().float() for p in model.parameters()], 0.25)
        told.update(skipped=torch.zeros(()))
        told.update(skipped=torch.ones(()))
        for ours, theirs in zip(told.averages.values(), plain, strict=True):
            assert torch.equal(ours, theirs)


def test_the_update_is_that_of_torch_adamw_after_clipping() -> None:
    step = make()
    batches = split(uneven_rows(), 2)
    reference = make()
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"]}
        for g in reference.optimizers[0].param_groups
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        grads = gradients(reference, batches)
        for p, g in zip(reference.parameters, grads, strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters, 0.5)
        adamw.step()
        adamw.zero_grad()
        step(batches, 1e-2)
        assert step.norm.item() == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5  # clipping was at work
    for p, q in zip(step.parameters, reference.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_fp16_halves_its_scale_after_an_overflow_and_trains_on() -> None:
    step = make("fp16")
    step.grad_scale.fill_(2.0**40)  # far above what fp16 gradients can hold
    batches = split(uneven_rows(), 1)
    before = step.parameters[0].detach().clone()
    step(batches, 1e-2)
    assert step.grad_scale.item() == 2.0**39
    assert torch.equal(step.parameters[0], before)
    step.grad_scale.fill_(2.0**10)
    step(batches, 1e-2)
    assert verdicts(step) == [OVERFLOW, FINE]
    assert not torch.equal(step.parameters[0], before)
    full = make("fp32")
    full(batches, 1e-2)
    assert step.norm.item() == pytest.approx(full.norm.item(), rel=0.05)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bf16_computes_near_fp32_with_fp32_parameters(residual_in_fp32: bool) -> None:
    half, full = make("bf16", model={"residual_in_fp32": residual_in_fp32}), make("fp32")
    batches = split(uneven_rows(), 2)
    half(batches, 0.0)
    full(batches, 0.0)
    assert {p.dtype for p in half.parameters} == {torch.float32}
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.01)
    assert half.loss.dtype == torch.float32


def test_any_other_optimizer_trains_too() -> None:
    step, reference = make(max_grad_norm=None), make(max_grad_norm=None)
    step.optimizers = [torch.optim.SGD(step.parameters, lr=0.1)]
    batches = split(uneven_rows(), 2)
    grads = gradients(reference, batches)
    step(batches, 0.1)
    for p, q, g in zip(step.parameters, reference.parameters, grads, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-4, atol=1e-6)


def autograd_nodes(loss: Tensor) -> set[str]:
    """Return the names of what computes the gradients of ``loss``."""
    nodes = [loss.grad_fn]
    for node in nodes:  # which grows
        nodes += [n for n, _ in node.next_functions if n is not None and n not in nodes]
    return {node.name() for node in nodes}


@pytest.mark.parametrize(("model", "n_look_ups"), [({}, 1), (LOOK_UPS, 4)])
def test_R1_a_step_compiles_in_one_graph_and_adds_no_gradients_up_in_threads_order(
    model: dict[str, object], n_look_ups: int
) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    called: list[str] = []

    def run_as_it_is(graph: torch.fx.GraphModule, _: object) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    step = make(model=model)
    tokens, targets = uneven_rows()
    doc_starts = tokens % 4 == 0 if model else None
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run_as_it_is, decompositions=select_decomp_table())
    compiled = torch.compile(step.loss_fn, fullgraph=True, dynamic=False, backend=backend)
    loss = compiled(tokens, targets, doc_starts)
    loss.backward()
    grads = [p.grad for p in step.parameters]
    expected = step.loss_fn(tokens, targets, doc_starts)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for grad, other in zip(grads, torch.autograd.grad(expected, step.parameters), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    # Torch's index_put has threads add to a row in any order, compiled or not.
    assert called.count("fasttrain.embedding_backward.default") == n_look_ups
    assert not [name for name in called if "index_put" in name]
    assert not [name for name in autograd_nodes(expected) if name.startswith("Index")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_R20_matrices_rounded_once_a_step_give_the_bits_of_autocast(
    dtype: str, compiled: bool
) -> None:
    taken: list[set[torch.dtype]] = []

    def noted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        shapes = {(48, 16), (16, 16), (16, 64)}  # of matrices of blocks alone
        taken.append({t.dtype for t in inputs if hasattr(t, "shape") and (*t.shape,) in shapes})
        return graph.forward

    more = {"micro_batch": 2, "tokens_per_step": 96, "model": {"mlp": "gelu"}}
    plain, ours = make(dtype, **more), make(dtype, rounds_once=True, **more)
    names = [(name, id(p)) for name, p in ours.model.named_parameters()]
    for step in (plain, ours):
        if compiled:
            torch._dynamo.reset()
            options = {"fullgraph": True, "dynamic": False, "backend": noted}
            step.loss_fn = torch.compile(step.loss_fn, **options)
    for _ in range(2):
        for step in (plain, ours):
            step(split(uneven_rows(), 4), 1e-2)
        assert ours.loss.item() == plain.loss.item()
        assert ours.norm.item() == plain.norm.item() > 0
        assert [(name, id(p)) for name, p in ours.model.named_parameters()] == names
    assert taken == ([{torch.float32}, {plain.precision.compute}] if compiled else [])
    for a, b in zip(plain.parameters, ours.parameters, strict=True):
        assert torch.equal(a, b)


class _Additions(TorchDispatchMode):
    """Counts what adds to tensors in place, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_gradients_of_a_micro_batch_are_added_together() -> None:
    """Those in fp32, and those of the copies; autograd adds each alone, from the second on."""
    more = {"micro_batch": 2, "tokens_per_step": 96}
    found = []
    for step in (make("bf16", **more), make("bf16", rounds_once=True, **more)):
        with _Additions() as additions:
            step._backward(split(uneven_rows(), 4))
        found.append(additions.found)
    assert found[0]["add_"] - found[1]["add_"] == 3 * len(step.parameters)
    assert found[1]["_foreach_add_"] == 2 * 4
    assert found[1]["_foreach_copy_"] == 1


class _Captured(torch.autograd.Function):
    """A loss whose gradients lie where those of the call before lay, as a CUDA graph's do."""

    @staticmethod
    def forward(ctx: Any, loss_of: Any, pool: list[Tensor], *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = loss_of()
            ctx.grads = torch.autograd.grad(loss, parameters)
        ctx.pool = pool
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        for place, value in zip(ctx.pool, ctx.grads, strict=True):
            place.copy_(value)
        return None, None, *(place.detach() for place in ctx.pool)


def test_gradients_of_cuda_graphs_accumulate_in_buffers_outside_their_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches, more = split(uneven_rows(), 4), {"micro_batch": 2, "tokens_per_step": 96}
    expected = gradients(make(**more), batches)
    monkeypatch.setattr(settings, "resolve_compile", lambda config, device: "cuda-graphs")
    monkeypatch.setattr(step_module, "compile_function", lambda fn, mode, **_: fn)
    step = make(**more)
    pool, loss_fn = [torch.empty_like(p) for p in step.parameters], step.loss_fn
    step.loss_fn = lambda *inputs: _Captured.apply(lambda: loss_fn(*inputs), pool, *step.parameters)
    recorder = Recorder(step.parameters)
    step.optimizers = [recorder]
    for _ in range(2):
        for p in step.parameters:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad.fill_(1.0)  # of the caller's
        step(batches, 0.0)
        for ours, grad in zip(recorder.grads, expected, strict=True):
            torch.testing.assert_close(ours, grad)
        assert not any(p.grad.any() for p in step.parameters)
    assert len(recorder.places) == 1


# torch's own tracing looks at .grad of the hidden states, and warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_one_compiled_block_serves_all_layers_and_computes_the_same() -> None:
    values = {**SMALL, "model": {**SMALL["model"], "n_layers": 3, "value_embeddings": True}}
    config = config_from_dict(values)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    steps = []
    for mode in ("off", "blocks"):
        torch.manual_seed(0)
        model = Transformer(config.model, seq_len=config.data.seq_len)
        precision = resolve_precision("fp32", CPU)
        step = TrainStep(
            model,
            build_optimizers(model, config.optim, precision.compute),
            resolve(config, CPU),
        )
        if mode == "blocks":
            run = torch.compile(run_block, fullgraph=True, dynamic=False, backend="aot_eager")
            model.blocks_fn = partial(run_blocks, run=run)
        steps.append(step)
    batches = split(uneven_rows(), 2)
    eager, compiled = (gradients(step, batches) for step in steps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
