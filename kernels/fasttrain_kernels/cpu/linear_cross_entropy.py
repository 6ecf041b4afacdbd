"""Loss and gradients of a linear layer and cross-entropy in C++, for operands in fp32 or bf16.

Logits of a block of columns and their exponentials are made in fp32 while they are in the cache;
products take the operands' dtype: product.h. Legend: N rows, D dim, V vocabulary.
"""

import struct
from functools import partial

import torch
from torch import Tensor

from .._dispatch import has_memory
from .._loss_options import LossOptions
from . import computes_in, load_or_warn, pointers

# Columns of a block: its logits of 64 rows and a part of the weight share the second cache.
_WIDTH = {torch.float32: 192, torch.bfloat16: 256}
_PARTS = 16  # the most partial sums, of a thread each, of the gradient of the hidden states
# Rows of a chunk: with more, logits leave the third cache, with fewer, the weight is packed and its
# gradient read and written more often.
_ROWS = 512
_LEAST = 2**20  # Fewer logits are not worth the time that g++ takes.
# Few columns: up to how many, above how many logits, and up to how many elements of the weight.
_FEW, _LARGEST_OF_FEW = 1024, 2**20
_LEAST_OF_FEW = {torch.float32: 2**18, torch.bfloat16: 2**15}
# With AVX-512 torch's own products of more columns are faster than these in parts.
_WIDEST_OF_AVX512 = 512
_library = partial(load_or_warn, "product.h", "linear_cross_entropy.cpp")


def fits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions) -> bool:
    """Return whether `run_in_cpp` computes this, and is the faster way."""
    (n_rows, dim), n_cols = hidden.shape, weight.shape[0]
    few = n_cols <= _FEW
    return (
        hidden.device.type == "cpu"
        and computes_in(hidden.dtype)
        and bias is None
        and options.class_weight is None
        and not options.label_smoothing
        and dim % 16 == 0 < dim
        and (dim <= _WIDEST_OF_AVX512 or torch.backends.cpu.get_cpu_capability() != "AVX512")
        and (n_cols * dim <= _LARGEST_OF_FEW if few else n_cols >= 4 * dim)
        and n_rows * n_cols > (_LEAST_OF_FEW[hidden.dtype] if few else _LEAST)
        and hidden.stride(1) == weight.stride(1) == 1
        and all(map(has_memory, (hidden, weight)))
        and _library(dtype=hidden.dtype) is not None
    )


def _layout(n_rows: int, dim: int, n_cols: int, rows: int, dtype: torch.dtype) -> list[int]:
    """Return rows of a chunk, columns of a block, and parts, whatever the threads.

    They take the memory of the logits (rows, V); where columns are few, of hidden states too.
    """
    n_blocks = -(-n_cols // _WIDTH[dtype])
    n_blocks = n_blocks if n_blocks < 4 else -(-n_blocks // 4) * 4
    width = -(-n_cols // (32 * n_blocks)) * 32
    n_blocks = -(-n_cols // width)
    parts = max(1, min(_PARTS, n_blocks, n_cols // dim, -(-4 * _ROWS // min(n_rows, _ROWS))))
    held = n_blocks * (width * dtype.itemsize // 2 + 6) + (parts + 3) * dim + 8
    within = rows * n_cols // held if n_cols > _FEW else -(-rows // 16) * 16
    most = max(16, min(within, _ROWS) // 16 * 16)
    n_chunks = -(-n_rows // most)
    return [-(-n_rows // (16 * n_chunks)) * 16, width, parts]


def run_in_cpp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    rows: int,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    upstream: Tensor | None,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return losses, lse and hits, each (N,), and write the gradients that are given, contiguous.

    None: torch's operations are to do it, as a logit is not finite, a loss is above 46, or a target
    is not below V. The weight is fp32. The space is that of ``rows`` rows of logits at most, but
    for few rows. Reruns agree bit for bit, on any number of threads.
    """
    (n_rows, dim), n_cols = hidden.shape, weight.shape[0]
    losses, lse = (hidden.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    correct = losses.new_empty(n_rows if want_correct else 0)
    per_row = [
        None if x is None else x.float().expand(n_rows).contiguous()
        for x in (options.token_weight, upstream)
    ]
    shape = struct.pack(
        "10l3f",  # the C++'s Shape
        *(n_rows, dim, n_cols, hidden.stride(0), weight.stride(0), options.ignore_index),
        *_layout(n_rows, dim, n_cols, rows, hidden.dtype),
        torch.get_num_threads(),
        options.z_loss,
        options.softcap,
        1 if options.scale is None else options.scale.item(),
    )
    longs = targets.long()
    outputs = (losses, lse, correct if want_correct else None, hidden_grad, weight_grad)
    tensors = pointers((hidden, weight, longs, *per_row, *outputs))
    right = _library(dtype=hidden.dtype).linear_cross_entropy(shape, tensors)
    return (losses, lse, correct) if right else None
