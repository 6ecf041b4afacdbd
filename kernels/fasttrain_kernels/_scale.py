"""Multiply a gradient by the incoming one, unless that is 1, as seen by the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._dispatch import use_triton
from ._triton import tl, triton

__all__ = ["on_device", "scale_unless_one_", "warp_size"]

_BLOCK = 4096  # 8 KiB of bf16 a program at 8 warps: two 16-byte accesses a thread


def on_device(tensor: Tensor, launch: Callable[[], object]) -> None:
    """Launch on the tensor's device, which need not be the current one, as Triton assumes."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            launch()
    else:
        launch()


def warp_size(tensor: Tensor) -> int:
    """Return the threads of a warp on the device that a launch on ``tensor`` compiles for."""
    if tensor.is_cuda:
        return 64 if torch.version.hip else 32
    try:  # a CPU tensor: a target set for ahead-of-time compilation, or the interpreter
        return int(triton.runtime.driver.active.get_current_target().warp_size)
    except RuntimeError:
        return 32


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n_elements, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


def scale_unless_one_(x: Tensor, factor: Tensor) -> None:
    """Multiply the contiguous ``x`` in place by the scalar ``factor`` unless that is exactly 1.

    One launch that ends at once where the factor is 1, the case of a loss that is its own root.
    """
    if x.numel() == 0:
        return
    if use_triton(x) and x.dtype != torch.float64:
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        on_device(x, lambda: _scale_kernel[grid](x, factor, x.numel(), BLOCK=_BLOCK, num_warps=8))
    elif factor.item() != 1.0:
        x.mul_(factor)
