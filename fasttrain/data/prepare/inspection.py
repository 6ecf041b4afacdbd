"""What is in a dataset folder, in lines of text, with every hash verified from the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fasttrain.config.keys import counted
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.files import DataError
from fasttrain.data.format import DATASET_JSON, open_dataset, read_dataset_json
from fasttrain.data.tokenizer import load_tokenizer

__all__ = ["inspect"]

BLOCK_TOKENS = 4 << 20
MOST_FREQUENT = 10
SAMPLES, SAMPLE_TOKENS = 3, 40


def inspect(folder: Path) -> Iterator[str]:
    """Describes a prepared dataset."""
    if not (folder / DATASET_JSON).is_file():
        raise DataError(
            f"{folder}: no {DATASET_JSON} in it, so there is nothing to verify; only what "
            "fasttrain.prepare wrote can be inspected"
        )
    meta = read_dataset_json(folder)
    datasets: dict[str, TokenDataset] = {}
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split in splits:
        if split in meta["splits"]:
            datasets[split] = open_dataset(folder, split)
    for name, dataset in datasets.items():
        for shard, listed in zip(dataset.shards, meta["splits"][name]["shards"], strict=True):
            if shard.scan(None).sha256 != listed["sha256"]:  # of the file itself, not of a cache
                raise DataError(f"{shard.path}: not the file that {DATASET_JSON} records: damaged")
        _ = dataset.document_ends
    n_files = 1 + sum(2 * len(dataset.shards) for dataset in datasets.values())
    yield f"{folder}: {meta['vocab_size']:,} tokens in the vocabulary, stored as {meta['dtype']}"
    for key, value in sorted(meta.get("source", {}).items()):
        yield f"  {key}: {value}"
    tokenizer = load_tokenizer(folder / meta["tokenizer"]["file"])
    for name, dataset in datasets.items():
        listed = meta["splits"][name]
        yield (
            f"{name}: {dataset.n_tokens:,} tokens in {counted(len(dataset.shards), 'shard')}, "
            f"{counted(listed['documents'], 'document')}, {listed['bytes']:,} bytes, "
            f"{listed['bytes'] / dataset.n_tokens:.2f} bytes a token"
        )
        counts = _counts(dataset, meta["vocab_size"])
        unused = int((counts == 0).sum())
        yield f"  {unused:,} of the {meta['vocab_size']:,} tokens do not occur; most frequent:"
        for token in np.argsort(-counts, kind="stable")[:MOST_FREQUENT].tolist():
            if counts[token]:
                share = 100 * counts[token] / dataset.n_tokens
                yield f"  {token:8d} {share:6.2f} %  {_shown(tokenizer, [token])}"
        for number in range(SAMPLES):
            start = max(dataset.n_tokens - SAMPLE_TOKENS, 0) * number // (SAMPLES - 1)
            tokens = dataset.read(start, min(SAMPLE_TOKENS, dataset.n_tokens - start))
            yield f"  from token {start:,}: {_shown(tokenizer, tokens.tolist())}"
    yield f"All {n_files} files have the SHA-256 that {DATASET_JSON} records."


def _shown(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return repr(tokenizer.decode(tokens, skip_special_tokens=False))


def _counts(dataset: TokenDataset, vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, dataset.n_tokens, BLOCK_TOKENS):
        block = dataset.read(start, min(BLOCK_TOKENS, dataset.n_tokens - start))
        counts += np.bincount(block, minlength=vocab_size)
    return counts
