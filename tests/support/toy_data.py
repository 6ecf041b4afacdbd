"""Datasets of a few tokens, shared by tests."""

from contextlib import closing
from pathlib import Path

import numpy as np

from fasttrain.data.dataset import TokenDataset
from fasttrain.data.format import open_dataset, write_dataset_json
from fasttrain.prepare.writer import ShardWriter


def write_tokens(
    folder: Path, tokens: list[int], ends: list[int], *, tokenizer: str = "{}", vocab: int = 100
) -> TokenDataset:
    """Write tokens in shards of seven, their documents ending at ``ends``, and open them."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer)
    with closing(ShardWriter(folder, "train", vocab_size=vocab, shard_tokens=7)) as writer:
        writer.write(np.array(tokens), ends)
    splits = {"train": (writer.shards, 10)}
    write_dataset_json(folder, vocab_size=vocab, end_of_text=0, splits=splits, source={})
    return open_dataset(folder, "train", cache_dir=folder / "cache")
