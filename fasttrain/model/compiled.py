"""Keeps what torch.compile makes from one process to the next, and checks it before it is used.

What lies there is loaded as machine code, and torch checks none of it: a library that was cut off,
by a power cut, a full disk or a process killed while it linked, ends every later run. So a file
`checked.json` lists each file that was complete, with its SHA-256. A process that starts removes
files that have another content. If it is alone, it also removes files that are not listed: whoever
was making them was killed. Torch makes again what is missing.
"""

import atexit
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import torch
from fasttrain_kernels._torch import compile_cache_counts, has_bf16_instructions
from fasttrain_kernels.cpu._cache import UnsafeFolderError, private_folder

from fasttrain.command import tell
from fasttrain.config import UserError, counted, misfit
from fasttrain.config.untrusted import open_own, read_json
from fasttrain.storage import (
    DataError,
    cache_folder,
    clear_place,
    lock,
    sha256_of,
    write_atomically,
)

CHECKED_JSON, LOCK, USERS = "checked.json", ".lock", "users"
# A file that has not changed for so long is complete, also while other processes compile.
SETTLED_S = 30.0


class _Facts(TypedDict):  # of a file that was complete
    sha256: str
    changed: float  # time at which it was last written to: torch writes to some files again


class CompiledCode:
    """A folder with what torch.compile and Triton keep, which this process uses until it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None
        self._marker: Path | None = None
        self._held: int | None = None

    def check(self) -> int:
        """Remove what is damaged or was never finished; return how many files were damaged.

        The other files in their folders go as well: some belong to the same entry, and Triton takes
        an entry for complete if one of several files is there.
        """
        with suppress(OSError):
            self._lock = lock(self.folder / LOCK)
        alone = self._lock is not None
        if alone:
            self._remove_what_torch_does_not_make()
        self._begin()
        listed = self._listed()
        damaged, unfinished = set[Path](), set[Path]()
        n_damaged = 0
        for name, path in self._files():
            if name in listed:
                if _hash(path) != listed[name]["sha256"]:
                    damaged.add(path.parent)
                    n_damaged += 1
            elif alone:
                unfinished.add(path.parent)
        incomplete = damaged | unfinished
        left = {}
        for name, path in list(self._files()):
            if path.parent in incomplete:
                path.unlink(missing_ok=True)
            elif name in listed:
                left[name] = listed[name]
        if left != listed:  # else what takes the place of these files would count as damaged
            self._write(left)
        self._share()
        return n_damaged

    def record(self) -> None:
        """List the files that are complete; cheap if nothing was compiled since."""
        listed = self._listed()
        complete: dict[str, _Facts] = {}
        alone = self._is_alone()
        killed_at = self._killed_at()
        for name, path in self._files():
            with suppress(OSError):  # it is gone
                changed = path.stat().st_mtime
                if name in listed and listed[name]["changed"] == changed:
                    complete[name] = listed[name]
                elif changed < killed_at and (alone or time.time() - changed > SETTLED_S):
                    complete[name] = _Facts(sha256=_hash(path), changed=changed)
        if complete != listed:
            self._write(complete)
        self._share()

    def end(self) -> None:
        """List what is complete, and that this process was not killed."""
        self.record()
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Leave a file that this process holds until it ends, and removes unless it is killed."""
        with suppress(OSError):
            folder = self.folder / USERS
            folder.mkdir(exist_ok=True)
            self._marker = folder / secrets.token_hex(8)
            self._held = lock(self._marker)

    def _killed_at(self) -> float:
        """Return when the first process began that was killed: what it has made may be cut off."""
        times = [math.inf]
        with suppress(OSError):
            for marker in (self.folder / USERS).iterdir():
                if marker == self._marker:
                    continue
                with suppress(OSError):  # it is held: its process lives
                    os.close(lock(marker))
                    times.append(marker.stat().st_mtime)
        return min(times)

    def _remove_what_torch_does_not_make(self) -> None:
        """Remove links, and what is a folder in place of a file or a file in place of a folder.

        With them go what killed processes have left to be known by: their files go as well.
        """
        for at, folders, names in os.walk(self.folder):
            is_top = Path(at) == self.folder
            for name in names:
                path = Path(at, name)
                if path.is_symlink() or (is_top and name not in (CHECKED_JSON, LOCK)):
                    clear_place(path)
            for name in [*folders]:
                path = Path(at, name)
                is_file_name = "." in name  # no folder of torch has a dot
                if path.is_symlink() or is_file_name or (is_top and name == USERS):
                    clear_place(path)
                    folders.remove(name)

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield name and path of each file; locks, and libraries that name their hash, left out."""
        for at, folders, names in os.walk(self.folder):
            if Path(at) == self.folder:
                folders[:] = [name for name in folders if name not in ("cpp", "locks", USERS)]
                continue
            for name in names:
                path = Path(at, name)
                if not name.endswith(".lock") and path.is_file() and not path.is_symlink():
                    yield path.relative_to(self.folder).as_posix(), path

    def _write(self, facts: dict[str, _Facts]) -> None:
        with suppress(OSError):  # the folder is gone or full: it will be compiled again
            write_atomically(self.folder / CHECKED_JSON, json.dumps(facts).encode())

    def _listed(self) -> dict[str, _Facts]:
        with suppress(UserError):
            listed = read_json(self.folder / CHECKED_JSON, "")
            if not misfit(dict[str, _Facts], listed):
                return listed
        return {}

    def _share(self) -> None:
        """Hold the folder together with the other processes that use it."""
        with suppress(OSError):
            if self._lock is None:
                self._lock = open_own(self.folder / LOCK, os.O_RDWR)
            _flock(self._lock, "LOCK_SH")

    def _is_alone(self) -> bool:
        """Hold the folder for this process alone, if no other one uses it; return whether."""
        with suppress(OSError):
            if self._lock is not None:
                _flock(self._lock, "LOCK_EX", "LOCK_NB")
                return True
        return False


def _flock(descriptor: int, *how: str) -> None:
    import fcntl  # Windows has none

    fcntl.flock(descriptor, sum(getattr(fcntl, name) for name in how))


def _hash(path: Path) -> str:
    with suppress(DataError):
        return sha256_of(path)
    return ""


_kept: CompiledCode | None = None  # the folder is the process's, as the variable that names it


def keep_compiled(folder: Path) -> None:
    """Have torch.compile keep what it makes in ``folder`` from one process to the next.

    Torch's own choice is the folder for temporary files, which a restart clears. Where
    ``TORCHINDUCTOR_CACHE_DIR`` is set, it stands. A folder that others can write is not used: what
    lies in it is executed. Each kind of CPU has a folder of its own: the key
    of an entry leaves out the width of its vectors, and code for AVX-512 that is found and built
    for AVX2 skips half of the elements (torch 2.13). Entries are named by the content of the graph:
    configs share them. With its own entries there, the first step of a run takes seconds instead of
    half a minute.
    """
    global _kept
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    bf16 = "-bf16" if has_bf16_instructions() else ""
    kind = torch.backends.cpu.get_cpu_capability() + bf16
    try:
        kept = private_folder(folder / kind)
    except UnsafeFolderError as error:
        own = cache_folder() / "compiled" / kind
        tell(f"warning: {error}: compiled code is kept in {own}, not in data.cache_dir")
        try:
            kept = private_folder(own)
        except OSError as problem:
            remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder that only you can write"
            raise UserError(f"no folder to keep compiled code in: {problem}; {remedy}") from error
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; set data.cache_dir") from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
    os.environ.setdefault("TRITON_CACHE_DIR", str(kept / "triton"))
    _kept = CompiledCode(kept)
    if n_damaged := _kept.check():
        removed = counted(n_damaged, "damaged file")
        tell(f"warning: {kept}: {removed} of compiled code removed; it is compiled again")
    atexit.register(_kept.end)


def record_compiled() -> None:
    """List what was compiled so far as complete, in case this process is killed."""
    if _kept is not None:
        _kept.record()


def compile_cache_use() -> str | None:
    """Return how warm the cache was for what this process compiled; None: nothing was compiled."""
    hits, misses = compile_cache_counts() or (0, 0)
    if not misses:
        return "warm" if hits else None
    return "partly warm" if hits else "cold"
