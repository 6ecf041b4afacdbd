"""Files, folders and addresses: caches, locks, atomic and synced writes, object stores."""

import errno
import hashlib
import importlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fasttrain.config import UserError
from fasttrain.config.untrusted import open_own
from fasttrain.printing import say

ATTEMPTS, PAUSE_S = 5, 1.0  # at an address; the pause doubles after each
STALL_S = 60.0  # an attempt that takes longer has failed
RANGE_BYTES = 8 << 20  # of a file, asked for at once: 140 kB/s are enough for it not to stall
TRANSFER_S = 3600.0  # the same for a whole file; what stalls is ended sooner by the store's client
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
# What a file system answers that lacks a call: NFS and Lustre have no locks if they are mounted so,
# and FUSE, CIFS and mounts of object stores may not sync folders.
LACKING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.ENOTTY}
_ADDRESS = re.compile(  # a password, in which there may be slashes, is no port
    r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s:@\[]*:(?!\d+/)[^\s?#]*@|[^/\s]*@)?([^\s?#]*)(?:[?#]\S*)?"
)


class DataError(UserError):
    """A dataset, or a text to make one of, that cannot be used as asked."""


class NoLocks(OSError):
    """The file system has no locks."""


_warned: set[tuple[str, int]] = set()  # what each file system lacks, by its device


def warn_of_lack(folder: Path, what: str, error: OSError, risk: str) -> None:
    """Print, once for a file system and on one rank, what it lacks and which promise is weaker."""
    with suppress(OSError):
        lack = (what, folder.stat().st_dev)
        if lack not in _warned and os.environ.get("RANK", "0") == "0":
            said = f"warning: the file system of {folder} {what} ({error.strerror}): {risk}"
            say(said, stream=sys.stderr)
        _warned.add(lack)


def is_address(name: str | Path) -> bool:
    """Return whether a name is an address, as `s3://…`, not a file of this machine."""
    return "://" in str(name)


def place_of(name: Path | str) -> str:
    """Return the absolute path of a folder, or its address without a slash at the end."""
    return str(name).rstrip("/") if is_address(name) else os.path.abspath(name)


def shown(text: str) -> str:
    """Return a text with its addresses less user, password, query and fragment."""
    return _ADDRESS.sub(r"\1\2", text)


def file_system(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path there.

    Credentials are those that s3fs, gcsfs, huggingface_hub and fsspec's own settings find.
    """
    if "reference:" in address:  # runs templates that its file holds
        raise DataError(f"{shown(address)}: addresses that a file makes up are not followed")
    try:
        return cast(tuple[Any, str], importlib.import_module("fsspec.core").url_to_fs(address))
    except ImportError as error:
        package = _PACKAGES.get(address.partition(":")[0], "aiohttp")
        raise DataError(f"{shown(address)}: run: pip install {package} ({error})") from error
    except ValueError as error:
        raise DataError(f"{shown(address)}: cannot be opened ({shown(str(error))})") from error


def remote(
    address: str,
    operation: str,
    *args: Any,
    before: tuple[Any, ...] = (),
    check: Callable[[Any], None] = lambda result: None,
    timeout_s: float | None = None,
    **options: Any,
) -> Any:
    """Return what an operation of fsspec's file system, as `"info"`, gives for an address.

    Arguments `before` the path are those of `"put_file"`. What fails in transit or stalls is tried
    again, in all `ATTEMPTS` times; so is a result for which `check` raises an OSError.
    """
    fs, path = file_system(address)
    options |= {"timeout": timeout_s or STALL_S} if fs.async_impl else {}
    reads = "file" in fs.protocol and operation in ("cat_file", "get_file")
    if reads and os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
        raise DataError(f"{shown(address)}: not a file; remove it")
    for pause in [*(PAUSE_S * 2**n for n in range(ATTEMPTS - 1)), 0]:
        try:
            result = getattr(fs, operation)(*before, path, *args, **options)
            check(result)
            return result
        except Exception as error:
            problem, lasts = error, _lasts(error)
        if lasts:
            break
        time.sleep(pause)
    cause = problem.__cause__ or problem
    reason = shown(f"{type(cause).__name__}: {cause}".rstrip(": "))
    remedy = "address and the credentials" if lasts else f"network; {ATTEMPTS} attempts failed"
    what = f"{shown(address)}: {operation} failed ({reason})"
    raise DataError(f"{what}; check the {remedy}") from problem


def _lasts(error: Exception) -> bool:
    """Return whether an error will be the same the next time."""
    cause = error.__cause__ or error  # fsspec calls whatever fails over HTTP a FileNotFoundError
    response = getattr(cause, "response", None)
    status = getattr(cause, "status", None) or getattr(response, "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    lasting = FileNotFoundError | PermissionError | NotImplementedError | TypeError
    said = isinstance(error, lasting) and (cause is error or response is not None)
    return said or "Credentials" in type(error).__name__


def if_there(address: str, operation: str, **options: Any) -> Any:
    """Return what the operation returns; None if there is nothing at the address."""
    try:
        return remote(address, operation, **options)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def names_at(address: str) -> dict[str, int]:
    """Return what lies in a folder at an address, with its bytes; nothing if it is missing.

    Pipes and other things that are no files are passed over.
    """
    file_system(address)[0].invalidate_cache()
    found = if_there(address, "ls", detail=True) or ()
    files = (entry for entry in found if entry.get("type") != "other" or entry.get("islink"))
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in files}


def put(address: str, content: Path | bytes) -> None:
    """Write a file at an address, all of it or nothing."""
    fs, path = file_system(address)
    part = address if fs.async_impl else f"{address}.part"  # object stores see to it themselves
    if part != address:  # and have no folders
        remote(address.rpartition("/")[0], "makedirs", exist_ok=True)
    if "file" in fs.protocol:  # a link, which others may have put there, would be followed
        Path(file_system(part)[1]).unlink(missing_ok=True)
    if isinstance(content, bytes):
        remote(part, "pipe_file", content)
    else:
        remote(part, "put_file", before=(str(content),), timeout_s=TRANSFER_S)
    if part != address:
        remote(part, "mv", path)


def read_range(address: str, start: int, end: int, size: int) -> bytes:
    """Return bytes [start, end) of a file of `size` bytes: all of them, or a DataError."""

    def check(content: bytes) -> None:
        if len(content) != end - start:
            raise OSError(f"of bytes {start} to {end} of {size} came {len(content)}")

    async def check_response(response: Any) -> None:
        response.raise_for_status()
        length = response.content_length
        if response.status != 206 and (length is None or length > end - start):
            comes = f"its server sends {length or 'any number'}"
            raise NotImplementedError(f"for bytes {start} to {end} {comes}: download it")

    fs, _ = file_system(address)
    # One byte beyond the end shows a file that is longer than was said.
    options: dict[str, Any] = {"start": start, "end": end + (end == size)} if size else {}
    if "https" in fs.protocol:
        headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        options |= {"headers": headers, "raise_for_status": check_response}
    elif not fs.async_impl:  # Hugging Face's: without a cache that cuts what came to length
        options["cache_type"] = "none"
    return cast(bytes, remote(address, "cat_file", check=check, **options))


def user_path(name: str | Path, option: str) -> Path:
    """Return a path with a leading ``~`` expanded; ``option`` names it in the message.

    Raises:
        DataError: The user has no home folder.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{option} = {name}: {error}; give the whole path") from error


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder for what can be made again; it exists and can be written.

    `cache_dir` if it is named, else $XDG_CACHE_HOME/fasttrain or ~/.cache/fasttrain, else
    fasttrain-<uid> in the folder for temporary files.
    """
    if cache_dir is not None:
        choices, mode = [user_path(cache_dir, "data.cache_dir")], 0o777
    else:
        choices, mode = [Path(tempfile.gettempdir(), f"fasttrain-{os.getuid()}")], 0o700
        if not os.path.isabs(home := os.environ.get("XDG_CACHE_HOME", "")):
            home = os.path.expanduser("~/.cache")
        if os.path.isabs(home):  # "~" is left where the user has no home
            choices.insert(0, Path(home, "fasttrain"))
    for folder in choices:
        with suppress(OSError):
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
            # In a shared folder for temporary files, a folder of that name may be somebody else's.
            if os.access(folder, os.W_OK) and (cache_dir or _is_own(folder)):
                return folder
    tried, remedy = " and ".join(map(str, choices)), "name a writable one with data.cache_dir"
    raise DataError(f"no folder to cache in ({tried} cannot be written); {remedy}")


def _is_own(folder: Path) -> bool:
    """Return whether a folder belongs to this user, and what leads to it is no link of another."""
    status, link = folder.stat(), folder.lstat()
    return status.st_uid == link.st_uid == os.getuid() and not status.st_mode & stat.S_IWOTH


def beneath(folder: Path, address: str) -> Path:
    """Return where in a folder to keep what comes from an address: beneath it, however that reads.

    It reads as the address does, less user, password and query, or has its hash for a name, where
    a part of that is no plain name.
    """
    scheme, _, path = shown(address).partition("://")
    parts = [scheme, *path.split("/")]
    if all(re.fullmatch(r"[A-Za-z0-9_][\w.:-]{0,100}", part, re.ASCII) for part in parts):
        return folder.joinpath(*parts)
    return folder / hashlib.sha256(shown(address).encode()).hexdigest()[:32]


def clear_place(path: Path) -> None:
    """Remove what is at a path in a cache, a file, a link or a folder, so that it is made again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all; its mode is what the umask leaves."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as out:
            out.write(content)
            out.flush()
            sync(out.fileno(), path)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as of a write to a full disk
            error.filename = str(path)
        raise


def sync(descriptor: int, path: Path) -> None:
    """Have what was written to an open file, at ``path``, survive a power cut.

    Where the file system cannot do that, a warning says so once.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        risk = "a power cut may damage the newest ones"
        warn_of_lack(path.parent, "cannot sync files", error, risk)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut; where that is impossible, warn once."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folder
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in {*LACKING, errno.EBADF, errno.EISDIR}:
            raise
        risk = "after a power cut the newest files may be missing"
        warn_of_lack(folder, "cannot sync folders", error, risk)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def lock(path: Path, *, wait: bool = False) -> int:
    """Lock a file until the descriptor that is returned is closed, or the process ends.

    Raises:
        BlockingIOError: Another process has locked it, and `wait` is false.
        NoLocks: The file system has no locks. A warning has said so.
        OSError: The file cannot be opened.
    """
    import fcntl  # Windows has none

    descriptor = open_own(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if error.errno not in LACKING:
            raise
        risk = "nothing keeps two processes from writing there at once"
        warn_of_lack(path.parent, "has no locks", error, risk)
        raise NoLocks(error.errno, error.strerror) from error
    return descriptor
