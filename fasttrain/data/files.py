"""What every part of the data path needs of the file system."""

import hashlib
import importlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fasttrain.config import UserError
from fasttrain.config.untrusted import open_own

ATTEMPTS, PAUSE_S = 5, 1.0  # at an address; the pause doubles after each
STALL_S = 60.0  # an attempt that takes longer has failed
RANGE_BYTES = 8 << 20  # of a file, asked for at once: 140 kB/s are enough for it not to stall
TRANSFER_S = 3600.0  # the same for a whole file; what stalls is ended sooner by the store's client
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s]*@)?([^\s?#]*)(?:[?#]\S*)?")


class DataError(UserError):
    """A dataset, or a text to make one of, that cannot be used as asked."""


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
    """Return what lies in a folder at an address, with its bytes; nothing if it is missing."""
    file_system(address)[0].invalidate_cache()
    found = if_there(address, "ls", detail=True) or ()
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in found}


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


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder for what can be made again; it exists and can be written.

    `cache_dir` if it is named, else $XDG_CACHE_HOME/fasttrain or ~/.cache/fasttrain, else
    fasttrain-<uid> in the folder for temporary files.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    choices = [Path(home, "fasttrain"), Path(tempfile.gettempdir(), f"fasttrain-{os.getuid()}")]
    if cache_dir is not None:
        choices = [Path(cache_dir).expanduser()]
    for folder in choices:
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        try:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
            os.chmod(out.name, 0o644)
            os.replace(out.name, path)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)
            raise


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
        OSError: The file system has no locks.
    """
    import fcntl  # Windows has none

    descriptor = open_own(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
