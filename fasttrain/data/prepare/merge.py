"""The parts of a dataset, made on several machines, as the one that a single machine would make."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.config.untrusted import read_json
from fasttrain.data.files import DataError, write_atomically
from fasttrain.data.format import Split, open_dataset, read_dataset_json
from fasttrain.data.prepare.build import parts_folder, publish
from fasttrain.data.prepare.writer import PREPARED_JSON, Partial, ShardWriter, other_than

BLOCK_TOKENS = 4 << 20  # copied at once


def merge(out: Path, *, resume: bool = False, note: Callable[[str], None] = print) -> Path:
    """Make the dataset folder `out` of its parts, whose hashes are verified and which stay.

    Parts are runs of the input in its order, so that their tokens follow on each other; where these
    are cut into shards is new, which is why they are copied.
    """
    out = Path(os.path.abspath(out))
    folders = _parts(parts_folder(out))
    metas = [read_dataset_json(folder) for folder in folders]
    asked: list[Any] = [read_json(f / PREPARED_JSON, "make it anew", DataError) for f in folders]
    for number, (folder, part, meta) in enumerate(zip(folders, asked, metas, strict=True), 1):
        other = other_than(part, asked[0], folder / PREPARED_JSON)
        if meta["tokenizer"] != metas[0]["tokenizer"]:
            other = other or "another tokenizer"
        if (name := part["source"].get("part")) != f"{number}/{len(folders)}":
            other = other or f"part = {name}"
        if other:
            raise DataError(f"{folder}: not of the dataset of {folders[0].name}: it had {other}")
    del asked[0]["source"]["part"]
    problems: Counter[str] = Counter()
    for meta in metas:
        problems.update(meta["source"]["problems"])
    try:
        with closing(Partial(out, asked[0], resume=resume, note=note)) as partial:
            if partial.complete:
                note(f"{out} is complete already")
                return out
            tokenizer = (folders[0] / "tokenizer.json").read_bytes()
            write_atomically(partial.dataset / "tokenizer.json", tokenizer)
            result = {
                "train": _joined(partial, "train", folders, metas),
                "val": _joined(partial, "val", folders, metas),
            }
            facts = (metas[0]["vocab_size"], metas[0]["end_of_text"], problems)
            said = list(publish(partial, result, *facts))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    for line in [*said, f"Merged {out}; {parts_folder(out)} is no longer needed"]:
        note(line)
    return out


def _parts(folder: Path) -> list[Path]:
    """Return the parts in a folder, in order and all of them."""
    found = sorted(path.name for path in folder.glob("[1-9]*-of-[1-9]*"))
    wanted = [f"{number}-of-{len(found)}" for number in range(1, len(found) + 1)]
    if not found or set(found) != set(wanted):
        raise DataError(
            f"{folder}: has {', '.join(found) or 'no parts'}, not 1-of-N to N-of-N; make what is "
            "missing (--resume continues a part that was interrupted), remove what is too many"
        )
    return [folder / name for name in wanted]


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
