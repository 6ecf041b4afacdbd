"""Fused Triton kernels for training language models: importable on their own, torch and triton only."""

from ._dispatch import triton_on_cpu

__all__ = ["triton_on_cpu"]
