"""Which parameter goes where, and optimizer state by name."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from fasttrain_kernels import FusedAdamW, newton_schulz
from fasttrain_kernels.newton_schulz import products_dtype
from torch import nn

from fasttrain.config import ModelConfig, OptimConfig, UserError
from fasttrain.engine.optim import (
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    state_bytes,
)
from fasttrain.model.transformer import Transformer
from tests.support.toy import ENV, OPTIMIZERS

SHAPE = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "qk_norm": True}


def groups_by_name(model: nn.Module, config: OptimConfig) -> dict[str, tuple[str, float, float]]:
    """Return optimizer, decay and learning-rate scale of every parameter, each exactly once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[str, float, float]] = {}
    for optimizer in build_optimizers(model, config):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                facts = (type(optimizer).__name__, group["weight_decay"], group["lr_scale"])
                found[names[id(p)]] = facts
    assert set(found) == set(names.values())
    return found


def test_only_matrices_decay() -> None:
    model = Transformer(ModelConfig(**SHAPE, bias=True, norm="layer"), seq_len=8)
    found = groups_by_name(model, OptimConfig(weight_decay=0.3))
    for name, (_, decay, _) in found.items():
        matrix = name.endswith("weight") and "norm" not in name and "embedding" not in name
        assert decay == (0.3 if matrix else 0.0), name


def test_embeddings_decay_when_asked_and_a_tied_head_counts_as_one() -> None:
    model = Transformer(ModelConfig(**SHAPE, tied_embeddings=True), seq_len=8)
    assert groups_by_name(model, OptimConfig())["embedding.weight"][1] == 0.0
    asked = groups_by_name(model, OptimConfig(decay_embeddings=True))
    assert asked["embedding.weight"][1] == 0.1


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_runs_precision_is_that_of_muons_products(
    monkeypatch: pytest.MonkeyPatch, compute: torch.dtype
) -> None:
    seen = []

    def spy(*args: Any, dtype: torch.dtype, **options: Any) -> torch.Tensor:
        seen.append(dtype)
        return newton_schulz(*args, dtype=dtype, **options)

    monkeypatch.setattr("fasttrain_kernels.muon.newton_schulz", spy)
    model = Transformer(ModelConfig(**SHAPE), seq_len=8)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in build_optimizers(model, OptimConfig(name="muon"), compute):
        optimizer.step()
    half = products_dtype(torch.device("cpu"))
    assert set(seen) == {half if compute is torch.bfloat16 else torch.float32}


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    model = Transformer(ModelConfig(**SHAPE), seq_len=8)
    scales = {"muon_embedding_lr_scale": 3.0, "muon_head_lr_scale": 0.5}
    config = OptimConfig(name="muon", **scales)
    found = groups_by_name(model, config)
    for name, (optimizer, _, lr_scale) in found.items():
        inside = name.startswith("blocks.") and "norm" not in name
        assert optimizer == ("Muon" if inside else "FusedAdamW"), name
        if inside:
            assert lr_scale == 1.0
    assert found["embedding.weight"][2] == 3.0
    assert found["head.weight"][2] == 0.5


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_what_is_set_for_muon_does_not_reach_another_optimizer(name: str) -> None:
    muon = {"muon_embedding_lr_scale": 17.0, "muon_head_lr_scale": 3.0}
    config = OptimConfig(name=name, lr=0.25, **muon)
    assert config.peak_lr == 0.25
    (optimizer,) = build_optimizers(Transformer(ModelConfig(**SHAPE), seq_len=8), config)
    assert {(g["lr"], g["lr_scale"]) for g in optimizer.param_groups} == {(0.25, 1.0)}


