"""JSON that anybody may have written: bounded in bytes, values and depth before it is used.

Python takes 72 bytes for the three characters of ``{},`` and four for each character of a text that
holds a single emoji. Within these bounds a file costs less than 300 MB. Standard library only.
"""

import contextlib
import json
import os
import reprlib
import stat
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from fasttrain.config.keys import UserError, is_a

MAX_BYTES = 32 << 20  # 100,000 shards or tensors
_MAX_VALUES = 2_000_000
_MAX_DEPTH = 32  # what shows or stores a value recurses
_NAMES: dict[Any, str] = {int: "count", float: "number", str: "string", bool: "truth value"}
_NAMES |= {types.NoneType: "null"}


def read_json(path: Path, remedy: str, error: type[UserError] = UserError) -> dict[str, Any]:
    """Return the object that a JSON file holds, or raise ``error`` and say the ``remedy``.

    Refused are pipes, what is no JSON object, and what is larger or deeper than any that is needed.
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
