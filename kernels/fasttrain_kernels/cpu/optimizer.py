"""The norm of gradients, and AdamW, in C++: optimizer.cpp."""

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from .._torch import is_being_transformed, is_fake
from . import computes_in, load_or_warn, pointers

_SOURCES = ("product.h", "optimizer.cpp")
_LEAST = 2**18  # Fewer elements are not worth the time that g++ takes.


def fits(tensors: list[Tensor], *others: list[Tensor]) -> bool:
    """Return whether C++ takes them all, and is worth it for the elements of the first."""
    every = sum(others, tensors)
    return (
        not (torch.compiler.is_compiling() or is_being_transformed() or is_fake(tensors[0]))
        and computes_in(torch.float32)
        and all(t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() for t in every)
        and sum(map(Tensor.numel, tensors)) >= _LEAST
        and all(t.data_ptr() for t in every if t.numel())
        and load_or_warn(*_SOURCES) is not None
    )


def _call(name: str, tensors: list[Tensor], n: int, numbers: Any, *result: Any) -> None:
    sizes = [t.numel() for t in tensors[:n]]
    shape = struct.pack(f"6d{2 + n}l", *numbers, torch.get_num_threads(), n, *sizes)
    getattr(load_or_warn(*_SOURCES), name)(shape, pointers(tensors), *result)


def sum_of_squares(tensors: list[Tensor]) -> float:
    """Return the sum of the squares of all elements, the same with any number of threads."""
    result = ctypes.c_double()
    _call("sum_of_squares", tensors, len(tensors), [0] * 6, ctypes.byref(result))
    return result.value


def adamw(group: dict[str, Any], scale: float, params: list[Tensor], *others: list[Tensor]) -> None:
    """Update parameters; others are gradients, times ``scale``, both moments and step counts."""
    sign = -1 if group["maximize"] else 1
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], sign * scale)
    _call("adamw", sum(others, params), len(params), numbers)
    torch.autograd.graph.increment_version(params)
