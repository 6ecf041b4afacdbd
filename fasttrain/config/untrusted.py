"""Files that anybody may have written, and places where anybody may have put a link.

JSON is bounded in bytes, values and depth before it is used.

Python takes 72 bytes for the three characters of ``{},`` and four for each character of a text that
holds a single emoji. Within these bounds a file costs less than 300 MB. Standard library only.
"""

import contextlib
import errno
import json
import os
import reprlib
import stat
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from fasttrain.config.keys import UserError, is_a

MAX_BYTES = 32 << 20  # 100,000 shards or tensors
_MAX_VALUES = 2_000_000
_MAX_DEPTH = 32  # what shows or stores a value recurses
_SINKS = (os.devnull, "/dev/full")  # devices that keep nothing
# Windows lacks these flags.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_OWN = _NO_WAIT | getattr(os, "O_NOFOLLOW", 0)
_NAMES: dict[Any, str] = {int: "count", float: "number", str: "string", bool: "truth value"}
_NAMES |= {types.NoneType: "null"}


def read_json(path: Path, remedy: str, error: type[UserError] = UserError) -> dict[str, Any]:
    """Return the object that a JSON file holds, or raise ``error`` and say the ``remedy``.

    Refused are pipes, what is no JSON object, and what is larger or deeper than any that is needed.
    """
    try:
        text = read_regular(path, MAX_BYTES)
    except UserError as problem:
        raise error(f"{problem}; {remedy}") from None
    except FileNotFoundError:
        raise error(f"{path}: there is no such file; {remedy}") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in its name
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: cannot be read ({reason}); {remedy}") from problem
    return parse_json(text, path, remedy, error)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return what a file holds.

    Raises:
        UserError: it is no regular file, such as a pipe, which would block, or it is larger.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size} bytes, at most {max_bytes} are credible")
        return file.read(size)  # room for as much is made at once


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; raise as `read_regular` does where it is none."""
    file = open(os.open(path, os.O_RDONLY | _NO_WAIT), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: not a file")
    return file


def can_be_path(text: str) -> bool:
    """Return whether the system takes a text for a path: it refuses NUL and half characters."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def open_own(path: Path, flags: int) -> int:
    """Open a file that a run writes, and make it if it is missing; return its descriptor.

    A run folder may come from anywhere. What is written into it stays in it: no link is followed.

    Args:
        path: where the file is to be.
        flags: of `os.open`, such as ``os.O_WRONLY | os.O_APPEND``; nothing may be cut off by them.

    Raises:
        UserError: it is a link, has another name elsewhere (a hard link), or is no regular file.
        OSError: it cannot be opened.
    """
    remedy = "remove it, or put a copy of the file in its place"
    try:
        descriptor = os.open(path, flags | os.O_CREAT | _OWN, 0o666)
    except OSError as error:
        if path.is_symlink():
            problem = "is a symbolic link, and what a run writes stays in its folder"
            raise UserError(f"{path}: {problem}; {remedy}") from error
        if error.errno == errno.ENXIO:  # a pipe that nobody reads
            raise UserError(f"{path}: not a file; {remedy}") from error
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    if any(os.path.samestat(status, os.stat(d)) for d in _SINKS if os.path.exists(d)):
        return descriptor
    os.close(descriptor)
    linked = "has another name elsewhere (a hard link), which would change with it"
    problem = linked if stat.S_ISREG(status.st_mode) else "not a file"
    raise UserError(f"{path}: {problem}; {remedy}")


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError if one of these names in a folder is a symbolic link."""
    for path in map(folder.joinpath, names):
        if path.is_symlink():
            problem = "is a symbolic link, and what a run writes stays in its folder"
            raise UserError(f"{path}: {problem}; remove it, or move what it leads to here")


def parse_json(
    text: bytes, where: object, remedy: str, error: type[UserError] = UserError
) -> dict[str, Any]:
    """Return the object that JSON text holds, as `read_json` does; ``where`` is for messages."""
    if sum(map(text.count, b",[{")) > _MAX_VALUES:
        raise error(f"{where}: holds more than {_MAX_VALUES:,} values, which is not credible")
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON ({problem}); {remedy}") from problem
    if not isinstance(value, dict):
        raise error(f"{where}: holds {type(value).__name__}, not a JSON object; {remedy}")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        parents = (v for v in level if isinstance(v, dict | list))
        level = [v for p in parents for v in (p.values() if isinstance(p, dict) else p)]
    if level:
        raise error(f"{where}: nested too deep, more than {_MAX_DEPTH} levels; {remedy}")
    return value


def json_object(line: str | bytes) -> dict[str, Any] | None:
    """Return the object that a line of JSON holds; None: it holds none."""
    with contextlib.suppress(ValueError, RecursionError):
        return value if isinstance(value := json.loads(line), dict) else None
    return None


def misfit(kind: Any, value: Any, name: str = "") -> str | None:
    """Return the first field of a JSON value that is missing or not of its type; None: all fit.

    ``kind`` is a `TypedDict`, or what its fields are of. An ``int`` is a count: no bool, from 0 to
    2**53 - 1; a ``float`` is finite. ``name`` is that of the value, for the result.
    """
    origin, kinds = get_origin(kind), get_args(kind)
    wanted = "object"
    parts: Iterable[tuple[Any, Any, str]] = ()  # type, value and name of each
    if kind is Any:
        fits = True
    elif is_typeddict(kind):
        fits, hints = isinstance(value, dict), get_type_hints(kind)
        if fits and (absent := sorted(kind.__required_keys__ - value.keys())):
            return f"{name}.{absent[0]} is missing".removeprefix(".")
        known = sorted(hints.keys() & value.keys()) if fits else ()
        parts = ((hints[k], value[k], f"{name}.{k}".removeprefix(".")) for k in known)
    elif origin in (types.UnionType, Union):
        fits = any(misfit(k, value) is None for k in kinds)
        wanted = " or ".join(_NAMES.get(k, str(get_args(k))) for k in kinds)
    elif origin is Literal:
        fits, wanted = value in kinds, " or ".join(kinds)
    elif origin is dict:
        fits = isinstance(value, dict)
        parts = ((kinds[1], v, f"{name}.{k}") for k, v in value.items()) if fits else ()
    elif origin in (list, tuple):
        fits = isinstance(value, list) and (origin is list or len(value) == len(kinds))
        wanted = "list" if origin is list else f"list of {len(kinds)}"
        if fits:
            parts = ((kinds[i % len(kinds)], v, f"{name}[{i}]") for i, v in enumerate(value))
    else:
        fits, wanted = is_a(kind, value), _NAMES[kind]
        if kind is int:
            fits = fits and 0 <= value < 2**53
    if not fits:
        return f"{name or 'it'} is {reprlib.repr(value)}, which is no {wanted}"
    return next((found for part in parts if (found := misfit(*part)) is not None), None)
