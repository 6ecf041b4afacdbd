"""What instructions of PTX compute. Registers hold bits; instructions say what they mean."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


def dtype_of(kind: str) -> np.dtype[Any]:
    """Return the numpy type of a PTX type: ``s32``, ``b64``, ``f32``, ``pred``."""
    letter = {"b": "u", "s": "i"}.get(kind[0], kind[0])
    return np.dtype(bool if kind == "pred" else f"{letter}{int(kind[1:]) // 8}")


def decode(bits: Array, kind: str) -> Array:
    """Read bits as a PTX type; 16-bit floats become fp32, a pair of them gains an axis."""
    if kind.endswith("x2"):
        return decode(np.stack([bits & 0xFFFF, bits >> 16]).astype(np.uint16), kind[:-2])
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    dtype = dtype_of(kind)
    return bits.view(dtype) if bits.itemsize == dtype.itemsize else bits.astype(dtype)


def encode(value: Array, kind: str) -> Array:
    """Round values to a PTX type, to nearest even; a pair becomes one number."""
    if kind.endswith("x2"):
        low, high = encode(value, kind[:-2]).astype(np.uint32)
        return low | high << 16
    if kind == "bf16":
        bits = value.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    return value.astype(dtype_of(kind), copy=False)


def flushed(x: Array) -> Array:
    """Replace subnormal numbers by zeros."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _wide(function: Callable[..., Array]) -> Callable[..., Array]:
    """Compute in fp64 and round once."""
    return lambda *v: function(*(x.astype(np.float64) for x in v)).astype(np.float32)


def _divide(x: Array, y: Array) -> Array:
    return x / y if x.dtype.kind == "f" else (x - np.fmod(x, y)) // y


def _bit_field(x: Array, start: Array, length: Array) -> Array:
    unused = (8 * x.itemsize - length).astype(x.dtype)
    return x << (unused - start.astype(x.dtype)) >> unused


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def compare(how: str, x: Array, y: Array) -> Array:
    """Compare as ``setp`` does: with NaN ``ne`` is false and ``neu`` true."""
    unordered = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.False_
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    found = COMPARISONS[how[:2]](x, y)
    return found | unordered if len(how) == 3 else found & ~unordered


FUNCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": np.fmod,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": np.left_shift, "shr": np.right_shift, "bfe": _bit_field, "mov": np.asarray,
    "max": np.fmax, "min": np.fmin, "abs": np.abs, "neg": np.negative, "cvt": np.asarray,
    "cvta": np.asarray,
    "mad": lambda x, y, z: x * y + z, "fma": _wide(lambda x, y, z: x * y + z),
    "setp": compare, "selp": lambda x, y, chosen: np.where(chosen, x, y),
    "ex2": _wide(np.exp2), "lg2": _wide(np.log2), "sqrt": _wide(np.sqrt),
    "rsqrt": _wide(lambda x: 1 / np.sqrt(x)), "rcp": _wide(lambda x: 1 / x),
}  # fmt: skip
ROUNDINGS = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
REDUCTIONS: dict[str, Any] = {"min": np.min, "max": np.max, "add": np.sum}
