"""The parts of a dataset, made on several machines, as the one that a single machine would make."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np

from fasttrain.config.untrusted import misfit, read_json
from fasttrain.data.files import DataError, write_atomically
from fasttrain.data.format import Split, open_dataset, read_dataset_json
from fasttrain.data.prepare.build import finish, parts_folder, tell_counts
from fasttrain.data.prepare.writer import PREPARED_JSON, Asked, Partial, ShardWriter, other_than

BLOCK_TOKENS = 4 << 20  # copied at once


class _Source(TypedDict):
    """What is used of a part's source, beside what shapes it."""

    part: str
    shard_tokens: int
    val_fraction: float | str
    problems: dict[str, int]
    exact: bool  # encoded without tiktoken, which gave other ids


def merge(out: Path, *, resume: bool = False, note: Callable[[str], None] = print) -> Path:
    """Make the dataset folder `out` of its parts, which stay; every file of theirs is verified.

    Parts are runs of the input in its order, so that their tokens follow on each other; where these
    are cut into shards changes, which is why they are copied.
    """
    out = Path(os.path.abspath(out))
    folders = _folders(parts_folder(out))
    asked, metas = _read(folders)
    problems: Counter[str] = Counter()
    for meta in metas:
        problems.update(meta["source"]["problems"])
    try:
        with closing(Partial(out, asked, resume=resume, note=note)) as partial:
            if partial.complete:
                note(f"{out} is complete already")
                return out
            tokenizer = (folders[0] / "tokenizer.json").read_bytes()
            write_atomically(partial.dataset / "tokenizer.json", tokenizer)
            splits: tuple[Split, ...] = ("train", "val")
            result: dict[str, tuple[ShardWriter, int]] = {
                split: _joined(partial, split, folders, metas) for split in splits
            }
            finish(partial, result, metas[0]["vocab_size"], metas[0]["end_of_text"], problems)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    tell_counts(asked, result, problems, note)
    note(f"Merged {len(folders)} parts into {out}; {parts_folder(out)} is no longer needed")
    return out


def _folders(folder: Path) -> list[Path]:
    """Return the parts in a folder in order, all of them."""
    found = [path.name for path in folder.glob("[0-9]*-of-[0-9]*")]
    counts = sorted({name.partition("-of-")[2] for name in found})
    if len(counts) != 1:
        raise DataError(
            f"{folder}: parts of {' and of '.join(counts)}; remove those of one"
            if counts
            else f"{folder}: no parts of a dataset; make them with --shard-of 1/N to N/N"
        )
    wanted = [f"{number}-of-{counts[0]}" for number in range(1, int(counts[0]) + 1)]
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f"{folder}: {', '.join(missing)} missing, which is there when its run has ended; "
            "--resume continues one that was interrupted"
        )
    return [folder / name for name in wanted]


def _read(folders: list[Path]) -> tuple[Asked, list[dict[str, Any]]]:
    """Return what all parts were made of, and the `dataset.json` of each."""
    first: Asked | None = None
    metas = []
    for number, folder in enumerate(folders, 1):
        asked = cast(Asked, read_json(folder / PREPARED_JSON, "make the part anew", DataError))
        meta = read_dataset_json(folder)
        source = asked.get("source", {}) | meta.get("source", {})
        problem = misfit(Asked, asked) or misfit(_Source, source)
        if problem or asked["source"].pop("part") != f"{number}/{len(folders)}":
            raise DataError(f"{folder}: not that part ({problem or source['part']}); make it anew")
        metas.append(meta)
        first = first or asked
        if other := other_than(first, asked, folders[0] / PREPARED_JSON):
            raise DataError(f"{folder}: made of something else: {folders[0].name} had {other}")
        if meta["tokenizer"] != metas[0]["tokenizer"]:
            raise DataError(
                f"{folder}: its tokenizer is not that of {folders[0].name}; make it anew"
            )
        if meta["source"]["exact"] != metas[0]["source"]["exact"]:
            raise DataError(
                f"{folder}: only in it or in {folders[0].name} tiktoken gave other ids than the "
                "tokenizer; make all parts where tiktoken is not installed"
            )
    assert first is not None
    return first, metas


def _joined(
    partial: Partial, split: Split, folders: list[Path], metas: list[dict[str, Any]]
) -> tuple[ShardWriter, int]:
    """Write a split's tokens of all parts; return its closed writer and the bytes of its text."""
    size, tokens = metas[0]["vocab_size"], partial.asked["source"]["shard_tokens"]
    with ShardWriter(partial.dataset, split, vocab_size=size, shard_tokens=tokens) as writer:
        for folder, meta in zip(folders, metas, strict=True):
            if not meta["splits"][split]["tokens"]:
                continue
            dataset, base = open_dataset(folder, split), 0
            for shard in dataset.shards:
                ends = shard.document_ends()
                for start in range(0, shard.n_tokens, BLOCK_TOKENS):
                    stop = min(start + BLOCK_TOKENS, shard.n_tokens)
                    low, high = np.searchsorted(ends, (start, stop), "right")
                    writer.write(dataset.read(base + start, stop - start), ends[low:high] - start)
                base += shard.n_tokens
    return writer, sum(meta["splits"][split]["bytes"] for meta in metas)
