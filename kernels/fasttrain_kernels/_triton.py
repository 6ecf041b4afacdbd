"""Triton where it is installed; where it is not (macOS, Windows), what lets kernels be defined.

An op on CPU tensors needs no kernel. `use_triton` raises where one would be launched.
"""

from typing import Any

__all__ = ["HAS_TRITON", "TensorDescriptor", "tl", "triton"]

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Stands for every name of Triton, and for every kernel that `triton.jit` decorates."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    triton = tl = TensorDescriptor = _Absent()
