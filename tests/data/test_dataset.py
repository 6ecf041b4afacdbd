"""A split: where its documents end, by files or by token, and several datasets as one."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data import dataset as dataset_module
from fasttrain.data.dataset import Shard, TokenDataset, join
from fasttrain.data.format import open_dataset
from fasttrain.storage import DataError
from tests.support.toy_data import write_tokens


def bare(folder: Path, tokens: list[int], end_of_text: int | None) -> TokenDataset:
    folder.mkdir()
    np.array(tokens, "<u2").tofile(folder / "train.bin")
    return open_dataset(
        folder, "train", dtype="uint16", end_of_text=end_of_text, cache_dir=folder / "cache"
    )


def test_documents_run_on_over_the_border_of_shards(tmp_path: Path) -> None:
    ends = [3, 6, 7, 7, 20, 21]
    dataset = write_tokens(tmp_path / "data", list(range(22)), ends)
    assert len(dataset.shards) == 4
    assert dataset.document_ends.tolist() == [3, 6, 7, 20, 21, 22]  # the rest is a document too


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_documents_are_found_by_the_token_behind_or_in_front_of_them(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "BLOCK_TOKENS", block)
    behind = bare(tmp_path / "nanogpt", [1, 2, 9, 3, 9, 9, 4, 5], 9)
    assert behind.document_ends.tolist() == [3, 5, 6, 8]
    in_front = bare(tmp_path / "llm.c", [9, 1, 2, 9, 3, 9, 4, 5], 9)
    assert in_front.document_ends.tolist() == [3, 5, 8]
    ended = bare(tmp_path / "ended", [1, 9, 2, 9], 9)
    assert ended.document_ends.tolist() == [2, 4]


def test_a_token_that_the_folder_knows_better_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "data", [1, 2, 0], [3])
    with pytest.raises(DataError, match=r"data\.end_of_text = 5\b.*dataset\.json\b.* 0\b"):
        open_dataset(tmp_path / "data", "train", end_of_text=5, cache_dir=tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (flip, r"train_000000\.bin"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), r"train_000000\.bin"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(8)), r"train_000000\.bin"),
        (lambda path: path.unlink(), "No such file or directory"),
    ],
)
def test_R25_damaged_document_ends_are_refused_when_they_are_needed(
    tmp_path: Path, damage: Callable[[Path], object], match: str
) -> None:
    write_tokens(tmp_path / "data", list(range(22)), [3, 6, 20])
    damage(tmp_path / "data" / "train_000000.ends")
    dataset = open_dataset(tmp_path / "data", "train", cache_dir=tmp_path)
    assert dataset.read(0, 22).tolist() == list(range(22))
    with pytest.raises(DataError, match=rf"train_000000\.ends: .*{match}"):
        assert dataset.document_ends.size


def test_joined_datasets_are_one_behind_the_other(tmp_path: Path) -> None:
    first = write_tokens(tmp_path / "a", list(range(10)), [4, 10])
    second = write_tokens(tmp_path / "b", list(range(50, 80)), [1, 20])
    both = join([first, second])
    assert both.read(0, 40).tolist() == [*range(10), *range(50, 80)]
    assert both.document_ends.tolist() == [4, 10, 11, 30, 40]
    assert (both.n_tokens, both.n_bytes, both.n_documents) == (40, 20, 4)
    assert both.tokenizer_path == first.tokenizer_path
    assert both.facts["shards"] == first.facts["shards"] + second.facts["shards"]
    assert both.facts != join([second, first]).facts


def test_datasets_of_two_tokenizers_are_not_joined(tmp_path: Path) -> None:
    first = write_tokens(tmp_path / "a", [1, 2], [2])
    other = write_tokens(tmp_path / "b", [1, 2], [2], tokenizer='{"b": 1}')
    larger = write_tokens(tmp_path / "c", [1, 2], [2], vocab=101)
    imported = bare(tmp_path / "d", [1, 2], None)
    for dataset, what in ((other, "tokenizer"), (larger, "vocab_size"), (imported, "tokenizer")):
        with pytest.raises(DataError, match=rf"data\.paths: .*/a\b.*\b{what} \(.*--tokenizer "):
            join([first, dataset])


def test_R23_a_file_that_ends_too_early_is_refused_whatever_stat_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's file system, whose answers to `stat` are old."""
    dataset = write_tokens(tmp_path / "data", list(range(7)), [])
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(DataError, match=r"train_000000\.bin: .*truncated"):
        dataset.read(0, 7)


@pytest.mark.parametrize("shards", [1, 3])
def test_R23_a_file_cut_off_while_it_is_read_is_a_typed_error(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = list(range(7)) if shards == 1 else list(range(21))
    dataset = write_tokens(tmp_path / "data", tokens, [])
    assert len(dataset.shards) == shards
    read = Shard.read

    def cut_off_first(shard: Shard, pieces: Iterable[tuple[int, memoryview]]) -> None:
        os.truncate(tmp_path / "data" / "train_000000.bin", 1030)  # within what is read
        read(shard, pieces)

    monkeypatch.setattr(Shard, "read", cut_off_first)
    with pytest.raises(DataError, match=r"train_000000\.bin: .*truncated"):
        dataset.read(0, 7)
