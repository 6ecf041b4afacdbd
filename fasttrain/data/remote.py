"""Shards at an address: fetched, ahead of their use, into a bounded folder on this machine.

A file is kept under the SHA-256 that `dataset.json` names. The processes of a machine share the
folder: one fetches a file while the others wait for it, and a file that is being fetched has its
full size from the beginning. Room is made by what this process does not need, the oldest first,
then by what it needs last; whatever reads an evicted file has it open, and reads on.
"""

import errno
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from fasttrain.config.untrusted import open_own
from fasttrain.data.dataset import HEADER_BYTES, Array, Shard, ShardInfo, dtype_for
from fasttrain.storage import (
    RANGE_BYTES,
    DataError,
    NoLocks,
    clear_place,
    lock,
    read_range,
    shown,
)

FETCHERS = 8  # threads that fetch ahead, each a file
ATTEMPTS = 3  # to get the right bytes, and to open a file before another one takes its room
STALE_S = 3600.0  # without locks, a file that was not written to for so long is no longer fetched
# What is kept: a file, or one that is being fetched, with its writer's number where locks lack.
_OWN_NAME = re.compile(r"[0-9a-f]{64}(\.[0-9-]+)?\.(bin|part)")
T = TypeVar("T")


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold a lock of the cache in this block; False: the file system has no locks."""
    try:
        descriptor = lock(path, wait=True)
    except NoLocks:
        yield False
        return
    with open(descriptor):
        yield True


def beside(address: str, name: str) -> str:
    """Return the address of a file in the folder at `address`, which may have a query."""
    folder, mark, query = address.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def in_gib(n_bytes: int) -> str:
    """Return a size as a value of data.cache_gib that holds it."""
    return f"{math.ceil(n_bytes / 2**30 * 1000) / 1000:g}"


class ShardCache:
    """A folder of at most `gib` GiB for files that are fetched when they are needed, or before."""

    def __init__(self, folder: Path, gib: float) -> None:
        self.folder, self.scans = folder / "shards", folder / "scans"
        self.gib, self.limit = gib, int(gib * 2**30)
        self.progress = 0  # grows with each piece, and with each shard that the reader comes to
        self._lock = threading.Lock()  # for what follows
        self._n_threads = 0
        self._coming: list[RemoteShard] = []  # in the order of their use, from what is read now on
        self._missing: set[RemoteShard] = set()  # of these, what no thread has begun to fetch

    def reserve(self, part: Path, n_bytes: int) -> bool:
        """Make a file of so many bytes, and room for it; False: what others fetch has the room."""

        def may_go(path: Path) -> bool:
            if path.suffix != ".part":
                return path.suffix != ""
            if not locked:
                return time.time() - found[path].st_mtime > STALE_S
            if path.stem[:2] != part.stem[:2]:  # ours nobody else writes
                with suppress(BlockingIOError):
                    os.close(lock(self.folder / f"lock-{path.stem[:2]}"))
                    return True  # what wrote it was killed
                return False
            return True

        with _held(self.folder / "lock") as locked:
            uses = {shard.sha256: n for n, shard in enumerate(self._coming)}
            # The folder may hold files of others: they do not count, and stay.
            own = (path for path in self.folder.iterdir() if _OWN_NAME.fullmatch(path.name))
            found = {path: path.lstat() for path in own}
            excess = sum(kept.st_size for kept in found.values()) + n_bytes - self.limit
            # What is never needed goes first, then what is needed last.
            last = {p: (-uses.get(p.stem, math.inf), p.suffix == ".bin") for p in found}
            for path in sorted(found, key=lambda path: (last[path], found[path].st_mtime)):
                if excess > 0 and may_go(path):
                    path.unlink()
                    excess -= found[path].st_size
            if excess <= 0:
                with open(open_own(part, os.O_RDWR), "r+b") as out:
                    out.truncate(0)
                    out.truncate(n_bytes)
            return excess <= 0

    def fetch_ahead(self, shards: Iterable[Shard]) -> None:
        """Begin to fetch what is missing of `shards`, in the order of their use, as far as fits."""
        with self._lock:
            self._coming = [s for s in dict.fromkeys(shards) if isinstance(s, RemoteShard)]
            self._missing = {shard for shard in self._coming if not shard.file.path.exists()}
            self._start_thread()

    def advance(self, shard: "RemoteShard") -> None:
        """Note that a shard is read now, and those before it were."""
        with self._lock:
            if shard in self._coming:
                del self._coming[: self._coming.index(shard)]
            self.progress += 1
            self._start_thread()

    def _start_thread(self) -> None:
        if self._n_threads < FETCHERS and self._next():
            self._n_threads += 1
            name = "fasttrain-fetch"  # a daemon: a hung read does not keep the process from ending
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def _next(self) -> "RemoteShard | None":
        """Return what is to be fetched next, unless it would evict what is read before it."""
        room = self.limit // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks share it
        for shard in self._coming if self._missing else []:
            if (room := room - shard.file.n_bytes) < 0:
                break
            if shard in self._missing:
                return shard
        return None

    def _run(self) -> None:
        while True:
            with self._lock:  # not before: what was next when the thread was started may be read
                if (shard := self._next()) is None:
                    self._n_threads -= 1
                    return
                self._missing.remove(shard)
                self._start_thread()
            with suppress(Exception):  # the reader tries again, and raises it
                shard.fetch()


class RemoteFile:
    """A file of a dataset at an address, kept in a cache; refused if it is none or never fits."""

    def __init__(self, cache: ShardCache, address: str, sha256: str, n_bytes: int) -> None:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DataError(f"{shown(address)}: {sha256[:80]!r} is not a SHA-256")
        if n_bytes > cache.limit:
            problem = f"data.cache_gib = {cache.gib:g} does not hold {shown(address)}"
            raise DataError(f"{problem}; set it to at least {in_gib(n_bytes)}")
        self.cache, self.address, self.sha256, self.n_bytes = cache, address, sha256, n_bytes
        self.path = cache.folder / f"{sha256}.bin"

    def get(self, use: Callable[[], T]) -> T:
        """Return what `use` makes of the file; it raises DataError if that is missing or damaged.

        What is damaged is fetched again, in all `ATTEMPTS` times.
        """
        folder = self.cache.folder
        for _ in range(ATTEMPTS):
            with suppress(DataError):
                return use()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with _held(folder / f"lock-{self.sha256[:2]}") as locked:
                    with suppress(DataError):
                        return use()  # meanwhile another thread or process has fetched it
                    self._fetch(alone=locked)
            except OSError as error:
                remedy = "free some space, lower data.cache_gib or set another data.cache_dir"
                if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
                    remedy = "remove it, or set another data.cache_dir"
                place = error.filename or folder
                raise DataError(f"{place}: {error.strerror}; {remedy}") from error
        return use()

    def _fetch(self, *, alone: bool) -> None:
        """Fetch the file; unless ``alone``, others may fetch it too, and write files of theirs."""
        part, full = self.path.with_suffix(".part"), self.cache.folder / "lock"
        if not alone:
            part = part.with_stem(f"{part.stem}.{os.getpid()}-{threading.get_native_id()}")
        while not self.cache.reserve(part, self.n_bytes):
            time.sleep(0.02)
        try:
            with part.open("r+b") as out:
                for start in range(0, self.n_bytes, RANGE_BYTES):
                    end = min(start + RANGE_BYTES, self.n_bytes)
                    out.write(read_range(self.address, start, end, self.n_bytes))
                    self.cache.progress += 1
            with _held(full):  # held to count files
                if self.path.is_dir():
                    clear_place(self.path)
                os.replace(part, self.path)
        finally:
            with _held(full):
                part.unlink(missing_ok=True)


class RemoteShard(Shard):
    """A shard at an address; it is fetched, verified and opened when it is read."""

    def __init__(self, address: str, cache: ShardCache, said: ShardInfo, vocab_size: int) -> None:
        self.cache, self.said = cache, said
        self.dtype, self.n_tokens = dtype_for(vocab_size), said["tokens"]
        n_bytes = HEADER_BYTES + self.n_tokens * self.dtype.itemsize
        self.file = RemoteFile(cache, beside(address, said["file"]), said["sha256"], n_bytes)
        ends = beside(address, said["ends_file"])
        self.ends_file = RemoteFile(cache, ends, said["ends_sha256"], 8 * said["documents"])
        self.name, self.ends_path = shown(self.file.address), self.ends_file.path
        self.path = Path(self.name)
        self.sha256, self.max_token = said["sha256"], vocab_size - 1  # at most
        self._verified: list[int] = []  # the identity of the file that was

    def fetch(self) -> Shard:
        """Return the shard's file, opened; fetch it if it is not here."""
        return self.file.get(self._open)

    def _open(self) -> Shard:
        local = Shard(self.file.path, said=self.said, name=self.name)
        if local.identity != self._verified:
            local.verify(self.cache.scans, self.max_token + 1)
            self._verified = local.identity
        return local

    def read(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Fill each buffer, as `Shard.read` does; fetch the file if need be, open it only now."""
        self.cache.advance(self)
        self.fetch().read(pieces)

    def document_ends(self) -> Array:
        """Return where the documents in it end; fetch the file if it is not here."""
        return self.ends_file.get(super().document_ends)


def n_bytes(*datasets: Sequence[Shard]) -> int:
    """Return how many bytes of shards, with the ends of their documents, are at an address."""
    shards = (s for shards in datasets for s in shards if isinstance(s, RemoteShard))
    return sum({f.sha256: f.n_bytes for s in shards for f in (s.file, s.ends_file)}.values())
