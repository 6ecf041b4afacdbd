"""Products that are known to be symmetric, at little more than half the operations.

    out = α X Xᵀ + β C,  C symmetric

On a Hopper GPU a Triton kernel computes the tiles of 128 × 256 on and below the diagonal, loaded by
TMA, and stores each but those on the diagonal twice, the second time transposed. On the CPU the
rows are cut into strips, each multiplied from the diagonal on. Elsewhere, in fp32 and for what
`_pays` excludes the product is cuBLAS's or torch's own, in full. Accumulation is fp32; the kernel
and cuBLAS round the sum once. Two runs agree bit for bit.

Legend: n matrices, r rows, c columns.
"""

from typing import Any

import torch
from torch import Tensor

from ._dispatch import define_op, is_transformed, use_triton
from ._launch import target
from ._triton import TensorDescriptor, tl, triton

# Products in strips leave out the tiles above the diagonal. With fewer rows, strips do not pay on a
# CPU.
_MIN_STRIP_ROWS = 256
_STRIPS = 4
# Tiles of the kernel. A step along c is 4 wgmma.m64n256k16 for each of two warp groups, 1024 cycles
# of the tensor cores, in 88 instructions of a warp (SASS); three stages take 147 KiB.
_BLOCK_I, _BLOCK_J, _BLOCK_C = 128, 256, 64
_LEAST_ROWS, _LEAST_ELEMENTS = 1024, 1 << 25  # of what is given to the kernel


