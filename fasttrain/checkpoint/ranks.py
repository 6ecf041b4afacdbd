"""One checkpoint from several ranks: each writes what lies on it, rank 0 commits all of it at once.

    step-00001000/  model.rank-00000.safetensors …  slices of tensors, and what else is rank 0's
                    trainer.safetensors             a file of rank 0 that holds no slices
                    rank-00000.json …               by rank: bytes and SHA-256 of its files, and
                                                    where in the whole each of its slices lies

Ranks wait only for files, in the thread that writes. They share one temporary folder, whose name
all of them know. Each rank writes and fsyncs its files there, then renames `rank-….json` into
place: that file says "done", or why not. Rank 0 waits for those of all ranks, lists them in the
manifest and commits. If that fails, it leaves `.tmp-failed-…`; the other ranks wait for that file,
or for the manifest of this very save.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import CheckpointError, RankRecord
from fasttrain.config.untrusted import misfit
from fasttrain.distributed.lockstep import Patience
from fasttrain.distributed.sharding import Slice, locate
from fasttrain.distributed.world import World

SliceNumbers = dict[str, dict[str, list[int]]]  # as in a RankRecord
Pieces = list[tuple[Slice, Tensor]]  # of one tensor: where they lie in it, and as they are stored

_RECORD = re.compile(r"rank-(\d{5})\.json")
_POLLS_S = (0.002, 0.2)  # between two looks: at first, at last


def own_slices(
    groups: Mapping[str, Mapping[str, Tensor]], rank: int
) -> tuple[dict[str, dict[str, Tensor]], SliceNumbers]:
    """Return what this rank writes, as ordinary tensors, and which of them are slices.

    Both by file. These are its slices of DTensors that no lower rank holds too, and on rank 0 all
    other tensors, on another rank those whose name ends in ``@`` and its number.
    """
    own: dict[str, dict[str, Tensor]] = {}
    slices: SliceNumbers = {}
    for group, tensors in groups.items():
        mine: dict[str, Tensor] = {}
        parts: dict[str, list[int]] = {}
        for name, tensor in tensors.items():
            if (located := locate(tensor)) is None:
                if rank == 0 or name.endswith(f"@{rank}"):
                    mine[name] = tensor
                continue
            part, first = located
            local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
            if tuple(local.shape) != part.local_shape:
                raise CheckpointError(
                    f"checkpoint: {group}.{name} of shape {part.shape} holds {tuple(local.shape)} "
                    f"on rank {rank}, not {part.local_shape}; shard it evenly, as FSDP2 does"
                )
            if first and (local.numel() or (rank == 0 and not tensor.numel())):
                mine[name] = local
                if local.shape != tensor.shape and tensor.numel():
                    parts[name] = [part.dim, part.begin, part.end, *part.shape]
        mark = f".rank-{rank:05d}" if rank or parts else ""
        file = f"{group}{mark}.safetensors"
        own |= {file: mine} if mine or not rank else {}
        slices |= {file: parts} if parts else {}
    return own, slices


def read_slices(
    path: Path,
    manifest: Mapping[str, Any],
    texts: Mapping[str, bytes],
    stored: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Pieces]:
    """Return all tensors in the pieces that are ``stored`` in files.

    The records of the ranks, among the ``texts``, say what is a slice. Raises CheckpointError
    unless the slices of each tensor are complete.
    """
    records = sorted(filter(_RECORD.fullmatch, texts)) if "ranks" in manifest else []
    if len(records) != manifest.get("ranks", 0):
        raise CheckpointError(f"{path / disk.MANIFEST}: malformed: {len(records)} records of ranks")
    slices: dict[tuple[str, str], Slice] = {}
    for file in (path / name for name in records):
        record = disk.parse_json(file, texts[file.name])
        if problem := misfit(RankRecord, record):
            raise CheckpointError(f"{file}: malformed: {problem}")
        for place, parts_of_file in record["slices"].items():
            for name, numbers in parts_of_file.items():
                part = _slice_of(numbers, stored.get(place, {}).get(name))
                if part is None:
                    problem = f"no tensor {name} in {place} can be the slice {numbers}"
                    raise CheckpointError(f"{file}: malformed: {problem}")
                slices[place, name] = part
    tensors: dict[str, Pieces] = {}
    for place, found in stored.items():
        for name, tensor in found.items():
            piece = slices.get((place, name)) or Slice.all_of(tensor), tensor
            tensors.setdefault(f"{place.partition('.')[0]}.{name}", []).append(piece)
    for name, pieces in tensors.items():
        pieces.sort(key=lambda piece: piece[0].begin)
        ends = [0, *(part.end for part, _ in pieces)]
        (shape, dim, _), *others = {(part.shape, part.dim, t.dtype) for part, t in pieces}
        begins = [*(part.begin for part, _ in pieces), shape[dim] if shape else 1]
        if others or begins != ends:
            raise CheckpointError(f"{path}: malformed: the slices of {name} are not all there")
    return tensors


def _slice_of(numbers: list[int], stored: Tensor | None) -> Slice | None:
    """Return the slice that a record describes; None unless what is stored has its shape."""
    if stored is None or len(numbers) != 3 + stored.dim() or numbers[0] >= stored.dim():
        return None
    dim, begin, end, *shape = numbers
    part = Slice(tuple(shape), dim, begin, end)
    return part if part.local_shape == tuple(stored.shape) else None


class Ranks:
    """The ranks that write checkpoints together, seen from one of them.

    ``patience_s`` is how long a rank waits for the others; ``mark`` is part of the names of what
    they write, and of none that other ranks wrote earlier.
    """

    def __init__(self, world: World, patience_s: float) -> None:
        self.rank, self.size, self.patience_s = world.rank, world.size, patience_s
        self.mark = f"-{world.share(disk.new_mark())}-"
        self.abandoned = threading.Event()

    def hand_in(self, partial: Path, **record: Any) -> None:
        """Tell rank 0 that this rank's files are on the disk, or why they are not."""
        name = f"rank-{self.rank:05d}.json"
        disk.write_file(partial / f".{name}", disk.seal({"save": partial.name, **record}))
        os.replace(partial / f".{name}", partial / name)  # nothing may fail after it

    def fail(self, partial: Path, error: Exception) -> None:
        """Tell rank 0 why this rank's files are not there, and make room for that."""
        partial.mkdir(exist_ok=True)
        for file in partial.glob(f"*rank-{self.rank:05d}*"):
            disk.remove(file)
        self.hand_in(partial, error=str(error))

    def collect(self, partial: Path, path: Path) -> dict[str, dict[str, Any]]:
        """On rank 0: wait until all ranks have handed in; return the entries of their files."""
        entries: dict[str, dict[str, Any]] = {}
        patience = Patience(self.patience_s)
        for rank in range(self.size):
            file = partial / f"rank-{rank:05d}.json"
            self._wait(file.exists, path, f"rank {rank} did not write its part", patience)
            text = file.read_bytes()
            record = disk.parse_json(file, text)
            if error := record.get("error"):
                raise CheckpointError(f"{path} was not saved: rank {rank}: {error}")
            entry = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            entries |= {**record["files"], file.name: entry}
        return entries

    def give_up(self, partial: Path, error: Exception) -> None:
        """On rank 0: tell the others that there is no checkpoint."""
        if self.size > 1:
            disk.point(self._failed(partial), str(error))

    def await_commit(self, partial: Path, path: Path) -> None:
        """On another rank: wait until rank 0 has committed; CheckpointError if it did not."""

        def done() -> bool:
            if problem := disk.pointed(self._failed(partial)):
                raise CheckpointError(problem)
            return partial.name in disk.pointed(path / disk.MANIFEST)

        self._wait(done, path, "rank 0 did not commit it", Patience(self.patience_s))

    def _failed(self, partial: Path) -> Path:
        return partial.with_name(f".tmp-failed{self.mark}{partial.name.rpartition('-')[2]}")

    def _wait(self, done: Callable[[], bool], path: Path, late: str, patience: Patience) -> None:
        pause, longest = _POLLS_S
        while not done():
            if self.abandoned.wait(pause):
                raise CheckpointError(f"{path} was not saved: the run ended before it was")
            if patience.is_over():
                raise CheckpointError(
                    f"{path} was not saved: {late} within {self.patience_s:g} s; see what became "
                    "of that rank"
                )
            pause = min(1.5 * pause, longest)
