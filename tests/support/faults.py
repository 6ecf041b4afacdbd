"""Fault injection: crashes, full disks, lost writes and flipped bits, at a chosen operation.

`Faults` stands between a program and one folder. It counts every operation that changes the folder
(create, write, fsync, rename, replace, unlink, mkdir, rmdir) and can crash at the n-th, fail at it,
or run a hook before it. As fsync is what makes a change survive a power cut, it remembers what has
not been fsynced yet and can take it away again, as a disk would.
"""

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["LOSSES", "Crash", "Faults", "flip_bit"]

# What a crash leaves of that which was not fsynced.
LOSSES = (
    "nothing",  # the process was killed: the kernel still writes everything
    "data",  # power cut: names reached the disk, the files' data did not: they are short
    "zeroed",  # the same on file systems that persist the size first: they hold zeros
    "names",  # power cut: neither the data nor the changes of names since the last folder fsync
    "half",  # the same, but the older half of the changes of names did reach the disk
)
_GROWING = {"create", "write", "mkdir"}
_NAMES = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "close")


class Crash(BaseException):
    """The process died here: nothing it would do later happens, its cleaning up included."""


@dataclass
class _Change:
    """A change of names that no folder fsync has covered yet, and the way to take it back.

    The folder is held open, since it may have another name by the time of the undoing.
    """

    folder: int
    undo: Callable[[int], None]


@dataclass
class _Data:
    descriptor: int
    durable: int = 0  # bytes that an fsync has covered
    written: int = 0


