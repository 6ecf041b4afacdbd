"""Stochastic rounding from fp32 to bf16 with plain torch operations.

A bf16 number is the upper half of an fp32 number. Adding 16 uniform random bits below the kept half
and cutting them off rounds up with a probability equal to the part cut off: the expected value of
the result is the fp32 value.
"""

import torch
from torch import Tensor

__all__ = ["round_stochastic_"]


def round_stochastic_(target: Tensor, value: Tensor, *, seed: int) -> None:
    """Store ``value`` in ``target``, rounded stochastically.

    Args:
        target: bf16 tensor of any strides, overwritten.
        value: fp32 tensor of the same shape; infinities and NaN are stored as they are.
        seed: of the noise; equal seeds and shapes give equal noise.
    """
    generator = torch.Generator(value.device).manual_seed(seed & (2**63 - 1))
    noise = torch.randint(
        1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    bits = value.contiguous().view(torch.int32)
    rounded = ((bits + noise) & ~0xFFFF).view(torch.float32)
    target.copy_(torch.where(value.isfinite(), rounded, value))
