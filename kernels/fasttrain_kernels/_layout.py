"""How the row-wise and elementwise kernels see a tensor and a device."""

import functools

import torch
from torch import Tensor

__all__ = ["TRITON_DTYPES", "as_rows", "n_multiprocessors"]

# The kernels accumulate in fp32; other dtypes (float64) take the plain torch path on every device.
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
