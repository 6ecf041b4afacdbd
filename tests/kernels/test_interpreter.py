"""In Triton's interpreter: programs do not race, and results bear the errors of a GPU.

`test_bytes` looks for races in the rest of the catalogue, whose launches it counts.
"""

import re

import fasttrain_kernels
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fasttrain_kernels.catalogue import symmetric_matmul

from tests.support.interpreter import gpu_semantics, no_races
from tests.support.kernel_ops import LARGE_NAMES, SMALL_NAMES, compare, op_named, results

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="looks into Triton's interpreter, which a GPU run leaves out"
)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("add", [False, True])
def test_tiles_of_a_symmetric_product(
    any_size: None, triton_device: torch.device, dtype: str, add: bool
) -> None:
    """Tiles on the diagonal and below it, and some that are outside, in part or all."""
    op = symmetric_matmul(dtype, 392, 72, add=add)
    with no_races() as launched, gpu_semantics(seed=0):
        found = results(op.ours, op)
    assert launched
    compare("symmetric_matmul", op, found)


def kernel_of(fn) -> triton.runtime.interpreter.InterpretedFunction:
    return triton.runtime.interpreter.InterpretedFunction(fn.fn)


@triton.jit
def _overlapping(x_ptr, y_ptr, STRIDE: tl.constexpr, SHIFT: tl.constexpr):
    at = tl.program_id(0) * STRIDE + tl.arange(0, 16)
    tl.store(y_ptr + at, tl.load(x_ptr + at + SHIFT))


@pytest.mark.parametrize(
    ("stride", "shift", "message"),
    [(16, 0, ""), (15, 0, "several"), (16, 1, "read by another"), (16, -64, "")],
)
def test_planted_races_are_found(stride: int, shift: int, message: str) -> None:
    x = torch.zeros(128)
    launch = kernel_of(_overlapping)[(3,)]
    arguments = x[64:], x[64:], stride, shift
    if not message:
        with no_races():
            launch(*arguments)
        return
    with pytest.raises(AssertionError, match=message), no_races():
        launch(*arguments)


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_tolerances_hold_with_the_errors_of_a_gpu(triton_device: torch.device, name: str) -> None:
    op = op_named(name)
    with gpu_semantics(seed=0):
        ours = results(op.ours, op)
    compare(name, op, ours)


# Of one column, the gradient of RMSNorm is a difference of equal terms: all of it is rounding.
WELL_CONDITIONED = [name for name in LARGE_NAMES if not re.match(r"rms_norm .* dim=1 ", name)]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_tolerances_hold_with_the_errors_of_a_gpu_at_every_size(
    triton_device: torch.device, name: str, seed: int
) -> None:
    op = op_named(name)
    with gpu_semantics(seed):
        ours = results(op.ours, op)
    compare(name, op, ours)


@triton.jit
def _functions(x_ptr, y_ptr, n: tl.constexpr):
    at = tl.arange(0, n)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.exp(x))
    tl.store(y_ptr + n + at, 1.0 / x)
    tl.store(y_ptr + 2 * n + at, tl.maximum(x, 1.0))


def test_the_semantics_are_those_of_a_gpu() -> None:
    x = torch.linspace(-3, 3, 64)
    x[:4] = torch.tensor([torch.nan, -100.0, 1e-40, torch.inf])
    y = torch.empty(3, 64)
    with gpu_semantics(seed=0):
        kernel_of(_functions)[(1,)](x, y, 64)
    assert y[0, 1:4].tolist() == [0.0, y[0, 2], torch.inf]
    assert y[1, 2:4].tolist() == [torch.inf, 0.0]
    assert y[2, 0] == 1.0
    for mine, exact in ((y[0], x.exp()), (y[1], 1 / x)):
        units = np.abs(mine[4:].numpy().view(np.int32) - exact[4:].numpy().view(np.int32))
        assert 2 <= units.max() <= 3  # numpy's own is not always torch's


def test_NaN_logits_show_where_maxima_drop_them(triton_device: torch.device) -> None:
    logits = torch.randn(3, 131)
    logits[0, 5], logits[1, 7:] = torch.nan, -torch.inf
    with gpu_semantics(seed=1):
        leaf = logits.requires_grad_()
        losses = fasttrain_kernels.cross_entropy(leaf, torch.tensor([3, 3, 3]), reduction="none")
        losses.sum().backward()
    assert losses.isfinite().tolist() == [False, True, True]
    assert leaf.grad.isfinite().all(1).tolist() == [False, True, True]
