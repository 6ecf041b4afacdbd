"""What launches share: how kernels see a tensor and a device, and a scaling by a scalar on it."""

import functools
from typing import Any

import torch
from torch import Tensor

from ._dispatch import use_triton
from ._triton import tl, triton

# The kernels accumulate in fp32; other dtypes (float64) take the plain torch path on every device.
TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_BLOCK = 4096  # 8 KiB of bf16 a program at 8 warps: two 16-byte accesses a thread


def target(tensor: Tensor) -> Any:
    """Return Triton's `GPUTarget` of a launch on ``tensor``, None for the interpreter."""
    try:  # a CPU tensor: a target set for ahead-of-time compilation, or the interpreter
        with torch.cuda.device_of(tensor):
            return triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return None


def warp_size(tensor: Tensor) -> int:
    """Return the threads of a warp on the device that a launch on ``tensor`` compiles for."""
    if tensor.is_cuda:
        return 64 if torch.version.hip else 32
    found = target(tensor)
    return found.warp_size if found else 32


@functools.lru_cache
def n_multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has."""
    if device.type != "cuda":
        return 1  # the interpreter: few programs, so that each walks over several tiles
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return x and (n_inner, stride_outer, stride_inner): row r starts at element
    (r // n_inner)·stride_outer + (r % n_inner)·stride_inner. Copies what has no such form.

    The two levels are for queries and keys taken out of one fused projection.
    """
    dims = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    merged: list[tuple[int, int]] = []
    for n, s in dims:
        if merged and merged[-1][1] == n * s:
            merged[-1] = (merged[-1][0] * n, s)
        else:
            merged.append((n, s))
    if len(merged) > 2 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return x.contiguous(), 1, x.shape[-1], 0
    if len(merged) == 2:
        return x, merged[1][0], merged[0][1], merged[1][1]
    return x, 1, merged[0][1] if merged else x.shape[-1], 0


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
        with torch.cuda.device_of(x):
            _scale_kernel[grid](x, factor, x.numel(), BLOCK=_BLOCK, num_warps=8)
    elif factor.item() != 1.0:
        x.mul_(factor)
