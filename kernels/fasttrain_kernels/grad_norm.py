"""Global gradient norm, non-finite flag and clip coefficient, in one pass over the gradients.

    norm        = sqrt(Σ_i Σ_j g_ij²)
    found_inf   = 1 if the norm is inf or NaN else 0
    coefficient = min(1, max_norm / (norm + 1e-6))

The gradients are only read: `FusedAdamW.step` and `Muon.step` take the coefficient and the flag as
device tensors and apply them inside their own pass, so clipping costs one read of the gradients
instead of two reads and a write, and nothing waits for the device.

Sums within a chunk are fp32 (fp64 in C++). Partial sums are combined in fp64 on a CPU, and in fp32
by a single Triton program on CUDA. All sums have a fixed order: reruns agree bit for bit.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._dispatch import launches_triton
from ._multi_tensor import (
    BLOCK,
    CHUNK,
    block_warps,
    cached_table,
    launch_grid,
    load_pointer,
    triton_dtype,
)
from ._torch import held_by
from ._triton import tl, triton
from .cpu.optimizer import fits, sum_of_squares

# Each row of a tensor on a CPU is summed by one thread, so that the norm does not depend on the
# number of threads, as torch.dot's does. The rounding error grows with the length of a row.
CPU_ROW = 1 << 14
_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ uses the same


class GradNorm(NamedTuple):
    """What `grad_norm` returns: three 0-dim fp32 tensors on the gradients' device."""

    norm: Tensor
    found_inf: Tensor
    clip_coefficient: Tensor


def grad_norm_reference(tensors: Iterable[Tensor | None], max_norm: float = math.inf) -> GradNorm:
    """Compute `grad_norm` in fp64 with plain torch operations."""
    squares = [local_tensor(t).double().square().sum() for t in tensors if t is not None]
    if not squares:
        return _of_nothing(max_norm)
    return _finish(torch.stack(squares).sum().sqrt().float(), max_norm)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the shard that this rank holds of a DTensor, and any other tensor as it is."""
    if type(tensor) is Tensor or not hasattr(tensor, "to_local"):
        return tensor
    local = held_by(tensor)
    return local if type(local) is Tensor else tensor.to_local()


def _finish(norm: Tensor, max_norm: float) -> GradNorm:
    found_inf = (~norm.isfinite()).float()
    return GradNorm(norm, found_inf, (max_norm / (norm + _EPS)).clamp(max=1.0))


def _of_nothing(max_norm: float) -> GradNorm:
    return _finish(torch.zeros((), dtype=torch.float32, device="cpu"), max_norm)


def _flat(tensor: Tensor) -> Tensor:
    """View a tensor's elements, in whatever order memory has them, as one dimension."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if torch.ops.aten.is_non_overlapping_and_dense.default(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def _grad_norm_torch(tensors: list[Tensor], max_norm: float) -> GradNorm:
    if fits(tensors) and not any(t.requires_grad for t in tensors):
        total = torch.tensor(sum_of_squares(tensors), dtype=torch.float32, device="cpu")
        return _finish(total.sqrt(), max_norm)
    norms: list[Tensor] = []
    for flat in map(_flat, tensors):
        dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
        whole = flat.numel() // CPU_ROW * CPU_ROW
        if whole > 0:
            rows = flat[:whole].view(-1, CPU_ROW)
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=dtype))
        if whole < flat.numel() or not norms:
            rest = flat[whole:] if whole > 0 else flat
            norms.append(torch.linalg.vector_norm(rest, dtype=dtype).view(1))
    total = torch.cat(norms).double().square().sum()
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return _finish(total.sqrt().float(), max_norm)  # squares may lie outside fp32
    return _finish(total.float().sqrt(), max_norm)


