"""What the JSON of a checkpoint holds, and whether some JSON is that. Standard library only.

A seal keeps out accidents, not people: what these types do not say may be anything.
"""

import reprlib
import sys
import types
from collections.abc import Iterable
from typing import (
    Any,
    Literal,
    NotRequired,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

__all__ = ["Manifest", "RankRecord", "misfit", "state_type"]


Number = float | Literal["nan", "inf", "-inf"]  # JSON has none that is not finite


class Entry(TypedDict):
    """A file in the manifest."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """``manifest.json``."""

    step: int
    commit: int
    metric: float | None
    files: dict[str, Entry]
    ranks: NotRequired[int]


class RankRecord(TypedDict):
    """``rank-00000.json``: which slices of tensors lie in the files of a rank."""

    slices: dict[str, dict[str, list[int]]]


class Change(TypedDict):
    """A setting that was changed on purpose when the run was resumed."""

    when: str
    step: int
    key: str
    old: str
    new: str


class Faults(TypedDict):
    """What `fasttrain.faults.FaultPolicy` keeps."""

    skipped_steps: int
    spikes: int
    rollbacks: int
    passed_over: list[int]
    row: list[tuple[int, int, Literal["overflow", "nonfinite", "spike"], Number, Number]]


class ModelState(TypedDict):
    """``state.json`` of parameters that belong to no run."""

    step: NotRequired[int]
    history: NotRequired[list[Change]]


class RunState(TypedDict):
    """``state.json`` of `fasttrain.train`."""

    step: int
    position: int
    total_steps: int | None
    eval_due: bool
    trained_s: float
    best_val_loss: float | None
    loss_ema: float | None
    faults: Faults
    tokens: NotRequired[int]  # this and those below are not in all checkpoints of version 1
    samples_per_step: NotRequired[int]
    regular: NotRequired[bool]
    val_losses: NotRequired[list[float | None]]
    data: NotRequired[dict[str, dict[str, Any]]]
    history: NotRequired[list[Change]]


class LibraryState(TypedDict):
    """``state.json`` of `fasttrain.Trainer`, as far as it does not depend on torch's classes."""

    step: int
    epoch: int
    batch_in_epoch: int
    skipped_steps: int
    val_losses: list[float]
    history: NotRequired[list[Change]]


_NAMES: dict[Any, str] = {int: "count", float: "number", str: "string", bool: "truth value"}
_NAMES |= {types.NoneType: "null"}


def state_type(state: dict[str, Any]) -> type:
    """Return what a state claims to be."""
    if "position" in state:
        return RunState
    return LibraryState if "epoch" in state else ModelState


def misfit(kind: Any, value: Any, name: str = "") -> str | None:
    """Return the first field of a JSON value that is missing or not of its type; None: all fit.

    Args:
        kind: a class above, or what its fields are of. An ``int`` is a count: no bool, from 0 to
            2**53 - 1; a ``float`` is finite.
        value: as a parser returned it.
        name: of the value, for the result.
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
        fits, wanted = type(value) is kind, _NAMES[kind]
        if kind is int:
            fits = fits and 0 <= value < 2**53
        elif kind is float:
            fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    if not fits:
        return f"{name or 'it'} is {reprlib.repr(value)}, which is no {wanted}"
    return next((found for part in parts if (found := misfit(*part)) is not None), None)
