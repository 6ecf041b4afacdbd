"""The Triton kernels of `rms_norm`; formulas and promises are in rms_norm.py.

Legend: R rows, D columns. A row's offset is int64. dy, dh, residual and every output are
contiguous; x is reached by the two row strides of `as_rows`.
"""

from ._triton import tl, triton


@triton.jit
def _row_offsets(rows, n_inner, stride_outer, stride_inner, ALIGN: tl.constexpr):
    # Strides come divided by ALIGN: of an integer argument Triton sees by itself only whether it
    # divides by 16, and rows of, say, 1000 would be read two bytes at a time.
    outer = (rows // n_inner).to(tl.int64) * stride_outer * ALIGN
    inner = (rows % n_inner).to(tl.int64) * stride_inner * ALIGN
    return (outer + inner)[:, None]


@triton.jit
def _load_weight(weight_ptr, cols, N_COLS: tl.constexpr, ZERO_CENTERED: tl.constexpr):
    w = tl.load(weight_ptr + cols, mask=cols < N_COLS, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        w += 1.0
    return w[None, :]


@triton.jit
def _load_h(x_ptr, residual_ptr, h_ptr, offsets_x, offsets, mask, HAS_RESIDUAL: tl.constexpr):
    h = tl.load(x_ptr + offsets_x, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, stored, mask=mask)
        h = stored.to(tl.float32)  # the backward sees the rounded sum, so the forward does too
    return h


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    n_inner,
    stride_x_outer,
    stride_x_inner,
    n_rows,
    eps,
    ALIGN: tl.constexpr,
    N_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < n_rows
    row_x = _row_offsets(rows, n_inner, stride_x_outer, stride_x_inner, ALIGN)
    row = rows.to(tl.int64)[:, None] * N_COLS
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N >= N_COLS:
        mask = row_mask[:, None] & (cols < N_COLS)[None, :]
        h = _load_h(x_ptr, residual_ptr, h_ptr, row_x + cols, row + cols, mask, HAS_RESIDUAL)
        rstd = tl.rsqrt(tl.sum(h * h, axis=1) / N_COLS + tl.cast(eps, tl.float32))
        y = h * rstd[:, None]
        if HAS_WEIGHT:
            y *= _load_weight(weight_ptr, cols, N_COLS, ZERO_CENTERED)
        tl.store(y_ptr + row + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        squares = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        for start in range(0, N_COLS, BLOCK_N):
            at = start + cols
            mask = row_mask[:, None] & (at < N_COLS)[None, :]
            h = _load_h(x_ptr, residual_ptr, h_ptr, row_x + at, row + at, mask, HAS_RESIDUAL)
            squares += h * h
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / N_COLS + tl.cast(eps, tl.float32))
        if HAS_RESIDUAL:
            tl.debug_barrier()  # h is read back below, maybe by other threads than wrote it
        for start in range(0, N_COLS, BLOCK_N):
            at = start + cols
            mask = row_mask[:, None] & (at < N_COLS)[None, :]
            if HAS_RESIDUAL:
                h = tl.load(h_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
            else:
                h = tl.load(x_ptr + row_x + at, mask=mask, other=0.0).to(tl.float32)
            y = h * rstd[:, None]
            if HAS_WEIGHT:
                y *= _load_weight(weight_ptr, at, N_COLS, ZERO_CENTERED)
            tl.store(y_ptr + row + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    dh_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    n_inner,
    stride_x_outer,
    stride_x_inner,
    n_rows,
    ALIGN: tl.constexpr,
    N_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
):
    first = tl.program_id(0)
    n_programs = tl.num_programs(0)
    n_tiles = tl.cdiv(n_rows, BLOCK_R)
    if NEEDS_DW:
        partial_ptr += first.to(tl.int64) * N_COLS
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N >= N_COLS:
        if HAS_WEIGHT:
            w = _load_weight(weight_ptr, cols, N_COLS, ZERO_CENTERED)
        dw = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        rows = first * BLOCK_R + tl.arange(0, BLOCK_R)
        row_x = _row_offsets(rows, n_inner, stride_x_outer, stride_x_inner, ALIGN)
        row = rows.to(tl.int64)[:, None] * N_COLS
        mask = (rows < n_rows)[:, None] & (cols < N_COLS)[None, :]
        x_next = tl.load(x_ptr + row_x + cols, mask=mask, other=0.0)
        dy_next = tl.load(dy_ptr + row + cols, mask=mask, other=0.0)
        for tile in range(first, n_tiles, n_programs):
            x, dy, now = x_next, dy_next, row + cols
            rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
            now_mask = mask
            # The next tile is on its way while this one is reduced and stored.
            rows = (tile + n_programs) * BLOCK_R + tl.arange(0, BLOCK_R)
            row_x = _row_offsets(rows, n_inner, stride_x_outer, stride_x_inner, ALIGN)
            row = rows.to(tl.int64)[:, None] * N_COLS
            mask = (rows < n_rows)[:, None] & (cols < N_COLS)[None, :]
            x_next = tl.load(x_ptr + row_x + cols, mask=mask, other=0.0)
            dy_next = tl.load(dy_ptr + row + cols, mask=mask, other=0.0)
            x_hat = x.to(tl.float32) * rstd
            g = dy.to(tl.float32)
            if NEEDS_DW:
                dw += g * x_hat
            if HAS_WEIGHT:
                g *= w
            c = tl.sum(g * x_hat, axis=1)[:, None] / N_COLS
            dx = (g - x_hat * c) * rstd
            if HAS_DH:
                dx += tl.load(dh_ptr + now, mask=now_mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + now, dx.to(dx_ptr.dtype.element_ty), mask=now_mask)
        if NEEDS_DW:
            tl.store(partial_ptr + cols, tl.sum(dw, axis=0), mask=cols < N_COLS)
    else:
        for tile in range(first, n_tiles, n_programs):
            rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            row_mask = rows < n_rows
            row_x = _row_offsets(rows, n_inner, stride_x_outer, stride_x_inner, ALIGN)
            row = rows.to(tl.int64)[:, None] * N_COLS
            rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
            products = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
            for start in range(0, N_COLS, BLOCK_N):
                at = start + cols
                mask = row_mask[:, None] & (at < N_COLS)[None, :]
                x_hat = tl.load(x_ptr + row_x + at, mask=mask, other=0.0).to(tl.float32) * rstd
                g = tl.load(dy_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
                if HAS_WEIGHT:
                    g *= _load_weight(weight_ptr, at, N_COLS, ZERO_CENTERED)
                products += g * x_hat
            c = tl.sum(products, axis=1)[:, None] / N_COLS
            n_summed = tl.where(tile == first, 0, N_COLS)
            for start in range(0, N_COLS, BLOCK_N):
                at = start + cols
                mask = row_mask[:, None] & (at < N_COLS)[None, :]
                x_hat = tl.load(x_ptr + row_x + at, mask=mask, other=0.0).to(tl.float32) * rstd
                g = tl.load(dy_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
                if NEEDS_DW:
                    dw = tl.sum(g * x_hat, axis=0)
                    dw += tl.load(partial_ptr + at, mask=at < n_summed, other=0.0)
                    tl.store(partial_ptr + at, dw, mask=at < N_COLS)
                if HAS_WEIGHT:
                    g *= _load_weight(weight_ptr, at, N_COLS, ZERO_CENTERED)
                dx = (g - x_hat * c) * rstd
                if HAS_DH:
                    dx += tl.load(dh_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_ptr + row + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEEDS_DW:
                tl.debug_barrier()  # the next tile may read these sums from other threads


@triton.jit
def _sum_partials_kernel(
    partial_ptr,
    dw_ptr,
    n_partials,
    N_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_partials, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < n_partials)[:, None] & (cols < N_COLS)[None, :]
        offsets = rows.to(tl.int64)[:, None] * N_COLS + cols
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    dw = tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + cols, dw, mask=cols < N_COLS)
