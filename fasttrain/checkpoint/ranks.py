"""One checkpoint from several ranks: each writes what lies on it, rank 0 commits all of it at once.

    step-00001000/  model.rank-00000.safetensors …  slices of tensors, and what else is rank 0's
                    trainer.safetensors             a file of rank 0 that holds no slices
                    rank-00000.json …               by rank: bytes and SHA-256 of its files, and
                                                    where in the whole each of its slices lies

Ranks wait only for files, in the thread that writes. They share one temporary folder, whose name
all of them know. Each rank writes and fsyncs its files there and then renames `rank-….json` into
place, which says "done" or why not. Rank 0 waits for those of all ranks, lists them in the manifest
and commits. If that fails, it leaves `.tmp-failed-…`; the other ranks wait for that file, or for
the manifest of this very save.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import CheckpointError, RankRecord
from fasttrain.config.untrusted import misfit
from fasttrain.distributed.slices import Slice, locate

Slices = dict[str, dict[str, Slice]]  # file → tensor → where it lies in the whole
SliceNumbers = dict[str, dict[str, list[int]]]  # the same as in a RankRecord, or by group

_RECORD = re.compile(r"rank-(\d{5})\.json")
_POLLS_S = (0.002, 0.2)  # between two looks: at first, at last


def own_slices(
    groups: Mapping[str, Mapping[str, Tensor]], rank: int
) -> tuple[dict[str, dict[str, Tensor]], SliceNumbers]:
    """Return what this rank writes, as ordinary tensors, and which of them are slices.

    These are its slices of DTensors that no lower rank holds too, and on rank 0 all other tensors,
    on another rank those whose name ends in ``@`` and its number.
    """
    own: dict[str, dict[str, Tensor]] = {}
    slices: SliceNumbers = {}
    for group, tensors in groups.items():
        own[group], slices[group] = {}, {}
        for name, tensor in tensors.items():
            located = locate(tensor)
            if located is None:
                if rank == 0 or name.endswith(f"@{rank}"):
                    own[group][name] = tensor
                continue
            part, first = located
            local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
            if tuple(local.shape) != part.local_shape:
                raise CheckpointError(
                    f"checkpoint: {group}.{name} of shape {part.shape} holds {tuple(local.shape)} "
                    f"on rank {rank}, not {part.local_shape}; shard it evenly, as FSDP2 does"
                )
            if first and (local.numel() or (rank == 0 and not tensor.numel())):
                own[group][name] = local
                if local.shape != tensor.shape and tensor.numel():
                    slices[group][name] = [part.dim, part.begin, part.end, *part.shape]
    return own, slices


def read_slices(
    path: Path,
    manifest: Mapping[str, Any],
    texts: Mapping[str, bytes],
    stored: Mapping[str, Mapping[str, Tensor]],
) -> Slices:
    """Return the slices in each file; CheckpointError unless those of each tensor are complete.

    ``texts`` hold the records of the ranks; ``stored`` is what lies in each file.
    """
    records = sorted(filter(_RECORD.fullmatch, texts)) if "ranks" in manifest else []
    if len(records) != manifest.get("ranks", 0):
        raise CheckpointError(f"{path / disk.MANIFEST}: malformed: {len(records)} records of ranks")
    slices: Slices = {}
    tensors: dict[str, list[Slice]] = {}
    for file in (path / name for name in records):
        record = disk.parse_json(file, texts[file.name])
        if problem := misfit(RankRecord, record):
            raise CheckpointError(f"{file}: malformed: {problem}")
        for place, parts_of_file in record["slices"].items():
            slices[place] = {}
            for name, numbers in parts_of_file.items():
                part = _slice_of(numbers, stored.get(place, {}).get(name))
                if part is None:
                    problem = f"no tensor {name} in {place} can be the slice {numbers}"
                    raise CheckpointError(f"{file}: malformed: {problem}")
                slices[place][name] = part
                tensors.setdefault(f"{place.partition('.')[0]}.{name}", []).append(part)
    for name, parts in tensors.items():
        parts.sort(key=lambda p: p.begin)
        ends = [0, *(p.end for p in parts)]
        shape, dim = parts[0].shape, parts[0].dim
        found = [(p.shape, p.dim, p.begin) for p in parts]
        if found != [(shape, dim, end) for end in ends[:-1]] or ends[-1] != shape[dim]:
            raise CheckpointError(f"{path}: malformed: the slices of {name} are not all there")
    return slices


def _slice_of(numbers: list[int], stored: Tensor | None) -> Slice | None:
    """Return the slice that a record describes; None unless what is stored has its shape."""
    if stored is None or len(numbers) != 3 + stored.dim() or numbers[0] >= stored.dim():
        return None
    dim, begin, end, *shape = numbers
    part = Slice(tuple(shape), dim, begin, end)
    return part if part.local_shape == tuple(stored.shape) else None


class Ranks:
    """The ranks that write one checkpoint together, seen from one of them.

    No earlier ranks had their ``session``; ``patience_s`` is how long a rank waits for the others.
    """

    def __init__(self, folder: Path, rank: int, size: int, session: str, patience_s: float) -> None:
        self.rank, self.size, self.session = rank, size, session
        self.patience_s = patience_s
        self.abandoned = threading.Event()
        self._folder = folder

    def partial(self, path: Path, number: int) -> Path:
        """Return the temporary folder of a checkpoint, the same on all ranks."""
        mark = f"{self.session}-{number}" if self.size > 1 else os.getpid()
        return self._folder / f".tmp-{path.name}-{mark}"

    def spared(self, partial: Path) -> tuple[str, ...]:
        """Return the beginnings of names that no sweep may remove: others may be writing there."""
        return (partial.name, self._failed("").name) if self.size > 1 else ()

    def hand_in(self, partial: Path, **record: Any) -> None:
        """Tell rank 0 that this rank's files are on the disk, or why they are not."""
        if self.size > 1:
            name = f"rank-{self.rank:05d}.json"
            hidden = partial / f".{name}"
            disk.remove(hidden)
            disk.write_file(hidden, disk.seal({"save": partial.name, **record}))
            # Nothing may fail after it; rank 0 fsyncs the folder.
            os.replace(hidden, partial / name)

    def collect(self, partial: Path, path: Path) -> dict[str, dict[str, Any]]:
        """On rank 0: wait until all ranks have handed in; return the entries of their files."""
        entries: dict[str, dict[str, Any]] = {}
        end = time.monotonic() + self.patience_s
        for rank in range(self.size):
            file = partial / f"rank-{rank:05d}.json"
            late = f"rank {rank} did not write its part within {self.patience_s:g} s"
            self._wait(file.exists, path, late, end)
            text = file.read_bytes()
            record = disk.parse_json(file, text)
            if error := record.get("error"):
                raise CheckpointError(f"{path} was not saved: rank {rank}: {error}")
            entry = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            entries |= {**record["files"], file.name: entry}
        return entries

    def give_up(self, partial: Path, error: BaseException) -> None:
        """On rank 0: tell the others that there is no checkpoint."""
        if self.size > 1:
            failed = self._failed(partial.name)
            disk.remove(failed)
            disk.write_file(failed, str(error).encode())

    def await_commit(self, partial: Path, path: Path) -> None:
        """On another rank: wait until rank 0 has committed; CheckpointError if it did not."""

        def done() -> bool:
            here = partial.exists()  # looked at first: a failure written before it went is seen
            failed = self._failed(partial.name)
            if failed.exists():
                raise CheckpointError(
                    failed.read_text(errors="replace") or f"{path} was not saved; see rank 0"
                )
            with contextlib.suppress(OSError):
                saved = json.loads((path / disk.MANIFEST).read_text()).get("save")
                return not here and bool(saved == partial.name)
            return False

        late = f"rank 0 did not commit it within {self.patience_s:g} s"
        self._wait(done, path, late, time.monotonic() + self.patience_s)

    def committed(self) -> None:
        """On rank 0, after a commit: no rank waits any more for what failed earlier."""
        if self.size > 1:
            for failed in self._folder.glob(f"{self._failed('').name}*"):
                disk.remove(failed)

    def _failed(self, partial_name: str) -> Path:
        return self._folder / f".tmp-failed-{self.session}{partial_name}"

    def _wait(self, done: Callable[[], bool], path: Path, late: str, end: float) -> None:
        pause, longest = _POLLS_S
        while not done():
            if self.abandoned.wait(pause):
                raise CheckpointError(f"{path} was not saved: the run ended before it was")
            if time.monotonic() > end:
                raise CheckpointError(f"{path} was not saved: {late}; see what became of that rank")
            pause = min(1.5 * pause, longest)
