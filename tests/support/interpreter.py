"""What Triton's interpreter does not look for, or does otherwise than a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from tests.support.ptx_values import Array, decode, encode, flushed

BUILDER, EXECUTOR = interpreter.InterpreterBuilder, interpreter.GridExecutor
UNIT = 2  # bytes: who touched what is noted for so many
PROGRAMS = 1 << 15  # more than a launch has here; with an address it fits 64 bits


def _crossings(loads: list[Array], stores: list[Array]) -> tuple[int, int]:
    """Return how many bytes several programs store, and one stores and another loads.

    Args:
        loads: units of memory * PROGRAMS + the number of the program.
        stores: likewise.
    """
    stored, loaded = (np.unique(np.concatenate([[0], *keys])) for keys in (stores, loads))
    unit = stored // PROGRAMS
    several = np.count_nonzero(unit[1:] == unit[:-1])
    by = stored[np.searchsorted(unit, loaded // PROGRAMS).clip(max=unit.size - 1)]
    crossed = np.count_nonzero((by // PROGRAMS == loaded // PROGRAMS) & (by != loaded))
    return UNIT * several, UNIT * crossed


@contextmanager
def no_races() -> Iterator[list[str]]:
    """Assert that programs of the launches inside touch no byte that another one stores.

    Yields:
        The names of the kernels launched.
    """
    accesses: dict[str, list[Array]] = {"load": [], "store": []}
    launched: list[str] = []
    load, store = BUILDER.create_masked_load, BUILDER.create_masked_store
    call = EXECUTOR.__call__

    def note(kind: str, builder: Any, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        assert size % UNIT == 0, "accesses of a single byte are not told apart"
        addresses = pointers.data[mask.data].astype(np.int64).ravel()
        units = addresses[:, None] // UNIT + np.arange(size // UNIT)
        x, y, z = builder.grid_idx
        program = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        assert program < PROGRAMS
        accesses[kind].append(units.ravel() * PROGRAMS + program)

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("load", self, pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("store", self, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for found in accesses.values():
            found.clear()
        result = call(self, *args, **kwargs)
        launched.append(self.fn.__name__)
        twice, crossed = _crossings(accesses["load"], accesses["store"])
        assert not twice, f"{launched[-1]}: {twice} bytes are stored by several programs"
        assert not crossed, f"{launched[-1]}: {crossed} bytes of one program are read by another"
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BUILDER, "create_masked_load", noted_load)
        patch.setattr(BUILDER, "create_masked_store", noted_store)
        patch.setattr(EXECUTOR, "__call__", checked_call)
        yield launched


@contextmanager
def gpu_semantics(seed: int) -> Iterator[None]:
    """Compute as a GPU may: the interpreter has numpy's functions, which are more exact.

    Exponentials, logarithms, roots and quotients are off by up to 2 units in the last place, and
    take and give zeros for subnormal numbers; maximum and minimum drop NaN; bf16 is rounded to
    nearest, where the interpreter truncates.

    Args:
        seed: of the errors.
    """
    generator = np.random.default_rng(seed)

    def inexact(function: Callable[..., Array]) -> Callable[..., Any]:
        def call(self: Any, *operands: Any) -> Any:
            values = [operand.data for operand in operands]
            if values[0].dtype == np.float32:
                exact = flushed(function(*map(flushed, values))).astype(np.float32)
                moved = exact.view(np.int32) + generator.integers(-2, 3, exact.shape, np.int32)
                normal = np.isfinite(exact) & (exact != 0)
                result = np.where(normal, moved.view(np.float32), exact)
            else:
                result = function(*values)
            return interpreter.TensorHandle(result, operands[0].dtype.scalar)

        return call

    convert, multiply = interpreter._convert_float, BUILDER.create_dot

    def converted(values: Array, source: Any, to: Any, mode: Any) -> Array:
        if (source, to) == (tl.float32, tl.bfloat16):
            return encode(values.view(np.float32), "bf16")
        return convert(values, source, to, mode)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Multiply the values of bf16 operands; the interpreter multiplies their bits."""
        if a.dtype.scalar == tl.bfloat16:
            wide = (decode(operand.data, "bf16") for operand in (a, b))
            a, b = (interpreter.TensorHandle(operand, tl.float32) for operand in wide)
        return multiply(self, a, b, *rest)

    def dropping(function: Callable[..., Array]) -> Callable[..., Any]:
        return lambda self, x, y: self.binary_op(x, y, function)

    functions = {
        "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x), "fdiv": np.divide,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        for name, function in functions.items():
            patch.setattr(BUILDER, f"create_{name}", inexact(function))
        patch.setattr(BUILDER, "create_maxnumf", dropping(np.fmax))
        patch.setattr(BUILDER, "create_minnumf", dropping(np.fmin))
        patch.setattr(BUILDER, "create_dot", dot)
        patch.setattr(interpreter, "_convert_float", converted)
        yield
