"""Batches of the held-out split: every target once, in order, after its context."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.data.format import DataError, TokenDataset, open_dataset
from fasttrain.data.held_out import evaluation_batches
from fasttrain.data.loader import IGNORE
from fasttrain.data.prepare.writer import ShardWriter

N_TOKENS = 1000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Tokens 0 … 999 in three shards, so that a token says where it lies."""
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder, "train", vocab_size=N_TOKENS, shard_tokens=400) as writer:
        writer.write(np.arange(N_TOKENS))
    return open_dataset(folder, "train", vocab_size=N_TOKENS, cache_dir=folder / "cache")


@pytest.mark.parametrize("seq_len", [1, 10, 27, 37, 999, 1000, 5000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_covers_every_target_once_in_order(
    dataset: TokenDataset, seq_len: int, world_size: int
) -> None:
    batch_size = 100 if seq_len == 1 else 4
    per_rank = [
        list(
            evaluation_batches(
                dataset,
                seq_len=seq_len,
                batch_size=batch_size,
                device="cpu",
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    targets = []
    for batches in zip(*per_rank, strict=True):
        for batch in batches:
            assert batch.tokens.shape == batch.targets.shape == (batch_size, seq_len)
            valid = batch.targets != IGNORE
            assert torch.equal(batch.tokens[valid] + 1, batch.targets[valid])
            assert not batch.tokens[~valid].any()
            targets += batch.targets[valid].tolist()
    assert targets == list(range(1, N_TOKENS))


@pytest.mark.parametrize(("seq_len", "stride"), [(10, 10), (10, 3), (64, 16), (1000, 1), (5000, 7)])
def test_overlapping_windows_have_every_target_once_after_its_context(
    dataset: TokenDataset, seq_len: int, stride: int
) -> None:
    batches = evaluation_batches(
        dataset, seq_len=seq_len, batch_size=4, device="cpu", stride_tokens=stride
    )
    targets = []
    for tokens, row in ((t, r) for b in batches for t, r in zip(b.tokens, b.targets, strict=True)):
        valid = row != IGNORE
        assert torch.equal(tokens[valid] + 1, row[valid])
        if valid.any() and targets:
            n_before = int(valid.nonzero()[0])
            assert n_before == seq_len - stride
            assert torch.equal(tokens[: n_before + 1].diff(), torch.ones(n_before).long())
        targets += row[valid].tolist()
    assert targets == list(range(1, N_TOKENS))


def test_evaluation_needs_something_to_predict(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val", vocab_size=5) as writer:
        writer.write(np.array([1]))
    single = open_dataset(tmp_path, "val", vocab_size=5, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="1 tokens has nothing to predict"):
        evaluation_batches(single, seq_len=4, batch_size=2, device="cpu")
