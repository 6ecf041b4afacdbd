"""Shards at an address: fetched, ahead of their use, into a bounded folder on this machine.

A file is kept under the SHA-256 that `dataset.json` names, so it is never mistaken for another. The
processes of a machine share the folder: one fetches a file while the others wait for it. A file
that is being fetched counts in full from its beginning. Room is made by what this process does not
need soon, the oldest first; a process that reads an evicted file has it open, and reads on.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fasttrain.data.files import DataError, lock, read_range, shown
from fasttrain.data.shards import HEADER_BYTES, Shard

FETCHERS = 8  # threads that fetch ahead, each a file
PIECE_BYTES = 8 << 20  # of one request: 140 kB/s are enough for it not to count as stalled
ATTEMPTS = 3  # to fetch a file with the right bytes, and to open it before another needs its room
T = TypeVar("T")


def beside(address: str, name: str) -> str:
    """Return the address of a file in the folder at `address`, which may have a query."""
    folder, mark, query = address.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def in_gib(n_bytes: int) -> str:
    """Return a size as a value of data.cache_gib that holds it."""
    return f"{math.ceil(n_bytes / 2**30 * 1000) / 1000:g}"


class RemoteFile(NamedTuple):
    """A file of a dataset at an address, as `dataset.json` describes it."""

    address: str
    sha256: str
    n_bytes: int


class ShardCache:
    """A folder of at most `gib` GiB for files that are fetched when they are needed, or before."""

    def __init__(self, folder: Path, gib: float) -> None:
        self.folder, self.scans = folder / "shards", folder / "scans"
        self.gib, self.limit = gib, int(gib * 2**30)
        self.received = 0  # bytes, over all threads: it changes unless the network hangs
        self._lock = threading.Lock()  # for what follows
        self._n_threads = 0
        self._begins: dict[str, int] = {}  # by SHA-256: bytes of all files that are needed before
        self._missing: deque[RemoteShard] = deque()  # of these files
        self._at = 0  # where in `_begins` the reader is

    def path(self, file: RemoteFile) -> Path:
        """Return where a file lies while it is here."""
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise DataError(f"{shown(file.address)}: {file.sha256[:80]!r} is not a SHA-256")
        return self.folder / f"{file.sha256}.bin"

    def get(self, file: RemoteFile, use: Callable[[], T]) -> T:
        """Return what `use` makes of a file; it raises DataError if that is missing or damaged."""
        for _ in range(ATTEMPTS):
            with suppress(DataError):
                return use()
            with self._locked(f"lock-{file.sha256[:2]}"):
                with suppress(DataError):
                    return use()  # meanwhile another thread or process has fetched it
                self._fetch(file)
        return use()

    def fetch_ahead(self, shards: Sequence[RemoteShard]) -> None:
        """Begin to fetch what is missing of `shards`, in the order of their use, as far as fits."""
        with self._lock:
            begins = accumulate((shard.files[0].n_bytes for shard in shards), initial=0)
            self._begins = dict(zip((shard.sha256 for shard in shards), begins, strict=False))
            self._missing = deque(shard for shard in shards if not shard.path.exists())
            self._at = 0
            self._start_threads()

    def advance(self, shard: RemoteShard) -> None:
        """Note that a shard is read now, and those before it were."""
        with self._lock:
            self._at = self._begins.get(shard.sha256, self._at)
            self._start_threads()

    def _start_threads(self) -> None:
        while self._n_threads < FETCHERS and (shard := self._next()):
            self._n_threads += 1
            name = "fasttrain-fetch"  # a daemon: a hung read does not keep the process from ending
            threading.Thread(target=self._run, args=(shard,), name=name, daemon=True).start()

    def _next(self) -> RemoteShard | None:
        """Return what is to be fetched next, unless it would take the room of what is read before.

        Ranks of a machine read different shards and share the room.
        """
        while self._missing and self._begins[self._missing[0].sha256] < self._at:
            self._missing.popleft()  # the reader has fetched it itself
        room = self.limit // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self._missing:
            sha256, n_bytes = self._missing[0].files[0][1:]
            if self._begins[sha256] + n_bytes - self._at <= max(room, n_bytes):
                return self._missing.popleft()
        return None

    def _run(self, shard: RemoteShard | None) -> None:
        while shard is not None:
            with suppress(Exception):  # the reader tries again, and raises it
                shard.fetch()
            with self._lock:
                shard = self._next()
                self._n_threads -= shard is None

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Keep other threads and processes out of a block."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock(self.folder / name, wait=True)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            os.close(descriptor)

    def _fetch(self, file: RemoteFile) -> None:
        path = self.path(file)
        part = path.with_suffix(".part")
        try:
            while not self._reserve(part, file.n_bytes):
                time.sleep(0.1)
            for _ in range(ATTEMPTS):
                digest = hashlib.sha256()
                with part.open("r+b") as out:
                    for start in range(0, file.n_bytes, PIECE_BYTES):
                        end = min(start + PIECE_BYTES, file.n_bytes)
                        piece = read_range(file.address, start, end, file.n_bytes)
                        digest.update(piece)
                        out.write(piece)
                        self.received += len(piece)
                if digest.hexdigest() == file.sha256:
                    with self._locked("lock"):  # which counts the files
                        return os.replace(part, path)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            with self._locked("lock"):
                part.unlink(missing_ok=True)
        raise DataError(
            f"{shown(file.address)}: its SHA-256 is {digest.hexdigest()[:16]}…, dataset.json says "
            f"{file.sha256[:16]}… ({ATTEMPTS} attempts): damaged or replaced; upload it again"
        )

    def _reserve(self, part: Path, n_bytes: int) -> bool:
        """Make a file of so many bytes, and room for it; False: what others fetch has the room."""

        def order(path: Path) -> tuple[bool, bool, float]:
            begins = self._begins.get(
                path.stem, -1
            )  # what is needed goes last, the soonest at last
            needed = begins >= self._at
            return needed, path.suffix == ".bin", -begins if needed else found[path].st_mtime

        def is_abandoned(path: Path) -> bool:  # by a process that was killed
            if path.suffix != ".part" or path.stem[:2] == part.stem[:2]:
                return path.suffix == ".part"  # this thread has its lock
            with suppress(BlockingIOError):
                os.close(lock(self.folder / f"lock-{path.stem[:2]}"))
                return True
            return False

        with self._locked("lock"):
            found = {path: path.stat() for path in self.folder.iterdir()}
            excess = sum(kept.st_size for kept in found.values()) + n_bytes - self.limit
            for path in sorted(found, key=order):
                if excess > 0 and (path.suffix == ".bin" or is_abandoned(path)):
                    path.unlink()
                    excess -= found[path].st_size
            if excess <= 0:
                with part.open("wb") as out:
                    out.truncate(n_bytes)
            return excess <= 0

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.folder}: {error.strerror}; free some space, lower data.cache_gib or name "
            "another folder with data.cache_dir"
        )


class RemoteShard(Shard):
    """A shard at an address; it is fetched, verified and opened when it is read."""

    def __init__(
        self, address: str, cache: ShardCache, entry: Mapping[str, Any], dtype: str, vocab_size: int
    ) -> None:
        self.cache, self.dtype = cache, np.dtype(dtype).newbyteorder("<")
        self.offset_bytes, self.n_tokens = HEADER_BYTES, entry["tokens"]
        n_bytes = HEADER_BYTES + self.n_tokens * self.dtype.itemsize
        ends = entry["ends_sha256"], 8 * entry["documents"]
        self.files = (
            RemoteFile(beside(address, entry["file"]), entry["sha256"], n_bytes),
            RemoteFile(beside(address, entry["ends_file"]), *ends),
        )
        for file in self.files:
            if file.n_bytes > cache.limit:
                raise DataError(
                    f"data.cache_gib = {cache.gib:g} does not hold "
                    f"{shown(file.address)}; set it to at least {in_gib(file.n_bytes)}"
                )
        self.name, self.path = shown(self.files[0].address), cache.path(self.files[0])
        self.ends = cache.path(self.files[1]), entry["ends_sha256"], entry["documents"]
        # Its largest token is known when it was fetched, and must not be larger than this.
        self.sha256, self.max_token = entry["sha256"], vocab_size - 1
        self._verified: list[int] = []  # the identity of the file that was
        self._local: Shard | None = None  # while it is read

    def scan(self, cache: Path) -> None:
        """Do nothing: it is scanned when it is fetched."""

    def fetch(self) -> Shard:
        """Return the shard's file, opened; fetch it if it is not here."""
        local = self.cache.get(self.files[0], self._open)
        if self._largest > self.max_token:
            index, token = local.first_token_from(self.max_token + 1)
            raise DataError(
                f"{self.name}: token {token} at offset {index} is outside the vocabulary of "
                f"{self.max_token + 1}, of its dataset.json; prepare the text again"
            )
        return local

    def _open(self) -> Shard:
        local = Shard(self.path)
        if local.identity != self._verified:
            local.scan(self.cache.scans)
            found = local.sha256, local.dtype, local.n_tokens
            if found != (self.sha256, self.dtype, self.n_tokens):
                raise DataError(f"{self.name}: not the file that dataset.json describes")
            self._verified, self._largest = local.identity, local.max_token
        return local

    def read_into(self, row: memoryview, start: int) -> None:
        """Fill `row` with the tokens from `start` on; the first time, fetch them."""
        local = self._local
        if local is None:
            self.cache.advance(self)
            local = self._local = self.fetch()
        local.read_into(row, start)

    def check_unchanged(self) -> None:
        """Refuse a file that was changed while it was read, which may be evicted, and close it."""
        local, self._local = self._local, None
        if local is not None:
            local.check_unwritten()

    def document_ends(self) -> Any:
        """Return where the documents in it end, ascending offsets into its tokens."""
        return self.cache.get(self.files[1], super().document_ends)


def n_bytes(*datasets: Sequence[Shard]) -> int:
    """Return how many bytes of shards, with the ends of their documents, are at an address."""
    shards = (s for shards in datasets for s in shards if isinstance(s, RemoteShard))
    return sum({f.sha256: f.n_bytes for shard in shards for f in shard.files}.values())