def train(model: Transformer, optimizers: list[torch.optim.Optimizer], n_steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(n_steps):
        tokens = torch.randint(0, 64, (2, 9), generator=generator)
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_state_of_an_unknown_parameter_is_refused() -> None:
    model = Transformer(ModelConfig(**SHAPE), seq_len=8)
    with pytest.raises(KeyError, match="nowhere"):
        load_optimizer_tensors(
            model, build_optimizers(model, OptimConfig()), {"nowhere/exp_avg": torch.zeros(1)}
        )


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"name": "adamw"}, ["FusedAdamW"]),
        ({"name": "muon"}, ["FusedAdamW", "Muon"]),
        ({"name": "sgd", "nesterov": True}, ["SGD"]),
        ({"name": "sgd", "momentum": 0.0}, ["SGD"]),
        ({"name": "adafactor"}, ["Adafactor"]),
    ],
)
def test_state_by_name_continues_the_same_trajectory(
    options: dict[str, Any], kinds: list[str]
) -> None:
    config = OptimConfig(lr=0.05, **options)
    models = []
    for split in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**SHAPE), seq_len=8)
        optimizers = build_optimizers(model, config)
        assert [type(o).__name__ for o in optimizers] == kinds
        train(model, optimizers, 3)
        if split:  # in a new optimizer, of what was saved of the old
            saved = {k: v.clone() for k, v in optimizer_tensors(model, optimizers).items()}
            of_a_matrix = any(key.startswith("blocks.0.mlp.down.weight/") for key in saved)
            assert bool(saved) == of_a_matrix == (options.get("momentum") != 0.0)
            optimizers = build_optimizers(model, config)
            load_optimizer_tensors(model, optimizers, saved)
        train(model, optimizers, 3)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        *({"name": name} for name in OPTIMIZERS),
        {"name": "sgd", "momentum": 0.0},
    ],
    ids=str,
)
def test_the_size_of_the_state_is_known_beforehand(options: dict[str, Any]) -> None:
    model = Transformer(ModelConfig(**SHAPE), seq_len=8)
    optimizers = build_optimizers(model, OptimConfig(**options))
    foreseen = sum(map(state_bytes, optimizers))
    train(model, optimizers, 1)
    state = optimizer_tensors(model, optimizers)
    assert foreseen == sum(t.nbytes for name, t in state.items() if not name.endswith("/step"))


def test_a_missing_torchao_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"adamw8bit.*pip install torchao"):
        build_optimizers(
            Transformer(ModelConfig(**SHAPE), seq_len=8), OptimConfig(name="adamw8bit")
        )


EIGHT_BIT = """
import torch
from torch import nn
from fasttrain.config import OptimConfig
from fasttrain.engine.optim import (
    build_optimizers, load_optimizer_tensors, optimizer_tensors, set_lr, state_bytes
)

def step(model, optimizers, seed):
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().mean().backward()
    for optimizer in optimizers:
        set_lr(optimizer, 0.01)
        optimizer.step()
        optimizer.zero_grad()

config = OptimConfig(name="adamw8bit", lr=0.5)
model = nn.Linear(64, 64, bias=False)
optimizers = build_optimizers(model, config)
step(model, optimizers, 1)
saved = {k: v.clone() for k, v in optimizer_tensors(model, optimizers).items()}
assert sum(t.nbytes for k, t in saved.items() if "/exp" in k) == state_bytes(optimizers[0])
assert saved["weight/exp_avg/codes"].dtype == torch.uint8, saved.keys()
copy = nn.Linear(64, 64, bias=False)
copy.load_state_dict(model.state_dict())
others = build_optimizers(copy, config)
load_optimizer_tensors(copy, others, saved)
before = model.weight.detach().clone()
step(model, optimizers, 2)
step(copy, others, 2)
assert torch.equal(model.weight, copy.weight)
assert 0 < (model.weight - before).abs().max() < 0.05  # the rate that was set, not 0.5
print("same")
"""


def test_8_bit_moments_are_saved_as_they_are_and_restored() -> None:
    """In a process of its own, as torchao warns when imported; eager, as it compiles for long."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao, which is not installed")
    command = [sys.executable, "-W", "ignore", "-c", EIGHT_BIT]
    eager = ENV | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=eager, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr[-2000:]


def test_a_step_of_ones_own_around_it_calls_hooks_once() -> None:
    class Own(FusedAdamW):
        def step(self, *args: Any, **kwargs: Any) -> float | None:
            return super().step(*args, **kwargs)

    parameter, calls = nn.Parameter(torch.ones(2)), []
    parameter.grad = torch.ones(2)
    optimizer = Own([parameter])
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]
    assert parameter[0] < 1
