"""Fused Triton kernels for training language models, importable on their own: torch, triton."""

from ._dispatch import triton_on_cpu
from .adamw import FusedAdamW, adamw_reference
from .cross_entropy import cross_entropy, cross_entropy_reference
from .grad_norm import GradNorm, clip_grad_norm_, grad_norm, grad_norm_reference
from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from .muon import Muon
from .newton_schulz import newton_schulz, newton_schulz_reference
from .rms_norm import RMSNorm, rms_norm, rms_norm_reference
from .rope import apply_rope, apply_rope_reference
from .swiglu import relu_squared, relu_squared_reference, swiglu, swiglu_reference
from .symmetric import symmetric_matmul, symmetric_matmul_reference

__all__ = [
    "FusedAdamW",
    "GradNorm",
    "Muon",
    "RMSNorm",
    "adamw_reference",
    "apply_rope",
    "apply_rope_reference",
    "clip_grad_norm_",
    "cross_entropy",
    "cross_entropy_reference",
    "grad_norm",
    "grad_norm_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "newton_schulz",
    "newton_schulz_reference",
    "relu_squared",
    "relu_squared_reference",
    "rms_norm",
    "rms_norm_reference",
    "swiglu",
    "swiglu_reference",
    "symmetric_matmul",
    "symmetric_matmul_reference",
    "triton_on_cpu",
]

__version__ = "0.1.0"  # as fasttrain's: a test compares them
