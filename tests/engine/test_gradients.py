"""A step owns its gradients: nothing older counts, what trains is judged, hooks see the mean."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import FusedAdamW, Muon
from torch import Tensor, nn

from fasttrain.config import config_from_dict
from fasttrain.data.loader import Batch
from fasttrain.distributed.world import World
from fasttrain.engine.ema import Ema
from fasttrain.engine.step import EMPTY, FINE, TrainStep
from fasttrain.resolve import resolve, resolve_custom
from tests.engine.test_step import (
    IGNORE_INDEX,
    Recorder,
    everything,
    gradients,
    make,
    make_batch,
    split,
    uneven_rows,
    verdicts,
)

V = 12


class Rows:
    """A batch of a custom model."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.targets = (tokens + 1) % V


def custom_loss(model: nn.Module, batch: Rows, scale: Tensor) -> Tensor:
    logits = model(batch.tokens).flatten(0, 1)
    return F.cross_entropy(logits, batch.targets.flatten(), reduction="sum") * scale


def custom_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, n_micro: int = 1, **train: Any
) -> TrainStep:
    sections = {
        "run": {"device": "cpu", "dtype": "fp32"},
        "train": {"steps": 9, "max_grad_norm": None, **train},
    }
    config = config_from_dict(sections)
    resolved = resolve_custom(config, torch.device("cpu"), World())
    return TrainStep(model, [optimizer], resolved, criterion=custom_loss, n_micro=n_micro)


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, V))


def rows(seed: int = 0, n: int = 6) -> Rows:
    return Rows(torch.randint(V, (n, 7), generator=torch.Generator().manual_seed(seed)))


