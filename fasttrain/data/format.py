"""Dataset folders: token shards and `dataset.json`, and how they are opened.

A folder that `fasttrain.prepare` wrote holds `train_000000.bin` …, `val_000000.bin` …, the ends of
their documents, `tokenizer.json` and `dataset.json`, which states tokenizer, vocabulary, dtype,
end-of-text id, counts and a SHA-256 for every file. A folder without `dataset.json` is taken as
llm.c, modded-nanogpt or nanoGPT wrote it: `.bin` files with train or val in their names.

A folder may come from anywhere: nothing in it is executed, no file outside it is opened, every
shard is hashed and its tokens checked against the vocabulary before the first one is used.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from fasttrain import storage as store
from fasttrain.config import DataConfig
from fasttrain.config.untrusted import misfit, read_json
from fasttrain.data.dataset import Shard, ShardInfo, TokenDataset, dtype_for
from fasttrain.data.remote import RemoteShard, ShardCache, beside
from fasttrain.storage import DataError, is_address, sha256_of, write_atomically

DATASET_JSON = "dataset.json"
FORMAT, VERSION = "fasttrain-dataset", 1
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
_SPLIT_IN_NAME = {
    "train": re.compile(r"(?:^|[^a-z])train(?:ing)?(?:$|[^a-z])"),
    "val": re.compile(r"(?:^|[^a-z])val(?:id|idation)?(?:$|[^a-z])"),
}
# Vocabularies of other projects: tokens, whose they are, and what writes shards of FineWeb in them.
_VOCABULARIES = (
    (50257, "GPT-2", "llm.c's dev/data/fineweb.py or modded-nanogpt's data/cached_fineweb10B.py"),
    (128256, "Llama 3", "llm.c's dev/data/fineweb.py --model_desc llama-3"),
    (32000, "Llama 2", ""),
)


class TokenizerInfo(TypedDict):
    file: str
    sha256: str


class SplitInfo(TypedDict):
    tokens: int
    documents: int
    bytes: int
    shards: list[ShardInfo]


class DatasetJson(TypedDict):
    """What is used of `dataset.json`."""

    version: int
    vocab_size: int
    dtype: str
    end_of_text: NotRequired[int | None]
    tokenizer: TokenizerInfo
    splits: dict[str, SplitInfo]
    source: NotRequired[dict[str, Any]]


def absent(path: str | Path, vocab_size: int | None) -> str | None:
    """Return how to get a dataset folder that is not there; None: it is there.

    `vocab_size` is the model's vocabulary where it is known: the dataset must be in it.
    """
    folder = store.user_path(path, "data.path")
    if is_address(path) or folder.is_dir():
        return None
    problem, new, text = "does not exist; make it", str(folder), "TEXT"
    if folder.exists():
        problem = "is a file, not a dataset folder; if it is text, make one of it"
        new, text = "NEW_FOLDER", str(folder)
    return f"data.path: {folder} {problem}: {_how_to_make(new, text, vocab_size)}"


def _how_to_make(folder: Path | str, text: Path | str, vocab_size: int | None) -> str:
    """Return the command that makes a dataset of text, in the model's vocabulary if it is known."""
    command = f"python -m fasttrain.prepare {folder} --input {text}"
    if vocab_size is None:
        return command
    for size, whose, scripts in _VOCABULARIES:
        if size <= vocab_size < size + 64:  # or rounded up to a multiple of 64
            also = f", or take the shards of FineWeb that {scripts} writes" if scripts else ""
            return (
                f"{command} --tokenizer PATH, with {whose}'s tokenizer.json as PATH (it has the "
                f"vocabulary of model.vocab_size = {vocab_size}){also}"
            )
    return f"{command} --tokenizer {f'bpe:{vocab_size}' if vocab_size > 256 else 'chars'}"