class Faults:
    """Counts the operations under `root` while active, and lets one of them go wrong.

    Args:
        root: operations elsewhere pass untouched.
        crash_at: number of the operation, from 0, at which `Crash` is raised; half of the bytes are
            written where it is a write. Every later operation raises too.
        fail_at: number of the operation that raises OSError(`error`); likewise half-written.
        error: an errno.
        persistent: after `fail_at`, whatever needs space fails as well, as on a full disk.
        before: called with the description of each operation before it runs, as in
            ``"write step-1/state.json"``.

    `log` holds the descriptions of the operations so far.
    """

    def __init__(
        self,
        root: Path,
        *,
        crash_at: int | None = None,
        fail_at: int | None = None,
        error: int = errno.ENOSPC,
        persistent: bool = False,
        before: Callable[[str], None] | None = None,
    ) -> None:
        self.root = os.path.realpath(root)
        self.crash_at, self.fail_at = crash_at, fail_at
        self.error, self.persistent, self.before = error, persistent, before
        self.log: list[str] = []
        self.crashed = False
        self._real: dict[str, Any] = {}
        self._paths: dict[int, str] = {}  # of open descriptors
        self._names: list[_Change] = []
        self._data: dict[int, _Data] = {}  # by inode
        self._grave = Path()  # what an undo may need again
        self._buried = 0

    def __enter__(self) -> "Faults":
        folder, name = os.path.split(self.root)
        os.makedirs(folder, exist_ok=True)
        self._grave = Path(tempfile.mkdtemp(prefix=f"{name}.grave-", dir=folder))
        for name in _NAMES:
            self._real[name] = getattr(os, name)
            setattr(os, name, getattr(self, f"_{name}"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def lose(self, loss: str) -> None:
        """Takes away what had not been fsynced, in one of the ways of LOSSES; after the block."""
        for data in self._data.values():
            if data.durable < data.written and loss != "nothing":
                os.ftruncate(data.descriptor, data.durable)
                if loss == "zeroed":
                    os.ftruncate(data.descriptor, data.written)
            os.close(data.descriptor)
        kept = {"names": 0, "half": len(self._names) // 2}.get(loss, len(self._names))
        for change in reversed(self._names[kept:]):
            change.undo(change.folder)
        for change in self._names:
            os.close(change.folder)
        self._data.clear()
        self._names.clear()

    # ---- bookkeeping -----------------------------------------------------------------------------

    def _inside(self, path: Any) -> str | None:
        try:
            text = os.fsdecode(path)
        except TypeError:
            return None
        text = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
        return text if text == self.root or text.startswith(self.root + os.sep) else None

    def _happens(self, kind: str, path: str, partly: Callable[[], None] | None = None) -> None:
        if self.crashed:
            raise Crash("the process is dead")
        number = len(self.log)
        self.log.append(f"{kind} {os.path.relpath(path, self.root)}")
        if self.before is not None:
            self.before(self.log[-1])
        full = (
            self.persistent
            and self.fail_at is not None
            and number > self.fail_at
            and kind in _GROWING
        )
        if number == self.crash_at:
            if partly:
                partly()
            self.crashed = True
            raise Crash(self.log[-1])
        if number == self.fail_at or full:
            if partly and not full:
                partly()
            raise OSError(self.error, os.strerror(self.error), path)

    def _changed(self, path: str, undo: Callable[[int], None]) -> None:
        folder = self._real["open"](os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        self._names.append(_Change(folder, undo))

    def _bury(self, path: str) -> Path:
        """Keeps a second name for a file that is about to lose its last one."""
        self._buried += 1
        grave = self._grave / str(self._buried)
        os.link(path, grave, follow_symlinks=False)
        return grave

    # ---- the operations --------------------------------------------------------------------------

    def _open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        inside = self._inside(path)
        creates = inside is not None and flags & os.O_CREAT and not os.path.exists(inside)
        if creates:
            self._happens("create", inside or "")
        descriptor: int = self._real["open"](path, flags, *args, **kwargs)
        self._paths.pop(descriptor, None)
        if inside is not None and flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            self._paths[descriptor] = inside
        if inside is not None and creates:
            name = os.path.basename(inside)
            self._changed(inside, lambda folder: os.unlink(name, dir_fd=folder))
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        self._real["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        path = self._paths.get(descriptor)
        if path is None:
            return int(self._real["write"](descriptor, data))
        inode = os.fstat(descriptor).st_ino
        if inode not in self._data:
            self._data[inode] = _Data(os.dup(descriptor))

        def write(part: Any) -> int:
            written = int(self._real["write"](descriptor, part))
            self._data[inode].written += written
            return written

        half = len(data) // 2
        half -= half % 4096 if len(data) >= 4096 else 0  # past the page cache go whole pages
        self._happens("write", path, partly=lambda: write(data[:half]) and None)
        return write(data)

    def _fsync(self, descriptor: int) -> None:
        """Counts and records, but spares the disk: power is never cut in earnest."""
        path = self._paths.get(descriptor)
        if path is None:
            return self._real["fsync"](descriptor)
        self._happens("fsync", path)
        inode = os.fstat(descriptor).st_ino
        if inode in self._data:
            self._data[inode].durable = self._data[inode].written
        covered = [c for c in self._names if os.fstat(c.folder).st_ino == inode]
        self._names = [c for c in self._names if c not in covered]
        for change in covered:
            self._real["close"](change.folder)

    def _rename(self, source: Any, target: Any, kind: str = "rename") -> None:
        old, new = self._inside(source), self._inside(target)
        if old is None or new is None:
            return self._real["rename"](source, target)
        assert os.path.dirname(old) == os.path.dirname(new), (
            "moves between folders are not modelled"
        )
        self._happens(kind, new)
        grave = self._bury(new) if os.path.isfile(new) else None
        self._real["rename"](old, new)
        was, now = os.path.basename(old), os.path.basename(new)

        def undo(folder: int) -> None:
            os.rename(now, was, src_dir_fd=folder, dst_dir_fd=folder)
            if grave is not None:
                os.rename(grave, now, dst_dir_fd=folder)

        self._changed(new, undo)

    def _replace(self, source: Any, target: Any) -> None:
        self._rename(source, target, kind="replace")

    def _unlink(self, path: Any, **kwargs: Any) -> None:
        inside = self._inside(path)
        if inside is None or not os.path.lexists(inside):
            return self._real["unlink"](path, **kwargs)
        self._happens("unlink", inside)
        grave = self._bury(inside)
        self._real["unlink"](inside)
        name = os.path.basename(inside)
        self._changed(inside, lambda folder: os.rename(grave, name, dst_dir_fd=folder))

    def _mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        inside = self._inside(path)
        if inside is None or os.path.exists(inside):
            return self._real["mkdir"](path, *args, **kwargs)
        self._happens("mkdir", inside)
        self._real["mkdir"](inside, *args, **kwargs)
        name = os.path.basename(inside)
        # With all that is in it, even fsynced: what no folder lists is lost.
        self._buried += 1
        grave = self._grave / str(self._buried)
        self._changed(inside, lambda folder: os.rename(name, grave, src_dir_fd=folder))

    def _rmdir(self, path: Any, **kwargs: Any) -> None:
        inside = self._inside(path)
        if inside is None:
            return self._real["rmdir"](path, **kwargs)
        self._happens("rmdir", inside)
        if os.listdir(inside):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), inside)
        # Kept, not made anew by an undo: earlier changes in it are undone by its inode.
        self._buried += 1
        grave, name = self._grave / str(self._buried), os.path.basename(inside)
        self._real["rename"](inside, grave)
        self._changed(inside, lambda folder: os.rename(grave, name, dst_dir_fd=folder))


def flip_bit(path: Path, bit: int) -> None:
    """Flips one bit of a file, counted from its first; the same call again restores it."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
