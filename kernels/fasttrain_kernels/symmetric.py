"""Products that are known to be symmetric, at little more than half the operations.

    out = α X Xᵀ + β C,  C symmetric

On CUDA a Triton kernel computes the tiles of the lower triangle and stores each twice, the second
time transposed. On the CPU the rows are cut into strips and each strip is multiplied from the
diagonal on. Off the diagonal tiles the result is therefore symmetric bit for bit. Accumulation is
fp32; the sum is rounded once on CUDA. Two runs agree bit for bit.

Legend: n matrices, r rows, c columns.
"""

import torch
from torch import Tensor

from ._dispatch import use_triton
from ._launch import warp_size
from ._triton import tl, triton

# On one core of an EPYC 7003 four strips of 64 rows take 0.90 (r = c) to 0.77 (c = 3 r) of a full
# product at r = 256, and 0.73 to 0.69 at r = 768; at r = 128 strips do not pay for square products.
_MIN_STRIP_ROWS = 256
_STRIPS = 4


def symmetric_matmul_reference(
    x: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Compute `symmetric_matmul` in fp64."""
    wide = x.double()
    product = alpha * (wide @ wide.mT)
    return product if add is None else product + beta * add.double()


@triton.jit
def _symmetric_kernel(
    x_ptr, add_ptr, out_ptr,
    n_rows, n_cols, n_tiles, alpha, beta,
    HAS_ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute tile (i, j ≤ i) of one matrix and store it at (i, j) and, transposed, at (j, i)."""
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    tile = tl.program_id(0) % n_tiles
    # Tile number i (i + 1) / 2 + j; the square root may be off by one.
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    rows_i = i * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_j = j * BLOCK_R + tl.arange(0, BLOCK_R)
    x_ptr += matrix * n_rows * n_cols
    at_i = x_ptr + rows_i.to(tl.int64)[:, None] * n_cols
    at_j = x_ptr + rows_j.to(tl.int64)[:, None] * n_cols
    inside_i = rows_i[:, None] < n_rows
    inside_j = rows_j[:, None] < n_rows
    acc = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    for k in range(0, n_cols, BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)[None, :]
        a = tl.load(at_i + cols, mask=inside_i & (cols < n_cols), other=0.0)
        b = tl.load(at_j + cols, mask=inside_j & (cols < n_cols), other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    base = matrix * n_rows * n_rows
    offsets = base + rows_i.to(tl.int64)[:, None] * n_rows + rows_j[None, :]
    mask = inside_i & (rows_j[None, :] < n_rows)
    acc *= alpha
    if HAS_ADD:
        acc += beta * tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, value, mask=mask)
    if i != j:
        mirrored = base + rows_j.to(tl.int64)[:, None] * n_rows + rows_i[None, :]
        mask = inside_j & (rows_i[None, :] < n_rows)
        tl.store(out_ptr + mirrored, tl.trans(value), mask=mask)


def _launch(x: Tensor, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    n, rows, cols = x.shape
    x = x.contiguous()
    add = None if add is None else add.contiguous()
    out = torch.empty(n, rows, rows, dtype=x.dtype, device=x.device)
    if n == 0 or rows == 0:
        return out
    # fp32 operands are twice as wide and "ieee" needs registers for the split products.
    block_r, block_c, warps = (64, 32, 4) if x.dtype == torch.float32 else (128, 64, 8)
    side = triton.cdiv(rows, block_r)
    tiles = side * (side + 1) // 2
    with torch.cuda.device_of(x):
        _symmetric_kernel[(n * tiles,)](
            x, out if add is None else add, out, rows, cols, tiles, alpha, beta,
            HAS_ADD=add is not None, PRECISION="ieee", BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=warps,
            num_stages=3 if warp_size(x) == 32 else 2,  # a third stage overflows AMD's LDS
        )  # fmt: skip
    return out


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (n, r, c) by (n, c, r) whose product is symmetric in exact arithmetic.

    b is aᵀ, or a polynomial of the same symmetric matrix as a. Plain torch.
    """
    rows = a.shape[1]
    if rows < _MIN_STRIP_ROWS or a.device.type != "cpu":
        return torch.bmm(a, b)
    out = torch.empty(a.shape[0], rows, rows, dtype=a.dtype, device=a.device)
    strip = -(-rows // _STRIPS)
    for start in range(0, rows, strip):
        end = min(start + strip, rows)
        block = torch.bmm(a[:, start:end], b[:, :, start:])
        out[:, start:end, start:] = block
        out[:, end:, start:end] = block[:, :, end - start :].mT
    return out


@torch.no_grad()
def symmetric_matmul(
    x: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Return α X Xᵀ + β add for matrices X.

    Args:
        x: (..., rows, cols), fp32, bf16 or fp16 (fp64 on the CPU).
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
    batch = x.reshape(-1, *x.shape[-2:])
    if use_triton(x) and x.dtype != torch.float64:
        added = None if add is None else add.reshape(-1, *shape[-2:])
        return _launch(batch, added, alpha, beta).view(shape)
    out = symmetric_product(batch, batch.mT).view(shape)
    if alpha != 1.0:
        out.mul_(alpha)
    return out if add is None else out.add_(add, alpha=beta)
