"""Arguments as other libraries name or order them: refused with the call that is meant here."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def tell_apart(call: str, **remedies: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a call that does not fit a function's signature a TypeError with a remedy.

    Args:
        call: a right call, such as ``rms_norm(x, weight, eps=eps)``.
        remedies: what to write instead of arguments that other libraries have.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        most = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) > most:
                raise TypeError(
                    f"{_name(call)}: {len(args) - most} arguments too many; call {call}."
                )
            for key in kwargs:
                if key not in names:
                    remedy = remedies.get(key, f"call {call}")
                    raise TypeError(f"{_name(call)}: there is no argument {key!r}; {remedy}.")
                if key in names[: len(args)]:
                    raise TypeError(f"{_name(call)}: {key} is given twice; call {call}.")
            return function(*args, **kwargs)

        return checked

    return decorate


def require_tensors(call: str, **arguments: Any) -> None:
    """Raise a TypeError, with a right call, for an argument that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"{_name(call)}: {name} must be a tensor, got {kind}; call {call}.")


def _name(call: str) -> str:
    return call.partition("(")[0]
