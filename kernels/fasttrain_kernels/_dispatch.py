"""Which path an op takes: Triton for CUDA tensors, plain torch for CPU tensors.

CPU tensors take the Triton path in two cases only, both meant for tests and inspection: inside
`triton_on_cpu()`, and in a process started with ``TRITON_INTERPRET=1``, where Triton's interpreter
executes the very same kernels with NumPy.

Transforms of torch.func (`grad`, `vmap`, `jvp`, …) and forward-mode differentiation do not see into
an op. There the public functions compute their ``<op>_reference``, and a backward pass that is
itself transformed (``is_grads_batched``) differentiates it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ._torch import is_batched, is_being_transformed, is_dispatch_observed, is_fake
from ._triton import HAS_TRITON

# The ops' namespace is the package's name: a vendored copy does not clash with the original.
NAMESPACE = (__package__ or "fasttrain_kernels").replace(".", "_")

_forced_depth = 0


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Make CPU tensors take the Triton path inside the ``with`` block.

    The kernels then run in Triton's interpreter when Triton was imported with
    ``TRITON_INTERPRET=1``; without it they can only be compiled ahead of time (see
    `dev.aot`), since there is no device to launch them on.
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


def launches_triton(tensor: torch.Tensor) -> bool:
    """Return whether kernels are launched on the memory of ``tensor``; a fake one has none."""
    return use_triton(tensor) and not is_fake(tensor)


def autocasts(device_type: str) -> bool:
    """Return whether autocast is enabled on a type of device, not all of which have it."""
    # Dynamo of torch 2.11 does not see through the first question.
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def has_memory(tensor: torch.Tensor) -> bool:
    """Return whether C++ may read a plain tensor's elements at its address.

    False for lazily allocated zeros, ``meta`` tensors and freed storage, and inside a transform of
    torch.func or forward-mode differentiation.
    """
    return not is_being_transformed() and tensor.data_ptr() != 0


def is_transformed(*grads: torch.Tensor | None) -> bool:
    """Return whether a transform asks for plain torch: in backward, where any gradient does."""
    return is_being_transformed(unknown=False) or any(
        g is not None and is_batched(g) for g in grads
    )


def is_composed(tensor: torch.Tensor) -> bool:
    """Return whether an op without products on ``tensor`` is a plain composition of torch's.

    The compiler fuses one, transforms differentiate it, and on ``meta`` there is nothing to save.
    """
    return torch.compiler.is_compiling() or tensor.is_meta or is_transformed()


def is_abstract(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` has no data: it is traced, fake, or on ``meta``."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta


def is_traced(tensor: torch.Tensor) -> bool:
    """Return whether ops on ``tensor`` are traced, so that each of ours must appear as one op.

    In plain eager mode they are not. `torch.autograd.Function` is then enough, and 0.15 ms faster
    than the dispatcher of `torch.library.custom_op` with its many arguments.
    """
    if torch.compiler.is_compiling() or is_abstract(tensor):
        return True
    return is_dispatch_observed() or is_being_transformed()


def pull_back(
    function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a function in plain torch, in a backward pass that is transformed."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
    return torch.autograd.grad(y, leaves, upstream, create_graph=create_graph)


def differentiable_once(
    name: str, backward: Callable[..., Any], *, instead: str | None = None
) -> Callable[..., Any]:
    """Return ``backward``, of whose results further gradients are an error that names ``name``.

    The error names what can be used ``instead``, by default the reference. Where ``backward`` is
    transformed it is left alone: what it does then is plain torch.
    """

    def differentiate(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if not torch.is_grad_enabled() or is_transformed(*grads):
            return backward(ctx, *grads)
        with torch.no_grad():
            result = backward(ctx, *grads)
        # `once_differentiable` sees none to refuse where the incoming gradient is constant.
        results = [
            g.detach().requires_grad_() if isinstance(g, torch.Tensor) else g for g in result
        ]
        return _Last.apply(name, instead or f"{name}_reference", *results)

    return differentiate


def gradients_of(inputs: Any, **gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return what a backward pass returns: the named gradients, and None for the other inputs.

    ``inputs`` is the NamedTuple class of the op's inputs. An op of ``(x, weight, eps)`` returns
    ``gradients_of(Inputs, x=dx)``, which is ``(dx, None, None)``.
    """
    return tuple(gradients.get(name) for name in inputs._fields)


def define_op(
    name: str,
    compute: Callable[..., Any],
    fake: Any,
    setup_context: Any = None,
    backward: Any = None,
    *,
    schema: str | None = None,
    is_last: bool = True,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Register an op as `torch.library` has it; return what calls it, or where that suffices less.

    If it ``is_last``, gradients of its gradients are an error. Its first input is a tensor.
    ``flops`` returns the operations of its products, for `torch.utils.flop_counter`: its arguments
    are the op's, with shapes for tensors.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", compute, mutates_args=(), schema=schema)
    op.register_fake(fake)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if flops is not None and packet not in flop_registry:  # is there where a module is reloaded
        register_flop_formula(packet)(lambda *shapes, out_shape: flops(*shapes))
    plain = compute
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            setup_context(ctx, inputs, output)
            return output

        last = differentiable_once(name.removesuffix("_forward"), backward)
        methods = {
            "forward": staticmethod(forward),
            "backward": staticmethod(last if is_last else backward),
        }
        plain = type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
    return lambda *inputs: (op if is_traced(inputs[0]) else plain)(*inputs)


class _Last(torch.autograd.Function):
    """The identity, whose backward is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, instead: str, *grads: torch.Tensor | None) -> Any:
        ctx.message = f"{name} can be differentiated once; use {instead}"
        return grads

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)