@triton.jit
def _sum_squares_kernel(
    pointers_ptr,
    lengths_ptr,
    chunks_ptr,
    partial_ptr,
    n_chunks,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the squares of every n-th chunk, in an order that does not depend on timing."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    lanes = tl.arange(0, BLOCK)
    for k in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor = tl.load(chunks_ptr + 2 * k)
        start = tl.load(chunks_ptr + 2 * k + 1).to(tl.int64) * CHUNK
        length = tl.load(lengths_ptr + tensor)
        g_ptr = load_pointer(pointers_ptr, tensor, DTYPE, ALIGNED) + start
        if start + CHUNK <= length:  # no mask, so that the accesses are 16 bytes wide
            for i in range(0, CHUNK, BLOCK):
                g = tl.load(g_ptr + i + lanes).to(tl.float32)
                total += g * g
        else:
            rest = (length - start).to(tl.int32)
            for i in range(0, rest, BLOCK):
                g = tl.load(g_ptr + i + lanes, mask=i + lanes < rest, other=0.0).to(tl.float32)
                total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _finish_kernel(partial_ptr, out_ptr, n_partials, max_norm, BLOCK: tl.constexpr):
    """Write the norm, the non-finite flag and the clip coefficient to out[0], out[1], out[2]."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    lanes = tl.arange(0, BLOCK)
    for i in range(0, n_partials, BLOCK):
        total += tl.load(partial_ptr + i + lanes, mask=i + lanes < n_partials, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, 0))
    finite = norm < float("inf")  # false for NaN too
    ratio = tl.full((), max_norm, tl.float32) / (norm + 1e-6)
    tl.store(out_ptr, norm)
    tl.store(out_ptr + 1, tl.where(finite, 0.0, 1.0))
    tl.store(out_ptr + 2, tl.where(ratio > 1.0, 1.0, ratio))  # NaN stays NaN


def _grad_norm_triton(tensors: Sequence[Tensor], max_norm: float) -> GradNorm:
    device = tensors[0].device
    classes: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for tensor in map(_flat, tensors):
        if tensor.numel() > 0:
            key = (tensor.dtype, tensor.data_ptr() % 16 == 0)
            classes.setdefault(key, []).append(tensor)
    launches = []
    n_partials = 0
    for (dtype, aligned), members in classes.items():
        table, pointers = cached_table(members)
        programs = launch_grid(table.n_chunks, device)
        launches.append((table, pointers, triton_dtype(dtype), aligned, n_partials, programs))
        n_partials += programs
    partial = torch.empty(n_partials, dtype=torch.float32, device=device)
    out = torch.empty(3, dtype=torch.float32, device=device)
    with torch.cuda.device_of(out):
        for table, pointers, dtype, aligned, offset, programs in launches:
            _sum_squares_kernel[(programs,)](
                pointers,
                table.lengths,
                table.chunks,
                partial[offset:],
                table.n_chunks,
                DTYPE=dtype,
                ALIGNED=aligned,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                num_warps=block_warps(out),
            )
        _finish_kernel[(1,)](partial, out, n_partials, max_norm, BLOCK=1024, num_warps=4)
    return GradNorm(*out.unbind())


def grad_norm(
    tensors: Tensor | Iterable[Tensor | None],
    max_norm: float = math.inf,
    *,
    group: dist.ProcessGroup | None = None,
) -> GradNorm:
    """Return the global 2-norm of the tensors, a non-finite flag and the clip coefficient.

    Args:
        tensors: gradients of any shapes, fp32, bf16 or fp16, on one device; a DTensor counts with
            the shard this rank holds. None, the gradient of what has none, is left out. An empty
            list has norm zero, on the CPU.
        max_norm: norm above which ``clip_coefficient`` falls below one.
        group: process group over which the tensors are sharded; the sums of squares are added over
            it, which makes the norm that of the whole tensors. None: of what this rank holds, also
            for DTensors.

    Returns:
        `GradNorm` (norm, found_inf, clip_coefficient), each a 0-dim fp32 tensor on the device.

    Raises:
        ValueError: the tensors lie on several devices, or max_norm is negative.
        TypeError: a tensor is sparse or complex.

    Numerics: sums in fp32 (C++ in fp64), in a fixed order; found_inf is 1 where any element is inf
        or NaN, and where the sum of squares overflows fp32 (a norm above 1.8e19).
    Memory: one number per chunk.
    """
    if max_norm < 0:
        raise ValueError(f"grad_norm: max_norm must be >= 0, got {max_norm}")
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    local = [local_tensor(t) for t in tensors if t is not None]
    if not local:
        return _of_nothing(max_norm)
    device = local[0].device
    for tensor in local:
        if tensor.layout != torch.strided or tensor.is_complex():
            raise TypeError(
                f"grad_norm: got a tensor of {tensor.dtype} and {tensor.layout}; gradients must be "
                "real and dense (torch.view_as_real, Tensor.to_dense, sparse=False of an embedding)"
            )
        if tensor.device != device:
            raise ValueError(
                f"grad_norm: all tensors must be on one device, got {device} and {tensor.device}; "
                "call it once a device and combine the norms"
            )
    run = _grad_norm_triton if launches_triton(local[0]) else _grad_norm_torch
    result = run(local, max_norm)
    if group is None:
        return result
    square = result.norm.square()
    dist.all_reduce(square, group=group)
    return _finish(square.sqrt(), max_norm)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor | None],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale the gradients in place so that their global 2-norm is at most max_norm.

    A drop-in for `torch.nn.utils.clip_grad_norm_`, for the 2-norm. A loop that uses
    `FusedAdamW` or `Muon` need not call it: pass ``grad_norm(...).clip_coefficient`` to their step.

    Args:
        parameters: parameters whose ``grad`` is clipped; those without one, and None, are skipped.
        max_norm: the largest norm that is left as it is.
        norm_type: 2; others are torch's own.
        error_if_nonfinite: raise if the norm is inf or NaN (waits for the device).
        foreach: ignored, kept for torch's function.
        group: as for `grad_norm`.

    Returns:
        The norm before clipping, a 0-dim fp32 tensor.

    Raises:
        RuntimeError: the norm is not finite and error_if_nonfinite is set.
        ValueError: norm_type is not 2.
    """
    if float(norm_type) != 2.0:
        raise ValueError(
            f"clip_grad_norm_: norm_type must be 2, got {norm_type}; "
            "torch.nn.utils.clip_grad_norm_ has others"
        )
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [local_tensor(p.grad) for p in parameters if p is not None and p.grad is not None]
    result = grad_norm(grads, max_norm, group=group)
    if error_if_nonfinite and result.found_inf.item() != 0:
        raise RuntimeError(
            f"clip_grad_norm_: the gradients' norm is {result.norm.item()}; find the layer whose "
            "gradient is not finite, or pass error_if_nonfinite=False and skip the step"
        )
    if grads and (grads[0].device.type != "cpu" or result.clip_coefficient.item() != 1.0):
        torch._foreach_mul_(grads, result.clip_coefficient)
    return result.norm
