"""The configurations that come with the project, and choices that are declared and no more."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import block_cpu
from fasttrain.blocks import prepare_blocks
from fasttrain.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    config_from_dict,
    load_config,
)
from fasttrain.config_keys import counted
from fasttrain.data.batching import Plan
from fasttrain.data.held_out import evaluation_batches
from fasttrain.device import resolve_precision
from fasttrain.model import Transformer
from fasttrain.optim import build_optimizers
from fasttrain.schedule import lr_at
from tests.toy_data import write_tokens

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def n_parameters(name: str, vocab_size: int) -> int:
    config = load_config(Path(__file__).parent.parent / "configs" / f"{name}.toml")
    model = replace(config.model, vocab_size=vocab_size)
    with torch.device("meta"):
        return Transformer(model, seq_len=config.data.seq_len).num_parameters()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_says_what_it_is_and_makes_a_model(path: Path) -> None:
    config = load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    with torch.device("meta"):
        vocab_size = config.model.vocab_size or 256
        model = Transformer(replace(config.model, vocab_size=vocab_size), seq_len=32)
    trained = [
        p
        for optimizer in build_optimizers(model, config.optim)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(trained) == len(list(model.parameters()))


@pytest.mark.parametrize("vocab_size", [64, 128, 192, 256])
def test_chars_has_as_many_parameters_as_it_says(vocab_size: int) -> None:
    assert 735_000 <= n_parameters("chars", vocab_size) <= 840_000


def test_chars_at_a_usual_alphabet_is_the_size_of_what_it_is_compared_with() -> None:
    # nanoGPT says 0.80M of its own at 65 characters; the comparison allows 5 % either way.
    assert n_parameters("chars", 128) == pytest.approx(800_000, rel=0.05)


# ---- N16: what is added to the choices alone -----------------------------------------------------


def declared(config: Any, key: str) -> Any:
    """Return a section with a value that the choices might name and no code knows."""
    object.__setattr__(config, key, "new")
    return config


def model(**keys: Any) -> ModelConfig:
    return ModelConfig(vocab_size=64, dim=16, n_layers=1, n_heads=1, **keys)


def forward(key: str) -> None:
    Transformer(declared(model(), key), seq_len=8)(torch.zeros(1, 8, dtype=torch.int64))


CPU = torch.device("cpu")
UNKNOWN: dict[str, Callable[[], object]] = {
    "model.mlp": lambda: forward("mlp"),
    "model.norm": lambda: forward("norm"),
    "model.positions": lambda: forward("positions"),
    "schedule.name": lambda: lr_at(3, 9, declared(ScheduleConfig(), "name"), 1.0),
    "optim.name": lambda: build_optimizers(
        Transformer(model(), seq_len=8), declared(OptimConfig(), "name")
    ),
    "run.dtype": lambda: resolve_precision("new", CPU),
    "train.activation_checkpointing": lambda: prepare_blocks(
        Transformer(model(), seq_len=8), activation_checkpointing="new", mode="off", sharded=False
    ),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_N16_a_choice_that_no_code_knows_is_an_error_and_no_other_choice(key: str) -> None:
    with pytest.raises(ConfigError, match=f'^{key} = "?new"? is not implemented; add it to '):
        UNKNOWN[key]()


def test_N16_nor_is_a_way_of_batching_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_tokens(tmp_path / "data", list(range(1, 30)), [29])
    options: dict[str, Any] = {"batching": "new", "seq_len": 4}
    monkeypatch.setattr("fasttrain.data.batching.BATCHING", ("new",))
    with pytest.raises(ConfigError, match=r"data\.batching = .*not implemented"):
        Plan(dataset, seed=0, **options)
    with pytest.raises(ConfigError, match=r"data\.batching = .*not implemented"):
        evaluation_batches(dataset, batch_size=2, device=CPU, **options)


def test_N16_the_blocks_in_cpp_leave_an_activation_that_they_do_not_know_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_cpu, "is_supported", lambda: True)
    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 2}
    config = config_from_dict({"model": sizes, "data": {"path": "unused"}, "train": {"steps": 1}})
    assert block_cpu.fits(config)
    declared(config.model, "mlp")
    assert not block_cpu.fits(config)


def test_N18_one_of_a_kind_is_not_told_as_many() -> None:
    told = [counted(n, "thread") for n in (0, 1, 2)]
    assert told == ["0 threads", "1 thread", "2 threads"]
    assert (counted(1, "batch"), counted(1600, "batch")) == ("1 batch", "1,600 batches")
