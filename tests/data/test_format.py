"""Shards and dataset folders: what is written is what is read; what is damaged is refused."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fasttrain.config import UserError
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.format import DataError, open_dataset, write_dataset_json
from fasttrain.prepare.writer import ShardWriter

VOCAB = 1000


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make_dataset(
    folder: Path, *, train: int = 5000, val: int = 300, vocab: int = VOCAB, shard_tokens: int = 2000
) -> dict[str, np.ndarray]:
    """A prepared dataset with a stand-in tokenizer file; returns its tokens by split."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(train)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    tokens, splits = {}, {}
    for split, count in (("train", train), ("val", val)):
        tokens[split] = rng.integers(0, vocab, count)
        with closing(
            ShardWriter(folder, split, vocab_size=vocab, shard_tokens=shard_tokens)
        ) as writer:
            half = count // 2
            writer.write(tokens[split][:half], [half // 2, half])
            writer.write(tokens[split][half:], [count - half])
        splits[split] = (writer.shards, 3 * count)
    write_dataset_json(folder, vocab_size=vocab, end_of_text=0, splits=splits, source={})
    return tokens


def edit_json(folder: Path, change: Callable[[dict], object]) -> None:
    meta = json.loads((folder / "dataset.json").read_text())
    change(meta)
    (folder / "dataset.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(VOCAB, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_what_is_written_is_read_back_across_shards(
    tmp_path: Path, cache: Path, vocab: int, dtype: str
) -> None:
    tokens = make_dataset(tmp_path / "data", vocab=vocab)
    for split, expected in tokens.items():
        dataset = open_dataset(tmp_path / "data", split, cache_dir=cache)
        assert dataset.n_tokens == len(expected)
        assert dataset.dtype == dtype
        assert (dataset.vocab_size, dataset.end_of_text) == (vocab, 0)
        assert (dataset.n_bytes, dataset.n_documents) == (3 * len(expected), 3)
        assert dataset.max_token == expected.max()
        assert dataset.tokenizer_path == tmp_path / "data" / "tokenizer.json"
        np.testing.assert_array_equal(dataset.read(0, dataset.n_tokens), expected)
    starts = np.array(
        [0, 1990, 1999, 2000, 3999, 4900]
    )  # inside a shard, over a border, from a border on
    out = np.empty((len(starts), 100), dtype)
    dataset = open_dataset(tmp_path / "data", "train", cache_dir=cache)
    dataset.read_windows(starts, out, np.full(len(starts), 100))
    for row, start in zip(out, starts, strict=True):
        np.testing.assert_array_equal(row, tokens["train"][start : start + 100])
    np.testing.assert_array_equal(dataset.read(1000, 3500), tokens["train"][1000:4500])
    assert dataset.reading is None


def test_shards_are_those_of_llm_c(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    raw = (tmp_path / "train_000002.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 1000]
    assert not header[3:].any()
    assert len(raw) == 1024 + 2 * 1000
    make_dataset(tmp_path / "wide", vocab=70_000)
    header = np.fromfile(tmp_path / "wide" / "train_000000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240801, 7, 2000]


def test_R22_reader_refuses_a_token_outside_the_vocabulary(tmp_path: Path, cache: Path) -> None:
    np.arange(3000, dtype="<u2").tofile(tmp_path / "train.bin")
    for _ in range(2):  # fresh, then from the cached scan
        with pytest.raises(
            DataError, match=r"train\.bin: .*\b2999\b.*\b2999\b.*\b5998\b.*\b2000\b.*\b3000\b"
        ):
            open_dataset(tmp_path, "train", dtype="uint16", vocab_size=2000, cache_dir=cache)
    dataset = open_dataset(tmp_path, "train", dtype="uint16", vocab_size=3000, cache_dir=cache)
    assert (dataset.max_token, dataset.vocab_size) == (2999, 3000)


def test_R22_a_shard_changed_after_its_scan_is_scanned_again(tmp_path: Path, cache: Path) -> None:
    np.zeros(100, "<u2").tofile(tmp_path / "train.bin")
    first = open_dataset(tmp_path, "train", dtype="uint16", vocab_size=5, cache_dir=cache)
    again = open_dataset(tmp_path, "train", dtype="uint16", vocab_size=5, cache_dir=cache)
    assert first.facts == again.facts
    assert len(list((cache / "scans").iterdir())) == 1
    np.full(100, 4, "<u2").tofile(tmp_path / "train.bin")
    other = open_dataset(tmp_path, "train", dtype="uint16", vocab_size=5, cache_dir=cache)
    assert other.facts != first.facts
    np.full(100, 9, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: .*\b9\b.*\b0\b.*\b5\b.*\b10\b"):
        open_dataset(tmp_path, "train", dtype="uint16", vocab_size=5, cache_dir=cache)


def test_a_damaged_scan_cache_is_only_slower(tmp_path: Path, cache: Path) -> None:
    np.arange(50, dtype="<u2").tofile(tmp_path / "val.bin")
    first = open_dataset(tmp_path, "val", dtype="uint16", cache_dir=cache)
    for content in (b"", b"[]", b"\xff", b'{"identity": 1}'):
        for entry in (cache / "scans").iterdir():
            entry.write_bytes(content)
        again = open_dataset(tmp_path, "val", dtype="uint16", cache_dir=cache)
        assert again.facts == first.facts


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "/etc/hostname",
        "sub/train.bin",
        "..",
        ".",
        "",
        "a\0b",
        "..\\x",
        "link.bin",
    ],
)
@pytest.mark.parametrize("where", ["shard", "tokenizer"])
def test_R25_no_file_outside_the_folder_is_opened(
    tmp_path: Path, cache: Path, name: str, where: str
) -> None:
    folder = tmp_path / "data"
    make_dataset(folder)
    shutil.copy(folder / "train_000000.bin", tmp_path / "outside.bin")
    (folder / "sub").mkdir()
    shutil.copy(folder / "train_000000.bin", folder / "sub" / "train.bin")
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")

    def redirect(meta: dict) -> None:
        entry = meta["tokenizer"] if where == "tokenizer" else meta["splits"]["train"]["shards"][0]
        entry["file"] = name

    edit_json(folder, redirect)
    with pytest.raises(DataError, match=rf"dataset\.json: .*{re.escape(repr(name))}"):
        open_dataset(folder, "train", cache_dir=cache)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": "fasttrain-dataset"}'],
)
def test_R25_a_broken_dataset_json_is_a_typed_error(
    tmp_path: Path, cache: Path, content: bytes
) -> None:
    make_dataset(tmp_path)
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(tmp_path, "train", cache_dir=cache)


@pytest.mark.parametrize("name", ["dataset.json", "train_000000.bin", "tokenizer.json"])
def test_R25_a_pipe_in_place_of_a_file_is_refused_not_read(
    tmp_path: Path, cache: Path, name: str
) -> None:
    folder = tmp_path / "data"
    make_dataset(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=rf"{re.escape(name)}: .*(\bnot a\b.*\bfile\b|missing)"):
        open_dataset(folder, "train", cache_dir=cache)


def test_R25_wrong_fields_are_typed_errors(tmp_path: Path, cache: Path) -> None:
    make_dataset(tmp_path)
    good = (tmp_path / "dataset.json").read_text()
    paths: list[tuple] = [("version",), ("vocab_size",), ("dtype",), ("end_of_text",), ("splits",)]
    paths += [("tokenizer", "sha256"), ("splits", "train"), ("splits", "train", "bytes")]
    paths += [("splits", "train", "shards"), ("splits", "train", "shards", 0)]
    paths += [("splits", "train", "shards", 0, "tokens")]
    for *parents, last in paths:
        for value in (None, -1, True, 1e400, "x", [], {}, 2**70):
            if (last, value) in (("end_of_text", None), ("bytes", 2**70)):
                continue  # allowed
            meta = json.loads(good)
            entry = meta
            for key in parents:
                entry = entry[key]
            entry[last] = value
            (tmp_path / "dataset.json").write_text(json.dumps(meta))
            with pytest.raises(DataError, match=str(tmp_path)):
                open_dataset(tmp_path, "train", cache_dir=cache)


def test_a_flipped_bit_in_a_shard_is_refused(tmp_path: Path, cache: Path) -> None:
    make_dataset(tmp_path)
    path = tmp_path / "train_000001.bin"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train_000001\.bin: .*SHA-256"):
        open_dataset(tmp_path, "train", cache_dir=cache)
    assert open_dataset(tmp_path, "val", cache_dir=cache).n_tokens == 300


def test_another_tokenizer_is_refused(tmp_path: Path, cache: Path) -> None:
    make_dataset(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"another": "tokenizer"}')
    with pytest.raises(DataError, match=r"tokenizer\.json: .*SHA-256"):
        open_dataset(tmp_path, "train", cache_dir=cache)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: .*missing"):
        open_dataset(tmp_path, "train", cache_dir=cache)


def test_R24_swapped_shards_are_refused_or_change_the_fingerprint(
    tmp_path: Path, cache: Path
) -> None:
    make_dataset(tmp_path)
    before = open_dataset(tmp_path, "train", cache_dir=cache).facts
    first, second = tmp_path / "train_000000.bin", tmp_path / "train_000001.bin"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(DataError, match="SHA-256"):
        open_dataset(tmp_path, "train", cache_dir=cache)

    def swap(meta: dict) -> None:
        one, two = meta["splits"]["train"]["shards"][:2]
        one["sha256"], two["sha256"] = two["sha256"], one["sha256"]

    edit_json(tmp_path, swap)
    assert open_dataset(tmp_path, "train", cache_dir=cache).facts != before


def test_R23_a_shard_truncated_or_replaced_after_opening(tmp_path: Path, cache: Path) -> None:
    for number, damage in enumerate(("truncate", "replace", "remove")):
        folder = tmp_path / damage
        tokens = make_dataset(folder, train=5000 + number)
        dataset = open_dataset(folder, "train", cache_dir=cache)
        path = folder / "train_000001.bin"
        if damage == "truncate":
            with path.open("r+b") as file:
                file.truncate(1500)
        elif damage == "replace":
            shutil.copy(folder / "train_000000.bin", folder / "new")
            (folder / "new").replace(path)
        else:
            path.unlink()
        np.testing.assert_array_equal(dataset.read(0, 2000), tokens["train"][:2000])
        for start, count in ((2000, 5), (1990, 500), (0, 5000)):
            with pytest.raises(DataError, match=r"train_000001\.bin: .*truncated"):
                dataset.read(start, count)


def test_nanogpt_and_llm_c_folders_are_datasets_as_they_are(tmp_path: Path, cache: Path) -> None:
    nanogpt = tmp_path / "nanogpt"
    nanogpt.mkdir()
    (nanogpt / "meta.pkl").write_bytes(b"never opened")
    for split in ("train", "val"):
        np.arange(500, dtype="<u2").tofile(nanogpt / f"{split}.bin")
    with pytest.raises(DataError, match=r'train\.bin: .*data\.dtype = "uint16"'):
        open_dataset(nanogpt, "train", cache_dir=cache)
    dataset = open_dataset(nanogpt, "val", dtype="uint16", vocab_size=512, cache_dir=cache)
    np.testing.assert_array_equal(dataset.read(0, 500), np.arange(500))
    assert (dataset.vocab_size, dataset.n_bytes, dataset.tokenizer_path) == (512, None, None)
    (nanogpt / "val.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"val\.bin: .*data\.dtype\b.*\buint32\b.*\b5\b"):
        open_dataset(nanogpt, "val", dtype="uint32", cache_dir=cache)

    llm_c = tmp_path / "fineweb10B"
    make_dataset(tmp_path / "made")
    llm_c.mkdir()
    for number in range(3):
        name = f"train_{number:06d}.bin"
        shutil.copy(tmp_path / "made" / name, llm_c / f"fineweb_{name}")
    shutil.copy(tmp_path / "made" / "val_000000.bin", llm_c / "fineweb_val_000000.bin")
    imported = open_dataset(llm_c, "train", vocab_size=VOCAB, cache_dir=cache)
    prepared = open_dataset(tmp_path / "made", "train", cache_dir=cache)
    np.testing.assert_array_equal(imported.read(0, 5000), prepared.read(0, 5000))
    assert open_dataset(llm_c, "val", cache_dir=cache).n_tokens == 300
    with pytest.raises(
        DataError, match=r"val_000000\.bin: .*\buint16\b.*data\.dtype\b.*\buint32\b"
    ):
        open_dataset(llm_c, "val", dtype="uint32", cache_dir=cache)
    (llm_c / "tiny_val_train.bin").touch()
    with pytest.raises(DataError, match=r"tiny_val_train\.bin: .*\btrain\b.*\bval\b"):
        open_dataset(llm_c, "val", cache_dir=cache)


def test_missing_and_empty_datasets_say_what_to_do(tmp_path: Path, cache: Path) -> None:
    def refused(match: str, split: str = "train", **options: object) -> None:
        with pytest.raises(UserError, match=match):
            open_dataset(tmp_path / "data", split, cache_dir=cache, **options)  # type: ignore[arg-type]

    refused(r"data\.path: .*: python -m fasttrain\.prepare \S+/data --input TEXT")
    (tmp_path / "data").touch()
    refused(r"data\.path: .*\bfile\b.* NEW_FOLDER --input \S+/data")
    (tmp_path / "data").unlink()
    (tmp_path / "data").mkdir()
    refused(r"data\.path: .*dataset\.json\b.*\.bin\b.* NEW_FOLDER --input \S+/data")
    (tmp_path / "data" / "tokens.bin").touch()
    refused(r"/data: .*\.bin\b.*\btrain\b.*\bname")
    (tmp_path / "data" / "constrained.bin").touch()  # holds "train", but not as a word
    refused(r"/data: .*\.bin\b.*\btrain\b.*\bname")
    (tmp_path / "data" / "train.bin").touch()
    refused(r'/train\.bin: .*data\.dtype = "uint16"')
    refused(r"/data: .*'train'.*\btokens\b", dtype="uint16")
    refused(r"/data: .*\.bin\b.*\bval\b.*\b1\b", "val")
    refused(r'"train".*"val".*\btest\b', "test")
    make_dataset(tmp_path / "data")
    refused(r"model\.vocab_size = 999\b.*\b1000\b", vocab_size=999)
    edit_json(tmp_path / "data", lambda meta: meta["splits"].pop("val"))
    refused(r"dataset\.json: .*'val'.*\['train'\].*--val-fraction", "val")
    edit_json(tmp_path / "data", lambda meta: meta["splits"]["train"].update(shards=[]))
    refused(r"/data: .*'train'.*\bempty\b")


def test_a_missing_shard_is_named(tmp_path: Path, cache: Path) -> None:
    make_dataset(tmp_path)
    (tmp_path / "train_000001.bin").unlink()
    with pytest.raises(DataError, match=r"train_000001\.bin: .*\(No such file"):
        open_dataset(tmp_path, "train", cache_dir=cache)


def test_reading_beyond_the_split_is_refused(tmp_path: Path, cache: Path) -> None:
    make_dataset(tmp_path)
    dataset: TokenDataset = open_dataset(tmp_path, "val", cache_dir=cache)
    for start, count in ((-1, 5), (299, 2), (10**12, 1)):
        with pytest.raises(DataError, match=rf"{start}\b.*\b{start + count}\b.*\b300\b"):
            dataset.read(start, count)
    assert dataset.read(300, 0).size == 0
