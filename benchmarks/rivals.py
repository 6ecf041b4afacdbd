"""Shared by the benchmarks of ops: which rivals take part, and that all compute the same.

An installed peer that fails, or whose result is off, is left out with the reason: it must not
cost the others their figures. Ours must agree, or the benchmark fails.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# A chain of plain torch is off by up to 1e-2 in bf16, and in fp32 by 1e-6 · √(length of its sums).
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
Op = Callable[..., Any]
OURS = "fasttrain"


def needs_cuda(make: Callable[[], Op]) -> Callable[[], Op]:
    """Return ``make`` for a peer whose kernels run on a CUDA device alone."""

    def maker() -> Op:
        if not CUDA:
            raise ImportError("needs a CUDA device")
        return make()

    return maker


def compiled(op: Op) -> Op:
    """Return ``op`` compiled for the shapes of its first call."""
    return torch.compile(op, dynamic=False)


def both_ways(op: Op, leaves: list[Tensor], dys: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A callable that runs forward and backward and returns outputs and gradients."""

    def call() -> list[Tensor]:
        out = op(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        return [*outs, *torch.autograd.grad(outs, leaves, dys)]

    return call


def check(name: str, got: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    """Hold ‖got − exact‖ ≤ tolerance · ‖exact‖ for every output and gradient."""
    assert len(got) == len(exact)
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape, f"{name}: result {i} has shape {a.shape}, not {b.shape}"
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"{name}: result {i} is off by {error:.1e} of its norm"


def gather(
    makers: Mapping[str, Callable[[], Op]], verify: Callable[[str, Op], None]
) -> tuple[dict[str, Op], dict[str, str]]:
    """Make and verify the rivals; return those that take part, and why the others do not.

    Args:
        makers: name → function that imports and returns the op; ours is called ``fasttrain``.
        verify: raises where the op of that name does not compute what the reference does.
    """
    ops: dict[str, Op] = {}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            op = make()
            verify(name, op)
            ops[name] = op
        except ImportError as error:
            left_out[name] = str(error)
        except Exception as error:
            if name.startswith(OURS):
                raise
            left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return ops, left_out


def elementwise(
    compare: Any,
    makers: Mapping[str, Callable[[], Op]],
    reference: Op,
    leaves: list[Tensor],
    dys: list[Tensor],
    n_bytes: int,
) -> None:
    """Verify rivals of an element-wise op against its fp32 reference, time and record them."""
    torch._dynamo.reset()
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    exact = both_ways(reference, wide, [dy.float() for dy in dys])()

    def verify(name: str, op: Op) -> None:
        check(name, both_ways(op, leaves, dys)(), exact, TOLERANCE[leaves[0].dtype])

    ops, left_out = gather(makers, verify)
    calls = {name: both_ways(op, leaves, dys) for name, op in ops.items()}
    rates = {"gb_per_s": n_bytes / 1e9}
    compare(calls, n_calls=5 if CUDA else 1, left_out=left_out, per_call=rates)