def mean_gradients(model: nn.Module, *batches: Rows) -> list[Tensor | None]:
    """Return the gradients of the mean loss over the batches, from a plain loop on a copy."""
    model = copy.deepcopy(model)
    model.zero_grad()
    n_targets = sum(batch.targets.numel() for batch in batches)
    for batch in batches:
        custom_loss(model, batch, torch.tensor(1 / n_targets)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("n_micro", [1, 2])
def test_R37_a_parameter_that_no_optimizer_holds_keeps_no_gradient_and_does_not_count(
    n_micro: int,
) -> None:
    model = toy()
    step = custom_step(model, torch.optim.SGD(model[2].parameters(), lr=0.1), n_micro)
    batches = [rows(i) for i in range(n_micro)]
    for _ in range(3):
        head = mean_gradients(model, *batches)[3:]
        step(batches, None)
        expected = torch.stack([g.norm() for g in head if g is not None]).norm()
        assert step.norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("recheck", [False, True])
def test_R37_a_gradient_from_before_a_step_is_no_part_of_it(recheck: bool) -> None:
    model = toy()
    step = custom_step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    expected = mean_gradients(model, rows())
    for _ in range(2):
        custom_loss(model, rows(5), torch.tensor(3.0)).backward()
        recorder = Recorder(model.parameters())
        step.optimizers = [recorder]
        step([rows()], None, recheck=recheck)
        torch.testing.assert_close(recorder.grads, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_R37_an_interrupted_step_leaves_no_gradient(error: type[BaseException], where: str) -> None:
    model = toy()
    step = custom_step(model, torch.optim.SGD(model.parameters(), lr=0.1), n_micro=3)
    calls = 0

    def fail_in_the_second(_: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and where == "forward":
            raise error("planned")
        if calls == 2:
            output.register_hook(raise_planned)

    def raise_planned(_: Tensor) -> None:
        raise error("planned")

    handle = model[1].register_forward_hook(fail_in_the_second)
    with pytest.raises(error, match="planned"):
        step([rows(1), rows(2), rows(3)], None)
    assert all(p.grad is None for p in model.parameters())
    handle.remove()
    expected = mean_gradients(model, rows(4))
    step([rows(4)], None)
    norm = torch.stack([g.norm() for g in expected if g is not None]).norm()
    assert step.norm.item() == pytest.approx(norm.item(), rel=1e-5)


def test_R37_an_interrupted_step_of_our_model_leaves_zeros_where_gradients_are_kept() -> None:
    step, clean = (make("bf16", micro_batch=2, tokens_per_step=96) for _ in range(2))
    for one in (step, clean):
        one.keeps_grads = True
    batches = split(uneven_rows(), 4)
    loss_fn, calls = step.loss_fn, iter(range(9))

    def interrupted(*inputs: Any) -> Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return loss_fn(*inputs)

    step.loss_fn = interrupted
    with pytest.raises(KeyboardInterrupt):
        step(batches, 1e-2)
    assert not any(p.grad.any() for p in step.parameters if p.grad is not None)
    step.loss_fn = loss_fn
    for one in (step, clean):
        one(batches, 1e-2)
    assert step.norm.item() == clean.norm.item()


@pytest.mark.parametrize("n_micro", [1, 2])
def test_R37_what_is_frozen_or_unfrozen_during_training_is_seen(n_micro: int) -> None:
    model = toy()
    model[1].requires_grad_(False)
    step = custom_step(model, torch.optim.SGD(model.parameters(), lr=0.1), n_micro, ema_decay=0.5)
    batches = [rows(i) for i in range(n_micro)]
    assert not any(name.startswith("1.") for name in step.ema.averages)
    for frozen in (1, 2, 1):
        model.requires_grad_(True)
        model[frozen].requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        expected = mean_gradients(model, *batches)
        step(batches, None)
        norm = torch.stack([g.norm() for g in expected if g is not None]).norm()
        assert step.norm.item() == pytest.approx(norm.item(), rel=1e-5)
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert moved == {n for n in before if not n.startswith(f"{frozen}.")}
    # An average begins with the value that its parameter had when it began to train.
    assert step.ema.averages.keys() == before.keys()


def test_a_parameter_added_to_an_optimizer_trains_from_then_on() -> None:
    model = toy()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    step = custom_step(model, optimizer)
    step([rows()], None)
    optimizer.add_param_group({"params": [*model[0].parameters()], "lr": 0.1})
    expected = mean_gradients(model, rows())
    before = model[0].weight.detach().clone()
    step([rows()], None)
    assert expected[0] is not None
    torch.testing.assert_close(model[0].weight, before - 0.1 * expected[0])
    norm = torch.stack([g.norm() for g in (expected[0], *expected[3:]) if g is not None]).norm()
    assert step.norm.item() == pytest.approx(norm.item(), rel=1e-5)


def test_a_parameter_beside_the_model_that_an_optimizer_holds_is_judged_and_trained() -> None:
    model, temperature = toy(), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    step = custom_step(model, optimizer)
    step.criterion = lambda model, batch, scale: custom_loss(model, batch, scale) * temperature
    step([rows()], None)
    assert temperature.item() != 1.0
    assert temperature.grad is None


HOOKS = ["parameter", "accumulated", "activation", "module"]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("n_micro", [1, 2])
def test_R37_hooks_see_gradients_of_the_mean_of_a_custom_model(kind: str, n_micro: int) -> None:
    def seen_by(model: nn.Module, run: Callable[[], None]) -> Tensor:
        head, seen = model[2], list[Tensor]()  # type: ignore[index]
        if kind == "parameter":
            head.weight.register_hook(lambda g: seen.append(g.clone()))
        elif kind == "accumulated":
            head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        elif kind == "activation":
            model[1].register_forward_hook(  # type: ignore[index]
                lambda *args: args[2].register_hook(lambda g: seen.append(g.clone())) and None
            )
        else:
            head.register_full_backward_hook(lambda *args: seen.append(args[2][0].clone()))
        run()
        return torch.stack(seen)

    batches = [rows(i) for i in range(n_micro)]
    plain, ours = toy(), toy()
    n_targets = sum(batch.targets.numel() for batch in batches)

    def loop() -> None:
        for batch in batches:
            custom_loss(plain, batch, torch.tensor(1 / n_targets)).backward()

    step = custom_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1), n_micro)
    torch.testing.assert_close(
        seen_by(ours, lambda: step(batches, None)), seen_by(plain, loop), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("n_micro", [1, 4])
def test_R37_hooks_see_gradients_of_the_mean_of_our_model(dtype: str, n_micro: int) -> None:
    """In fp16 they are multiples of the gradient scale, as with torch.amp.GradScaler."""
    step = make(dtype, max_grad_norm=None)
    rows = uneven_rows()
    expected = gradients(make("fp32"), split(rows, 1))
    seen = [torch.zeros_like(p) for p in step.parameters]
    for total, p in zip(seen, step.parameters, strict=True):
        p.register_hook(total.add_)
    scale = step.grad_scale.item()
    assert (scale > 1) == (dtype == "fp16")
    step(split(rows, n_micro), 0.0)
    for ours, mean in zip(seen, expected, strict=True):
        tolerance = 1e-6 if dtype == "fp32" else 0.05 * mean.norm().item() + 1e-6
        assert (ours / scale - mean).norm().item() <= tolerance


def test_a_hook_that_clamps_a_gradient_bounds_what_the_optimizer_gets() -> None:
    step = make(max_grad_norm=None)
    recorder = Recorder(step.parameters)
    step.optimizers = [recorder]
    limit = 1e-4
    for p in step.parameters:
        p.register_hook(lambda grad: grad.clamp(-limit, limit))
    step(split(uneven_rows(), 1), 0.0)
    largest = max(grad.abs().max().item() for grad in recorder.grads)
    assert largest == pytest.approx(limit)
    assert step.norm.item() <= limit * math.sqrt(sum(p.numel() for p in step.parameters))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, FusedAdamW, Muon])
