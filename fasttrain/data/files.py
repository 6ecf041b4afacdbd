"""What every part of the data path needs of the file system."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from fasttrain.config import UserError


class DataError(UserError):
    """A dataset, or a text to make one of, that cannot be used as asked."""


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Return the folder for what can be made again; it exists and can be written.

    `cache_dir` if it is named, else $XDG_CACHE_HOME/fasttrain or ~/.cache/fasttrain, else
    fasttrain-<uid> in the folder for temporary files.
    """
    if cache_dir is not None:
        choices = [Path(cache_dir).expanduser()]
    else:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        temporary = Path(tempfile.gettempdir()) / f"fasttrain-{os.getuid()}"
        choices = [Path(home) / "fasttrain", temporary]
    reason = ""
    for folder in choices:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            reason = str(error)
            continue
        # In a shared folder for temporary files, a folder of that name may be somebody else's.
        if os.access(folder, os.W_OK) and (cache_dir or folder.stat().st_uid == os.getuid()):
            return folder
        reason = f"{folder} is not writable"
    raise DataError(f"no folder to cache in ({reason}); name a writable one with data.cache_dir")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path, *, wait: bool = False) -> int:
    """Lock a file until the descriptor that is returned is closed, or the process ends.

    Raises:
        BlockingIOError: Another process has locked it, and `wait` is false.
        OSError: The file system has no locks.
    """
    import fcntl  # Windows has none

    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