def symmetric_matmul_reference(
    x: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Compute `symmetric_matmul` in fp64."""
    wide = x.double()
    product = alpha * (wide @ wide.mT)
    return product if add is None else product + beta * add.double()


@triton.jit
def _symmetric_kernel(
    a_desc,
    b_desc,
    add_desc,
    out_desc,
    mirror_desc,
    n_cols,
    n_tiles,
    alpha,
    beta,
    HAS_ADD: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one of the two tiles of pair (p, j ≤ p) of one matrix: rows 2p or 2p + 1, columns j.

    It is stored there and, off the diagonal, transposed at the mirrored place; the two tiles of a
    pair on the diagonal cover both.
    """
    matrix = tl.program_id(0) // n_tiles
    tile = tl.program_id(0) % n_tiles
    # Pair number p (p + 1) / 2 + j; the square root may be off by one.
    pair = tile // 2
    p = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) / 2.0).to(tl.int32)
    p = tl.where(p * (p + 1) // 2 > pair, p - 1, p)
    p = tl.where((p + 1) * (p + 2) // 2 <= pair, p + 1, p)
    j = pair - p * (p + 1) // 2
    row, col = (2 * p + tile % 2) * BLOCK_I, j * BLOCK_J
    acc = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for k in range(0, n_cols, BLOCK_C):
        a = a_desc.load([matrix, row, k]).reshape(BLOCK_I, BLOCK_C)
        b = b_desc.load([matrix, col, k]).reshape(BLOCK_J, BLOCK_C)
        acc = tl.dot(a, b.T, acc)
    acc *= alpha
    if HAS_ADD:
        acc += beta * add_desc.load([matrix, row, col]).reshape(BLOCK_I, BLOCK_J).to(tl.float32)
    value = acc.to(out_desc.dtype)
    out_desc.store([matrix, row, col], value.reshape(1, BLOCK_I, BLOCK_J))
    if j < p:
        mirror_desc.store([matrix, col, row], value.T.reshape(1, BLOCK_J, BLOCK_I))


def _pays(a: Tensor) -> bool:
    """Return whether the kernel is predicted ahead of cuBLAS: never measured, see the figures.

    On an H100 or H200, in half precision. Without multicast a step of a tile takes 48 KiB from L2,
    1.2 µs at 5.5 TB/s over 132 multiprocessors, where cuBLAS takes 1.0 at 565 TFLOP/s; the tiles
    are 0.67 of all at 768 rows, 0.62 at 1024, 0.56 at 2048. In whole rounds of 132 tiles 12
    matrices of 768² take 1.4 times as long as cuBLAS, 24 of 1024² 0.96, 16 of 2048² 0.75, and of
    2048 × 8192 0.70. A B200's tensor cores are too fast for what L2 gives such tiles (1.35 times as
    long), an A100 has no TMA: descriptors in software spill. fp32 is cuBLAS's, as torch is set to.
    """
    n, rows, cols = a.shape
    fits = a.dtype in (torch.float16, torch.bfloat16) and rows % 8 == cols % 8 == 0 < cols
    if not fits or rows < _LEAST_ROWS or n * rows**2 < _LEAST_ELEMENTS or not use_triton(a):
        return False
    if is_transformed():
        return False
    return getattr(target(a), "arch", 90) == 90  # the interpreter's has none


def _launch(a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    n, rows, cols = a.shape
    out = torch.empty(n, rows, rows, dtype=a.dtype, device=a.device)
    side = triton.cdiv(rows, _BLOCK_J)

    def tiles(of: Tensor, *block: int) -> object:
        of = of.contiguous()
        of = of.clone() if of.data_ptr() % 16 else of  # where TMA cannot begin
        return TensorDescriptor.from_tensor(of, [1, *block])

    with torch.cuda.device_of(a):
        _symmetric_kernel[(n * side * (side + 1),)](
            tiles(a, _BLOCK_I, _BLOCK_C),
            tiles(b, _BLOCK_J, _BLOCK_C),
            tiles(out if add is None else add, _BLOCK_I, _BLOCK_J),
            tiles(out, _BLOCK_I, _BLOCK_J),
            tiles(out, _BLOCK_J, _BLOCK_I),
            cols,
            side * (side + 1),
            alpha,
            beta,
            HAS_ADD=add is not None,
            BLOCK_I=_BLOCK_I,
            BLOCK_J=_BLOCK_J,
            BLOCK_C=_BLOCK_C,
            num_warps=8,
            num_stages=3,
        )
    return out


def _allocate(a: Tensor, *_: Any) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], a.shape[1])


def _flops(a: torch.Size, *_: Any) -> int:
    """Count the elements on and below the diagonal."""
    n, rows, cols = a
    return n * rows * (rows + 1) * cols


_launch_op = define_op(
    "symmetric_product",
    _launch,
    _allocate,
    flops=_flops,
    schema="(Tensor a, Tensor b, Tensor? add, float alpha, float beta) -> Tensor",
)


def symmetric_product(
    a: Tensor, b: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Return α A Bᵀ + β add for (n, r, c) factors whose product is symmetric but for rounding.

    B is A, or both are polynomials of one symmetric matrix. With β = 0 ``add`` is not read.
    """
    if beta == 0.0:
        add = None
    if _pays(a):
        result: Tensor = _launch_op(a, b, add, alpha, beta)
        return result
    rows = a.shape[1]
    # A transform cannot write to the buffer of strips.
    if rows < _MIN_STRIP_ROWS or a.device.type != "cpu" or is_transformed():
        if add is None:
            add, beta = a.new_empty(1), 0.0  # is not read
        return torch.baddbmm(add, a, b.mT, beta=beta, alpha=alpha)
    out = torch.empty(a.shape[0], rows, rows, dtype=a.dtype, device=a.device)
    strip = -(-rows // _STRIPS)
    for start in range(0, rows, strip):
        end = min(start + strip, rows)
        block = torch.bmm(a[:, start:end], b[:, start:].mT)
        out[:, start:end, start:] = block
        out[:, end:, start:end] = block[:, :, end - start :].mT
    if alpha != 1.0:
        out.mul_(alpha)
    return out if add is None else add_scaled_(out, add, beta)


def add_scaled_(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Add α y to x in place, with the same bits for any number of CPU threads.

    At the end of what a thread does, ATen rounds α y to half precision before it adds; elsewhere it
    does not.
    """
    if x.is_cpu and not use_triton(x) and x.dtype in (torch.bfloat16, torch.float16):
        return x.copy_(torch.add(x.float(), y.float(), alpha=alpha))
    return x.add_(y, alpha=alpha)


@torch.no_grad()
def symmetric_matmul(
    x: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Return α X Xᵀ + β add for matrices X.

    Args:
        x: (..., rows, cols), fp32, bf16, fp16 or fp64.
        add: (..., rows, rows), symmetric, of x's dtype.
        alpha: factor of the product.
        beta: factor of ``add``.

    Returns:
        (..., rows, rows) in x's dtype.

    Raises:
        ValueError: x is not a matrix, or ``add`` does not fit.

    Numerics: fp32 accumulation; not differentiable.
    Memory: the result.
    """
    if x.ndim < 2:
        raise ValueError(f"symmetric_matmul: x must be a matrix or a batch, got {x.ndim}-d")
    shape = (*x.shape[:-1], x.shape[-2])
    if add is not None and (add.shape != shape or add.dtype != x.dtype):
        raise ValueError(
            f"symmetric_matmul: add must have shape {shape} and {x.dtype}, "
            f"got {tuple(add.shape)} and {add.dtype}"
        )
    batch = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    added = None if add is None else add.reshape(-1, *shape[-2:])
    return symmetric_product(batch, batch, added, alpha, beta).view(shape)