def test_hooks_on_an_optimizers_step_see_clipped_gradients(kind: Any) -> None:
    norms, weights = list[Tensor](), list[Tensor]()
    for hooked in (False, True):
        model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V, bias=False))
        optimizer = kind(model.parameters(), lr=0.1)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1.0, 1.0, p.numel()).view_as(p))
        if hooked:
            optimizer.register_step_pre_hook(
                lambda *_, model=model: norms.append(
                    torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
                )
            )
        custom_step(model, optimizer, max_grad_norm=0.01)([rows()], 0.1)
        weights.append(model[1].weight.detach())
    assert float(norms[0]) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(weights[1], weights[0])


def test_an_empty_step_stays_out_of_the_spike_window_and_is_no_overflow() -> None:
    tokens, targets = uneven_rows()
    empty = make_batch(tokens, torch.full_like(targets, IGNORE_INDEX))
    step, clean = (make("fp16", on_spike="skip", spike_window_steps=8) for _ in range(2))
    for one in (step, clean):
        one(split((tokens, targets), 1), 1e-2)
    step([empty], 1e-2)
    assert verdicts(step) == [FINE, EMPTY]
    assert step.grad_scale.item() == clean.grad_scale.item()
    one_more = everything(clean).keys() - {"trainer/growth_tracker"}
    assert all(torch.equal(everything(step)[n], everything(clean)[n]) for n in one_more)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_a_step_has_the_same_bits_in_any_default_dtype(default: torch.dtype) -> None:
    train: dict[str, Any] = {"on_spike": "skip", "ema_decay": 0.5, "max_grad_value": 0.1}

    def run() -> dict[str, Tensor]:
        for _ in range(2):
            step(split(uneven_rows(), 2), 1e-2)
        return everything(step) | {"history": step.history}

    plain = make(optimizer="muon", **train)
    step = plain
    expected = run()
    model = make(optimizer="muon", **train)  # its parameters are drawn in fp32
    torch.set_default_dtype(default)
    try:
        config = config_from_dict(
            {
                "run": {"compile": "off", "dtype": "fp32"},
                "model": {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2},
                "data": {"path": "unused", "seq_len": 12},
                "train": {"steps": 4, "max_grad_norm": 0.5, **train},
            }
        )
        device = torch.device("cpu")
        step = TrainStep(model.model, model.optimizers, resolve(config, device))
        actual = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_the_average_of_bf16_parameters_is_kept_in_fp32_and_moves() -> None:
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    average = Ema(model, 0.999)
    start = model.weight.detach().float()
    expected = start.clone()
    for _ in range(50):
        with torch.no_grad():
            model.weight.add_(0.01)
        average.update(skipped=torch.zeros(()))
        expected.lerp_(model.weight.detach().float(), 0.001)
    torch.testing.assert_close(average.averages["weight"], expected, rtol=1e-6, atol=1e-6)
    assert (expected - start).abs().min() > 0
    kept = model.weight.detach().clone()
    with average.in_use():
        assert torch.equal(model.weight, expected.bfloat16())
    assert torch.equal(model.weight, kept)


def test_an_average_that_an_older_checkpoint_kept_in_bf16_is_taken_over() -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    average = Ema(model, 0.9)
    saved = {name: torch.full_like(p, 0.5) for name, p in model.state_dict().items()}
    average.load(saved)
    assert {t.dtype for t in average.averages.values()} == {torch.float32}
    assert all((t == 0.5).all() for t in average.averages.values())


def test_batches_of_our_loader_are_counted_by_their_targets() -> None:
    tokens, targets = uneven_rows()
    step = make()
    batch = make_batch(tokens, targets)
    assert isinstance(batch, Batch)
    assert step.count(batch).item() == (targets != IGNORE_INDEX).sum().item()
