"""The default text: the source of the running Python's standard library, on every machine.

Some 12 MB of real text with structure to learn, no download, and the same files give the same
dataset. It is made once and cached under a hash of the text and of everything that shapes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers

from fasttrain.data.files import DataError, cache_folder, lock
from fasttrain.data.format import DATASET_JSON, write_dataset_json
from fasttrain.data.prepare.writer import ShardWriter
from fasttrain.data.tokenizer import (
    CODE_PATTERN,
    Encoder,
    OtherIdsError,
    end_of_text_id,
    train_bpe,
)

RECIPE = 1  # raise it when anything below changes the tokens
PREFIX, LOCK = ".building-", "lock"
VAL_FRACTION = 0.05
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MIN_BYTES = 1 << 20  # less source than this is a stripped Python, not a text to learn from


def build_default_corpus(
    *,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """The dataset folder made from the standard library's source, built if it is not cached.

    A file is a document. It belongs to validation if the first 32 bits of the SHA-256 of its bytes,
    as a fraction of 2**32, are below 0.05. The tokenizer, a byte-level BPE, is trained on the
    training part only.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = _source_files(root)
    n_bytes = sum(len(content) for _, content in documents)
    if n_bytes < MIN_BYTES:
        raise DataError(
            f"{root}: only {n_bytes} bytes of Python source, too little for a default text; name "
            "a dataset of your own with data.path (python -m fasttrain.prepare makes one)"
        )
    settings = [RECIPE, vocab_size, VAL_FRACTION, CODE_PATTERN, tokenizers.__version__]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, content in documents:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    parent = cache_folder(cache_dir)
    folder = parent / f"python-stdlib-{digest.hexdigest()[:16]}"
    if (folder / DATASET_JSON).is_file():
        return folder

    say = report or (lambda text: None)
    begin = time.perf_counter()
    say(
        f"Preparing the default text once: {n_bytes / 1e6:.1f} MB in {len(documents)} files of "
        f"the source of Python {sys.version.split()[0]}'s standard library ({root})"
    )
    try:
        _remove_leftovers(parent)
        building, held = _new_folder(parent)
        try:
            n_tokens = _build(building, documents, vocab_size, root)
            _move_into_place(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
            if held is not None:
                os.close(held)
    except OSError as error:
        raise DataError(
            f"{parent}: the default text cannot be written there ({error.strerror}); free some "
            "space or name another folder with data.cache_dir"
        ) from error
    say(
        f"Default text ready: {n_tokens / 1e6:.2f} million tokens of {vocab_size} kinds, "
        f"{time.perf_counter() - begin:.1f} s, kept in {folder}"
    )
    return folder


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    """A folder to build in, locked where the file system has locks."""
    while True:
        building = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        try:
            held = lock(building / LOCK)
        except (FileNotFoundError, BlockingIOError):  # another build took it for a leftover
            continue
        except OSError:
            return building, None
        if (building / LOCK).exists():
            return building, held
        os.close(held)


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed builds have left: what no living process has locked."""
    for building in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is being built, or gone, or nobody can tell
            held = lock(building / LOCK)
            shutil.rmtree(building, ignore_errors=True)
            os.close(held)


def _source_files(root: Path) -> list[tuple[str, bytes]]:
    """(relative posix path, content) of every source file that is UTF-8 and not empty, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path))
    documents = []
    for name, path in sorted(found):
        # What is unreadable, or a sample of some other encoding, is left out.
        with suppress(OSError, UnicodeDecodeError):
            content = path.read_bytes()
            content.decode()
            if content:
                documents.append((name, content))
    return documents


def _build(folder: Path, documents: list[tuple[str, bytes]], vocab_size: int, root: Path) -> int:
    """Writes tokenizer, shards and dataset.json. Returns the number of tokens."""
    texts: dict[str, list[str]] = {"train": [], "val": []}
    for _, content in documents:
        share = int(hashlib.sha256(content).hexdigest()[:8], 16) / 2**32
        texts["val" if share < VAL_FRACTION else "train"].append(content.decode())
    tokenizer = train_bpe(texts["train"], vocab_size, pattern=CODE_PATTERN)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    splits, n_tokens, end = {}, 0, end_of_text_id(tokenizer)
    assert end is not None
    for split, parts in texts.items():
        try:
            encoded = Encoder(tokenizer).encode(parts)
        except OtherIdsError:
            encoded = Encoder(tokenizer, use_tiktoken=False).encode(parts)
        ends = np.cumsum([ids.size + 1 for ids in encoded])
        with ShardWriter(folder, split, vocab_size=tokenizer.get_vocab_size()) as writer:
            writer.write(np.concatenate([x for ids in encoded for x in (ids, [end])]), ends)
        splits[split] = (writer.shards, sum(len(part.encode()) for part in parts))
        n_tokens += writer.n_tokens
    write_dataset_json(
        folder,
        vocab_size=tokenizer.get_vocab_size(),
        end_of_text=end,
        splits=splits,
        source={
            "text": "source of Python's standard library",
            "python": sys.version.split()[0],
            "files": len(documents),
            "folder": str(root),
            "val_fraction": VAL_FRACTION,
        },
    )
    return n_tokens


def _move_into_place(building: Path, folder: Path) -> None:
    os.chmod(building, 0o755)
    try:
        os.rename(building, folder)
        (folder / LOCK).unlink(missing_ok=True)
    except OSError:
        # Another process was faster (its folder is as good as this one), or one without
        # dataset.json is in the way, which nothing here leaves behind.
        if not (folder / DATASET_JSON).is_file():
            raise
