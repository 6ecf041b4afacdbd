"""How a config key is declared, checked and described. Standard library only."""

import difflib
import operator
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, NoReturn

_LONGEST = 4000  # characters of an error: many keys, and not a whole file
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # by the names in `operator`


class UserError(Exception):
    """Bad input: the command line prints it as one line and exits with status 2."""

    def __init__(self, message: str) -> None:
        # One line of a length that can be read, without control characters, whatever the input.
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class ConfigError(UserError):
    """A config that is refused; names the key, the value, what is allowed and the remedy."""


def key(
    default: Any,
    meaning: str,
    *,
    choices: str = "",
    pattern: tuple[str, str] | None = None,
    **bounds: float,
) -> Any:
    """Return the dataclass field of a config key.

    ``meaning`` is its line in ``--help`` and the reference table. ``choices`` are words, separated
    by spaces: all that a string may be, or what else a number may be until it is known. ``pattern``
    is a regular expression that the whole string must match, and how to say it. ``bounds`` are
    ``ge``, ``gt``, ``le`` and ``lt``, in a tuple of each element.
    """
    metadata = {"meaning": meaning, "choices": choices.split(), "pattern": pattern}
    return field(default=default, metadata=metadata | {"bounds": bounds})


def choice(words: str, meaning: str) -> Any:
    """Return the field of a key that takes one of several words; the first is its default."""
    return key(words.split()[0], meaning, choices=words)


def refuse(name: str, value: Any, problem: str) -> NoReturn:
    """Raise a ConfigError: key, value, and what is wrong with it; after a semicolon the remedy."""
    raise ConfigError(f"{name} = {show(value)} {problem}")


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: 1 thread, 1,600 steps, 2 micro-batches."""
    plural = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{n:,} {noun if n == 1 else noun + plural}"


def show(value: Any) -> str:
    """Return a value as a person writes it in TOML, shortened; ``none`` where it is unset."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(show, value))}]"
    else:
        text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(f: Field[Any]) -> tuple[Any, bool, int | None]:
    """Return a key's type or its elements', whether None is allowed, and its number of elements.

    The number is 0 where any is allowed, and None where the key takes no list.
    """
    kinds = typing.get_args(f.type) if isinstance(f.type, types.UnionType) else (f.type,)
    optional, elements = len(kinds) > 1, typing.get_args(kinds[0])
    if not elements:
        return kinds[0], optional, None
    return elements[0], optional, 0 if Ellipsis in elements else len(elements)


def accepts(f: Field[Any], value: Any) -> bool:
    """Return whether ``value`` has the field's type."""
    kind, optional, length = _kind(f)
    if value is None:
        return optional
    if length is None:
        return is_a(kind, value) or value in f.metadata["choices"]
    is_list = isinstance(value, list | tuple) and length in (0, len(value))
    return is_list and all(is_a(kind, v) for v in value)


def is_a(kind: type, value: Any) -> bool:
    """Return whether a value has a type; an int is a float, a bool is no number."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        # Finite, and an int that fits: false for nan too, and exact for any int.
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def allowed(f: Field[Any]) -> str:
    """Return in words what a key takes besides none, as in ``an integer ≥ 1``."""
    kind, _, length = _kind(f)
    if kind is str and f.metadata["choices"]:
        return f"one of {', '.join(f.metadata['choices'])}"
    if f.metadata["pattern"]:
        text = str(f.metadata["pattern"][1])
    elif length is None:
        text = _NAMES[kind]
    else:
        text = f"a list of {length or ''} {_NAMES[kind].split()[1]}s".replace("  ", " ")
    text += " and".join(f" {_SIGNS[name]} {n}" for name, n in f.metadata["bounds"].items())
    return text + "".join(f', or "{word}"' for word in f.metadata["choices"])


def check_value(name: str, value: Any, f: Field[Any]) -> Any:
    """Return ``value`` in the field's type, or refuse it; ``name`` is the key's, for the message.

    An int becomes a float, and a list a tuple, where the field has these. TOML has no null: "none"
    and "null" unset a key that takes no such text.
    """
    if str(value).lower() in ("none", "null") and not accepts(f, value):
        value = None
    kind, optional, length = _kind(f)
    takes = f"it takes {allowed(f)}{', or none to unset it' if optional else ''}"
    if not accepts(f, value):
        refuse(name, value, f"has the wrong type; {takes}")
    choices, pattern = f.metadata["choices"], f.metadata["pattern"]
    if value is None or value in choices:
        return value
    for element in [value] if length is None else value:
        if isinstance(element, str):
            if choices and element not in choices:
                near = difflib.get_close_matches(element.lower(), choices, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                refuse(name, value, f"is not known; {takes}{hint}")
            if pattern and not re.fullmatch(pattern[0], element):
                refuse(name, value, f"is not valid; {takes}")
            if not element.isascii() and element != element.encode(errors="replace").decode():
                refuse(name, value, "is not valid Unicode; rename it in UTF-8")
        if not all(getattr(operator, k)(element, n) for k, n in f.metadata["bounds"].items()):
            refuse(name, value, f"is out of range; {takes}")
    return kind(value) if length is None else tuple(map(kind, value))


def divisors(n: int) -> list[int]:
    """Return the divisors of ``n`` up to 1,000 in ascending order."""
    return [d for d in range(1, min(n, 1000) + 1) if n % d == 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One TOML table, or all of them; every value is checked when it is made."""

    section: ClassVar[str] = ""  # its name: that of the field of `TrainConfig`, which has none

    def __post_init__(self) -> None:
        for f in fields(self) if self.section else ():
            value = check_value(f"{self.section}.{f.name}", getattr(self, f.name), f)
            object.__setattr__(self, f.name, value)
        for k, problem in self.problems():
            refuse(f"{self.section}.{k}".lstrip("."), operator.attrgetter(k)(self), problem)

    def problems(self) -> Iterable[tuple[str, str]]:
        """Yield impossible combinations of values: a key below this, and what is wrong."""
        return ()
