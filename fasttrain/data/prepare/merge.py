"""The parts of a dataset, made on several machines, as the one that a single machine would make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.config.untrusted import read_json
from fasttrain.data.files import (
    DataError,
    cache_folder,
    is_address,
    names_at,
    remote,
    shown,
    write_atomically,
)
from fasttrain.data.format import (
    DATASET_JSON,
    Split,
    fetch_description,
    open_dataset,
    read_dataset_json,
)
from fasttrain.data.prepare.build import publish
from fasttrain.data.prepare.place import building, parts_of, place_of
from fasttrain.data.prepare.writer import PREPARED_JSON, Partial, ShardWriter, other_than
from fasttrain.data.remote import ShardCache, beside

BLOCK_TOKENS = 4 << 20  # copied at once


def merge(out: Path | str, *, resume: bool = False, note: Callable[[str], None] = print) -> None:
    """Make the dataset `out` of its parts, whose hashes are verified and which stay.

    Parts are runs of the input in its order, so that their tokens follow on each other; where these
    are cut into shards is new, which is why they are copied.
    """
    place = place_of(out)
    parts = _parts(parts_of(place))
    folders = [_description(part) for part in parts]
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
    with building(place, asked[0], resume=resume, note=note) as partial:
        if partial is None:
            return
        tokenizer = (folders[0] / "tokenizer.json").read_bytes()
        write_atomically(partial.dataset / "tokenizer.json", tokenizer)
        result = {
            "train": _joined(partial, "train", parts, metas),
            "val": _joined(partial, "val", parts, metas),
        }
        facts = (metas[0]["vocab_size"], metas[0]["end_of_text"], problems)
        said = list(publish(partial, result, *facts))
    for line in [*said, f"Merged {shown(place)}; {shown(parts_of(place))} is no longer needed"]:
        note(line)


def _parts(place: str) -> list[str]:
    """Return the parts in a folder or at an address, in order and all of them."""
    if is_address(place):
        names = [name for name in names_at(place) if DATASET_JSON in names_at(f"{place}/{name}")]
    else:
        names = [path.name for path in Path(place).glob("*")]
    found = sorted(name for name in names if re.fullmatch(r"\d+-of-\d+", name))
    wanted = [f"{number}-of-{len(found)}" for number in range(1, len(found) + 1)]
    if not found or set(found) != set(wanted):
        raise DataError(
            f"{shown(place)}: has {', '.join(found) or 'no parts'}, not 1-of-N to N-of-N; make "
            "what is missing (--resume continues a part that was interrupted), remove what is "
            "too many"
        )
    return [f"{place}/{name}" for name in wanted]


def _description(part: str) -> Path:
    """Return a folder of this machine with all of a part but its tokens."""
    if not is_address(part):
        return Path(part)
    folder = fetch_description(part, cache_folder())
    record = remote(beside(part, PREPARED_JSON), "cat_file")
    write_atomically(folder / PREPARED_JSON, record)
    return folder


def _joined(
    partial: Partial, split: Split, parts: list[str], metas: list[dict[str, Any]]
) -> tuple[ShardWriter, int]:
    """Write a split's tokens of all parts; return its closed writer and the bytes of its text."""
    size, tokens = metas[0]["vocab_size"], partial.asked["source"]["shard_tokens"]
    with ShardWriter(partial.dataset, split, vocab_size=size, shard_tokens=tokens) as writer:
        fetched = ShardCache(partial.folder, 1 + 24 * tokens / 2**30)  # two shards and their ends
        for part, meta in zip(parts, metas, strict=True):
            if not meta["splits"][split]["tokens"]:
                continue
            dataset, base = open_dataset(part, split, shard_cache=fetched), 0
            for shard in dataset.shards:
                ends = shard.document_ends()
                for start in range(0, shard.n_tokens, BLOCK_TOKENS):
                    stop = min(start + BLOCK_TOKENS, shard.n_tokens)
                    low, high = np.searchsorted(ends, (start, stop), "right")
                    writer.write(dataset.read(base + start, stop - start), ends[low:high] - start)
                base += shard.n_tokens
    return writer, sum(meta["splits"][split]["bytes"] for meta in metas)
