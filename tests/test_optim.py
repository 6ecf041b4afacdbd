"""Which parameter goes where, and optimizer state by name."""

import pytest
import torch
from torch import nn

from fasttrain.config import ModelConfig, OptimConfig
from fasttrain.model import Transformer
from fasttrain.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors

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


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    model = Transformer(ModelConfig(**SHAPE), seq_len=8)
    config = OptimConfig(name="muon", embedding_lr_scale=3.0, head_lr_scale=0.5, muon_lr_scale=2.0)
    found = groups_by_name(model, config)
    for name, (optimizer, _, lr_scale) in found.items():
        inside = name.startswith("blocks.") and "norm" not in name
        assert optimizer == ("Muon" if inside else "FusedAdamW"), name
        if inside:
            assert lr_scale == 2.0
    assert found["embedding.weight"][2] == 3.0
    assert found["head.weight"][2] == 0.5


def train(model: Transformer, optimizers: list[torch.optim.Optimizer], n_steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(n_steps):
        tokens = torch.randint(0, 64, (2, 9), generator=generator)
        logits = model.logits(model(tokens[:, :-1]))
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_continues_the_same_trajectory(name: str) -> None:
    torch.manual_seed(0)
    config = OptimConfig(name=name, lr=1e-2)
    first = Transformer(ModelConfig(**SHAPE), seq_len=8)
    optimizers = build_optimizers(first, config)
    train(first, optimizers, 3)
    saved = {k: v.clone() for k, v in optimizer_tensors(first, optimizers).items()}
    assert any(key.startswith("blocks.0.mlp.down.weight/") for key in saved)

    second = Transformer(ModelConfig(**SHAPE), seq_len=8)
    second.load_state_dict(first.state_dict())
    restored = build_optimizers(second, config)
    load_optimizer_tensors(second, restored, saved)
    train(first, optimizers, 2)
    train(second, restored, 2)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_of_an_unknown_parameter_is_refused() -> None:
    model = Transformer(ModelConfig(**SHAPE), seq_len=8)
    with pytest.raises(KeyError, match="nowhere"):
        load_optimizer_tensors(
            model, build_optimizers(model, OptimConfig()), {"nowhere/exp_avg": torch.zeros(1)}
        )
