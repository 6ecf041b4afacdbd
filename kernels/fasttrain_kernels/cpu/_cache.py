"""Keeps compiled libraries in a folder that only this user can write, under their own hashes.

A library is machine code: whoever can write it, or put another in its place, runs as this user. A
file that is empty, cut off or altered is removed and built again; it is never mapped, because the
system ends a process that reads beyond the end of a mapped file.
"""

import ctypes
import grp
import hashlib
import os
import pwd
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_UNMAPPED = 65534  # the owner that a container shows for a user whom it does not know


class UnsafeFolderError(OSError):
    """Somebody else can write a folder, or put another one in its place."""


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can write, if it is missing, and return its real path.

    Its parents may belong to this user or to the system. They must not be writable by others,
    unless they are sticky, as ``/tmp`` is.

    Raises:
        UnsafeFolderError: the folder is a link, belongs to somebody else, or others can write it or
            replace it.
        OSError: it cannot be made.
    """
    for folder in (*reversed(path.parents), path):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    if path.is_symlink():
        raise UnsafeFolderError(f"{path}: is a symbolic link, which others may have made")
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        found = folder.stat()
        owners = {os.getuid()} if folder == real else {os.getuid(), *_system_users()}
        if found.st_uid not in owners:
            raise UnsafeFolderError(f"{folder}: belongs to another user ({found.st_uid})")
        sticky = folder != real and found.st_mode & stat.S_ISVTX
        if found.st_mode & _OTHERS_WRITE and not sticky and not _only_this_user_writes(found):
            raise UnsafeFolderError(f"{folder}: other users can write it")
    if not os.access(real, os.W_OK | os.X_OK):
        raise PermissionError(f"{real}: cannot be written")
    if not real.is_dir():
        raise NotADirectoryError(f"{real}: is not a folder")
    return real


def _system_users() -> set[int]:
    try:
        maps_all = Path("/proc/self/uid_map").read_text("ascii").split() == ["0", "0", "4294967295"]
    except OSError:  # not Linux
        maps_all = True
    return {0} if maps_all else {0, _UNMAPPED}


def _only_this_user_writes(found: os.stat_result) -> bool:
    """Return whether the group that can write a folder has no member but this user, or is root's.

    Many systems give each user a group of the same name, and let it write by default.
    """
    if found.st_mode & stat.S_IWOTH:
        return False
    if found.st_gid == 0:
        return True
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def load_library(folder: Path, key: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    """Return the library that ``build`` writes for this key, from the folder if it is there.

    The name of its file holds the SHA-256 of the content, which is checked before it is loaded.
    Several processes may do this at once: each file appears whole.

    Args:
        folder: what `private_folder` returned.
        key: names the library among others.
        build: writes the library to the path that it is given, in the same folder.
    """
    for path in sorted(folder.glob(f"{key}-*.so")):
        with suppress(OSError):  # another process may have removed it
            if path.name == _name(key, path):
                return ctypes.CDLL(str(path))
            path.unlink()
    part = folder / f".{key}-{os.getpid()}.so"
    try:
        build(part)
        _fsync(part)
        path = folder / _name(key, part)
        part.replace(path)
        _fsync(folder)
    finally:
        part.unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _name(key: str, path: Path) -> str:
    """Return the name that a file of this content must have; of none that this user wrote, none."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            return ""
        return f"{key}-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.so"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