def open_dataset(
    path: str | Path,
    split: Split,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    cache_dir: Path | None = None,
    shard_cache: ShardCache | None = None,
) -> TokenDataset:
    """Open one split of a dataset folder, or of one at an address, and check that it is sound.

    The first opening reads every shard once, for its hash and its largest token; the result is
    cached and holds until the file changes. Shards at an address are fetched into `shard_cache`
    when they are read, and checked then. `vocab_size` is the model's, where it is known; `dtype` is
    for files without header, `end_of_text` for folders without `dataset.json`.
    """
    cache, at_address = store.cache_folder(cache_dir), is_address(path)
    folder = (
        fetch_description(str(path), cache) if at_address else store.user_path(path, "data.path")
    )
    if split not in _SPLIT_IN_NAME:
        raise DataError(f'split must be "train" or "val", got {split!r}')
    if problem := absent(folder, vocab_size):
        raise DataError(problem)
    shards: list[Shard]
    others: dict[str, Any] = {}
    if not (folder / DATASET_JSON).exists():
        shards = [Shard(f, dtype=dtype) for f in _imported_files(folder, split, vocab_size)]
        if len({shard.dtype for shard in shards}) > 1:
            raise DataError(f"{folder}: shards of {split} mix uint16 and uint32; separate them")
    else:
        meta = read_dataset_json(folder)
        if vocab_size is not None and vocab_size < meta["vocab_size"]:
            problem = f"the tokenizer of {folder} has {meta['vocab_size']} tokens"
            remedy = "leave model.vocab_size out or make it at least that"
            raise DataError(f"model.vocab_size = {vocab_size} is too small: {problem}; {remedy}")
        if end_of_text not in (None, meta["end_of_text"]):
            problem = f"but {folder / DATASET_JSON} says {meta['end_of_text']}"
            remedy = "remove data.end_of_text, it is for folders that do not say"
            raise DataError(f"data.end_of_text = {end_of_text}, {problem}; {remedy}")
        if split not in meta["splits"]:
            problem = f"no split {split!r}, only {sorted(meta['splits'])}"
            remedy = "prepare the text again with a --val-fraction above 0"
            raise DataError(f"{folder / DATASET_JSON}: {problem}; {remedy}")
        vocab_size, end_of_text = meta["vocab_size"], meta["end_of_text"]
        listed = meta["splits"][split]
        if at_address:
            kept = shard_cache or ShardCache(cache, DataConfig().cache_gib)
            shards = [RemoteShard(str(path), kept, said, vocab_size) for said in listed["shards"]]
        else:
            shards = [Shard(folder / said["file"], said=said) for said in listed["shards"]]
        others = {"n_bytes": listed["bytes"], "n_documents": listed["documents"]}
        others["tokenizer_path"] = _check_tokenizer(folder, meta)
        others["tokenizer_sha256"] = meta["tokenizer"]["sha256"]
    for shard in [] if at_address else shards:  # those are verified when they are fetched
        shard.verify(cache / "scans", vocab_size)
    if not any(shard.n_tokens for shard in shards):
        what = "has no tokens" if shards else "is empty"
        raise DataError(f"{folder}: split {split!r} {what}; prepare it from more text")
    return TokenDataset(shards=shards, vocab_size=vocab_size, end_of_text=end_of_text, **others)


