"""Which path an op takes: Triton for CUDA tensors, plain torch for CPU tensors.

CPU tensors take the Triton path in two cases only, both meant for tests and inspection: inside
`triton_on_cpu()`, and in a process started with ``TRITON_INTERPRET=1``, where Triton's interpreter
executes the very same kernels with NumPy.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ._torch import is_being_transformed, is_dispatch_observed
from ._triton import HAS_TRITON

# The ops' namespace is the package's name: a vendored copy does not clash with the original.
NAMESPACE = (__package__ or "fasttrain_kernels").replace(".", "_")

_forced_depth = 0


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Make CPU tensors take the Triton path inside the ``with`` block.

    The kernels then run in Triton's interpreter when Triton was imported with
    ``TRITON_INTERPRET=1``; without it they can only be compiled ahead of time (see
    `fasttrain_kernels.aot`), since there is no device to launch them on.
    """
    global _forced_depth
    _forced_depth += 1
    try:
        yield
    finally:
        _forced_depth -= 1


def use_triton(tensor: torch.Tensor) -> bool:
    """Return whether an op on ``tensor`` runs its Triton kernels.

    Raises:
        RuntimeError: it would, and Triton is not installed.
    """
    kind = tensor.device.type
    wanted = kind == "cuda" or (
        kind == "cpu" and (_forced_depth > 0 or os.environ.get("TRITON_INTERPRET") == "1")
    )
    if wanted and not HAS_TRITON:
        raise RuntimeError(
            f"fasttrain_kernels: this op on a {kind} tensor needs Triton, which is not installed; "
            "pip install triton (Linux), or use CPU tensors outside triton_on_cpu()"
        )
    return wanted


def has_memory(tensor: torch.Tensor) -> bool:
    """Return whether C++ may read a plain tensor's elements at its address.

    False for lazily allocated zeros, ``meta`` tensors and freed storage, and inside a transform of
    torch.func or forward-mode differentiation.
    """
    return not is_being_transformed() and tensor.data_ptr() != 0


def is_traced(tensor: torch.Tensor) -> bool:
    """Return whether ops on ``tensor`` are traced, so that each of ours must appear as one op.

    In plain eager mode they are not. `torch.autograd.Function` is then enough, and 0.15 ms faster
    than the dispatcher of `torch.library.custom_op` with its many arguments.
    """
    if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor:
        return True
    return is_dispatch_observed() or is_being_transformed()


def define_op(
    name: str, compute: Callable[..., Any], fake: Any, setup_context: Any = None,
    backward: Any = None, *, schema: str | None = None, is_last: bool = True,
) -> Callable[..., Any]:  # fmt: skip
    """Register an op as `torch.library` has it; return what calls it, or where that suffices less.

    If it ``is_last``, gradients of its gradients are an error. Its first input is a tensor.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", compute, mutates_args=(), schema=schema)
    op.register_fake(fake)
    plain = compute
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def differentiate(ctx: Any, *grads: torch.Tensor | None) -> Any:
            if not (is_last and torch.is_grad_enabled()):
                return backward(ctx, *grads)
            with torch.no_grad():
                result = backward(ctx, *grads)
            # `once_differentiable` sees none to refuse where the incoming gradient is constant.
            given = [g if g is None else g.detach().requires_grad_() for g in result]
            return _Last.apply(name.removesuffix("_forward"), *given)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        plain = type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
    return lambda *inputs: (op if is_traced(inputs[0]) else plain)(*inputs)


class _Last(torch.autograd.Function):
    """The identity, whose backward is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, *grads: torch.Tensor | None) -> Any:
        ctx.name = name
        return grads

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name} can be differentiated once; use {ctx.name}_reference")
