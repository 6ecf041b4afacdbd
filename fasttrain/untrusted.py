"""JSON that anybody may have written: bounded in bytes, values and depth before it is used.

Python takes 72 bytes for the three characters of ``{},`` and four for each character of a text that
holds a single emoji. Within these bounds a file costs less than 300 MB. Standard library only.
"""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fasttrain.config_keys import UserError, show

__all__ = ["MAX_BYTES", "field", "parse_json", "read_json"]

MAX_BYTES = 32 << 20  # 100,000 shards or tensors
_MAX_VALUES = 2_000_000
_MAX_DEPTH = 32  # what shows or stores a value recurses


def read_json(path: Path, remedy: str, error: type[UserError] = UserError) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        path: the file; a link is followed, a pipe is refused.
        remedy: ends the message.
        error: what is raised.

    Raises:
        UserError: of the type ``error``: the file cannot be read, is no JSON object, or is larger
            or nested deeper than any that is needed.
    """
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path}: not a file; {remedy}")
            if found.st_size > MAX_BYTES:
                raise error(f"{path}: {found.st_size} bytes, at most {MAX_BYTES} are credible")
            text = file.read(MAX_BYTES)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file; {remedy}") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in its name
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: cannot be read ({reason}); {remedy}") from problem
    return parse_json(text, path, remedy, error)


def parse_json(
    text: bytes, where: object, remedy: str, error: type[UserError] = UserError
) -> dict[str, Any]:
    """Return the object that JSON text holds; for arguments and errors see `read_json`."""
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
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise error(f"{where}: nested deeper than {_MAX_DEPTH} levels; {remedy}")
    return value


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def field(
    of: object, key: str, kind: type, where: str, remedy: str, error: type[UserError] = UserError
) -> Any:
    """Return a field of a JSON object, proven to be of a type; an integer lies in [0, 2^63).

    Raises:
        UserError: of the type ``error``: it is missing or another; names ``where``, its end the
            object that holds it, and the field.
    """
    value = of.get(key) if isinstance(of, dict) else None
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or (isinstance(value, int) and not 0 <= value < 2**63):
        raise error(f"{where}{key} is {show(value)}, which it cannot be; {remedy}")
    return value
