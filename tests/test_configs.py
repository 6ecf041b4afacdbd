"""The configurations that come with the project: what they promise of themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fasttrain.config import load_config
from fasttrain.model import Transformer
from fasttrain.optim import build_optimizers

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