def fetch_description(address: str, cache: Path) -> Path:
    """Fetch `dataset.json` and the tokenizer of a dataset at an address; return their folder."""
    folder = store.beneath(cache / "remote", address)
    content = store.remote(beside(address, DATASET_JSON), "cat_file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _keep(folder / DATASET_JSON, content)
        for path in folder.iterdir():  # links are not ours: what lies here was fetched
            if path.is_symlink():
                path.unlink()
        entry = read_dataset_json(folder)["tokenizer"]
        path = folder / entry["file"]
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            _keep(path, store.remote(beside(address, entry["file"]), "cat_file"))
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        remedy = "remove it, or set another data.cache_dir"
        raise DataError(f"{error.filename or folder}: {error.strerror}; {remedy}") from error
    return folder


def _keep(path: Path, content: bytes) -> None:
    """Write a file of the cache, in place of whatever is there."""
    if path.is_dir():
        store.clear_place(path)
    write_atomically(path, content)


def _imported_files(folder: Path, split: Split, vocab_size: int | None) -> list[Path]:
    """Return the `.bin` files whose names say that they are of the split, in order of name."""
    files = sorted(folder.glob("*.bin"))
    if not files:
        raise DataError(
            f"data.path: {folder} holds neither {DATASET_JSON} nor .bin shards; if it holds "
            f"text, make a dataset of it: {_how_to_make('NEW_FOLDER', folder, vocab_size)}"
        )
    named = {s: [f for f in files if p.search(f.stem.lower())] for s, p in _SPLIT_IN_NAME.items()}
    if both := [f for f in named["train"] if f in named["val"]]:
        raise DataError(f"{both[0]}: named both train and val; rename it to one of them")
    if not (found := named[split]):
        n_others = sum(map(len, named.values()))
        has = f"; it has {n_others} of the other split" if n_others else ""
        problem = f"no .bin file with {split} in its name{has}"
        raise DataError(f"{folder}: {problem}; rename its shards after their split")
    return found


def _check_tokenizer(folder: Path, meta: Mapping[str, Any]) -> Path:
    entry, vocab = meta["tokenizer"], meta["vocab_size"]
    path: Path = folder / entry["file"]
    if not path.is_file():
        raise DataError(f"{path}: missing; it belongs to the dataset, copy it back")
    if (sha256 := sha256_of(path)) != entry["sha256"]:
        hashes = f"SHA-256 {sha256[:16]}…, {DATASET_JSON} says {entry['sha256'][:16]}…"
        problem = f"not the tokenizer that made these tokens ({hashes})"
        raise DataError(f"{path}: {problem}; restore it or prepare the text again")
    if vocab > max(2**17, n_bytes := path.stat().st_size):  # no token is written in a byte
        problem = f"vocab_size is {vocab}, which no tokenizer of {n_bytes} bytes has"
        raise DataError(f"{folder / DATASET_JSON}: {problem}; prepare the text again")
    return path


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Return `dataset.json` of a folder, every field that is used checked for type and range."""
    path = folder / DATASET_JSON
    remedy = "prepare the text again"
    meta = read_json(path, remedy, DataError)
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path}: not {FORMAT} version {VERSION}; prepare it with this fasttrain")
    if problem := misfit(DatasetJson, meta):
        raise DataError(f"{path}: {problem}; {remedy}")
    vocab_size, dtype, end = meta["vocab_size"], meta["dtype"], meta.setdefault("end_of_text", None)
    fits = 0 < vocab_size <= 2**32 and dtype == dtype_for(vocab_size).name
    if not fits or (end is not None and end >= vocab_size):
        problem = f"vocab_size {vocab_size}, dtype {dtype!r} and end_of_text {end} do not match"
        raise DataError(f"{path}: {problem}; {remedy}")
    # No name of a file leads elsewhere, also not by a link.
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
    for name in [meta["tokenizer"]["file"], *(s[k] for s in shards for k in ("file", "ends_file"))]:
        if any(c in name for c in "/\\\0") or (folder / name).resolve().parent != folder.resolve():
            problem = f"file {name!r} is not inside the folder"
            raise DataError(f"{path}: {problem}; a dataset may only name its own files")
    return meta


def write_dataset_json(
    folder: Path,
    *,
    vocab_size: int,
    end_of_text: int | None,
    splits: Mapping[str, tuple[Sequence[ShardInfo], int]],
    source: Mapping[str, Any],
) -> None:
    """Write `dataset.json`, which makes a folder of shards and `tokenizer.json` a dataset.

    `splits` has, by name, the shards and the UTF-8 bytes of their text; `source` says to people
    what the dataset was made from and how.
    """
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "vocab_size": vocab_size,
        "dtype": dtype_for(vocab_size).name,
        "end_of_text": end_of_text,
        "tokenizer": {"file": "tokenizer.json", "sha256": sha256_of(folder / "tokenizer.json")},
        "splits": {
            name: {
                "tokens": sum(shard["tokens"] for shard in shards),
                "documents": sum(shard["documents"] for shard in shards),
                "bytes": n_bytes,
                "shards": list(shards),
            }
            for name, (shards, n_bytes) in splits.items()
        },
        "source": dict(source),
    }
    write_atomically(folder / DATASET_JSON, (json.dumps(meta, indent=1) + os.linesep).encode())
