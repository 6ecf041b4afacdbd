"""Triton kernel of the cross-entropy of a row of logits and its gradient.

One program a row. Rows that fit are held on chip: a logit is read once and its gradient
written once. Longer rows are read twice, the second time from L2, where the first pass
asked for them to stay, and last block first.

A row of any length starts at any multiple of the element size, and a masked 16-byte access needs a
mask that is constant over 16 bytes. So a row is split into *blocks* of BLOCK_N logits, which start
on a 16-byte boundary and need no mask, the *rest*, at most REST logits and a multiple of 16 bytes,
and the *edges*, the few logits before and after these, which are handled by one narrow access. This
is what keeps V=50257 as fast as V=50304.

On a GPU the number of instructions bounds it as soon as memory does: an H100 moves the 4 bytes of a
bf16 logit in the time of 35. So exponentials are to base 2, the ALIGN logits that a thread reads
at once share a maximum and a sum, and the target's gradient, the only one of another form, is
stored once more over what the passes have stored there.

All arithmetic is in fp32; the gradient is rounded once, when it is stored. Row offsets are int64.
"""

from ._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_COLUMN = tl.constexpr(2147483647)
NAN_COLUMN = tl.constexpr(-(2**30))  # is added to the column of a NaN, which torch's argmax prefers


@triton.jit
def _load_logits(ptr, cols, mask, softcap, HAS_SOFTCAP: tl.constexpr, EVICT: tl.constexpr):
    """Logits in fp32, capped when asked; −inf where there is a mask and it is off."""
    other = None if mask is None else -float("inf")
    x = tl.load(ptr + cols, mask=mask, other=other, eviction_policy=EVICT).to(tl.float32)
    if HAS_SOFTCAP:
        decay = tl.exp2(tl.abs(x / softcap) * (-2.0 * LOG2E))
        tanh = (1.0 - decay) / (1.0 + decay)
        x = tl.where(x < 0, -tanh, tanh) * softcap
        if mask is not None:
            x = tl.where(mask, x, -float("inf"))
    return x


@triton.jit
def _times_weight(x, cols, mask, class_weight_ptr, HAS_CLASS_WEIGHT: tl.constexpr):
    """A number or a number a column, times the class weight; 0 where the mask is off."""
    if HAS_CLASS_WEIGHT:
        other = None if mask is None else 0.0
        x *= tl.load(class_weight_ptr + cols, mask=mask, other=other).to(tl.float32)
    return x


@triton.jit
def _or_nan(x, cols, best):
    """The columns of NaNs, as they precede all others; elsewhere ``best``."""
    return tl.where(x != x, cols + NAN_COLUMN, best)


@triton.jit
def _finite(peak):
    """The maximum, or the lowest number if it is −inf, from which −inf cannot be subtracted."""
    return tl.maximum(peak, LOWEST)


@triton.jit
def _accumulate(
    x, cols, lane_max, lane_sum, lane_best, ALIGN: tl.constexpr, HAS_CORRECT: tl.constexpr
):
    """Add logits to the maximum of each lane, its first column and the sum of exp(x − maximum).

    A lane has ALIGN neighbours, which one thread reads at once, of each block.
    """
    x = tl.reshape(x, (x.shape[0] // ALIGN, ALIGN))
    peak = tl.maximum(lane_max, tl.max(x, axis=1))
    shift = _finite(peak)
    lane_sum *= tl.exp2((shift - lane_max) * -LOG2E)
    lane_sum += tl.sum(tl.exp2((x - shift[:, None]) * LOG2E), axis=1)
    if HAS_CORRECT:
        cols = tl.reshape(cols, x.shape)
        best = _or_nan(x, cols, tl.where(x == peak[:, None], cols, NO_COLUMN))
        stays = (peak <= lane_max) | (lane_best < NAN_COLUMN // 2)
        lane_best = tl.minimum(tl.where(stays, lane_best, NO_COLUMN), tl.min(best, axis=1))
    return peak, lane_sum, lane_best


@triton.jit
def _over_lanes(lane_max, lane_sum, lane_best, peak):
    """Sum of exp(x − peak) and first column of the peak."""
    total = tl.sum(lane_sum * tl.exp2((lane_max - _finite(peak)) * LOG2E), axis=0)
    candidates = (lane_max == peak) | (lane_best < NAN_COLUMN // 2)
    return total, tl.min(tl.where(candidates, lane_best, NO_COLUMN), axis=0)


@triton.jit
def _store_grad(
    ptr,
    x,
    cols,
    mask,
    lse,
    coefficient,
    uniform,
    hit,
    softcap,
    class_weight_ptr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
):
    """Store p·coefficient − uniform·w − hit, through the cap's derivative."""
    grad = tl.exp2((x - lse) * LOG2E) * coefficient
    if HAS_SMOOTHING:
        grad -= _times_weight(uniform, cols, mask, class_weight_ptr, HAS_CLASS_WEIGHT)
    grad -= hit
    if HAS_SOFTCAP:
        tanh = (x if mask is None else tl.where(mask, x, 0.0)) / softcap
        grad *= 1.0 - tanh * tanh
    tl.store(ptr + cols, grad.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    grad_ptr,
    targets_ptr,
    loss_ptr,
    lse_ptr,
    correct_ptr,
    class_weight_ptr,
    class_weight_sum_ptr,
    token_weight_ptr,
    scale_ptr,
    upstream_ptr,
    n_cols,
    ignore_index,
    stride_logits_row,
    stride_grad_row,
    stride_token_weight,
    stride_upstream,
    label_smoothing,
    z_loss,
    softcap,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    ALIGN: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    COMPUTE_LOSS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    SKIP_UNIT: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_TOKEN_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CORRECT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    upstream = 1.0
    if HAS_UPSTREAM:
        upstream = tl.load(upstream_ptr + row * stride_upstream).to(tl.float32)
        if SKIP_UNIT:  # noqa: SIM102 - one branch is resolved by the compiler
            if upstream == 1.0:
                return
    target = tl.load(targets_ptr + row).to(tl.int64)

    start = row * stride_logits_row
    interior = (start + ALIGN - 1) // ALIGN * ALIGN
    head = (interior - start).to(tl.int32)
    n_interior = tl.maximum(n_cols - head, 0) // ALIGN * ALIGN
    x_ptr = logits_ptr + interior
    g_ptr = grad_ptr + (row * stride_grad_row + ALIGN - 1) // ALIGN * ALIGN
    # Columns count from the interior on: edges are −head…−1, and then n_interior onwards.
    n_blocked = 0
    if not SINGLE_PASS:
        n_blocked = tl.maximum(n_interior - 1, 0) // BLOCK_N * BLOCK_N
    offsets = tl.arange(0, BLOCK_N)
    rest_cols = n_blocked + tl.arange(0, REST)
    rest_mask = rest_cols < n_interior
    edge = tl.arange(0, 2 * ALIGN)
    edge_cols = tl.where(edge < ALIGN, edge - head, n_interior + edge - ALIGN)
    edge_mask = ((edge < ALIGN) & (edge_cols < 0)) | (edge >= ALIGN)
    edge_mask = edge_mask & (edge_cols + head < n_cols)

    if target == ignore_index:
        if COMPUTE_LOSS:
            tl.store(loss_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            if HAS_CORRECT:
                tl.store(correct_ptr + row, 0.0)
        if WRITE_GRAD:
            zero = tl.zeros([1], grad_ptr.dtype.element_ty)
            if not SINGLE_PASS:
                for block in range(0, n_blocked, BLOCK_N):
                    tl.store(g_ptr + block + offsets, tl.broadcast_to(zero, (BLOCK_N,)))
            tl.store(g_ptr + rest_cols, tl.broadcast_to(zero, (REST,)), mask=rest_mask)
            if HAS_EDGES:
                tl.store(g_ptr + edge_cols, tl.broadcast_to(zero, (2 * ALIGN,)), mask=edge_mask)
        return

    in_range = (target >= 0) & (target < n_cols)
    # An out-of-range address must not even be formed.
    hit_col = tl.where(in_range, target, 0).to(tl.int32) - head
    token_weight = 1.0
    if HAS_TOKEN_WEIGHT:
        token_weight = tl.load(token_weight_ptr + row * stride_token_weight).to(tl.float32)
    class_weight_ptr += head
    row_weight = _times_weight(token_weight, hit_col, None, class_weight_ptr, HAS_CLASS_WEIGHT)
    weight_sum = tl.cast(n_cols, tl.float32)
    if HAS_CLASS_WEIGHT:
        weight_sum = tl.load(class_weight_sum_ptr).to(tl.float32)
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    smoothing = tl.cast(label_smoothing, tl.float32)
    uniform = smoothing / n_cols
    softcap = tl.cast(softcap, tl.float32)
    nan = float("nan")

    x_target = _load_logits(x_ptr, hit_col, None, softcap, HAS_SOFTCAP, "")
    if HAS_EDGES:
        x_edge = _load_logits(x_ptr, edge_cols, edge_mask, softcap, HAS_SOFTCAP, "")

    weighted_sum = 0.0
    if COMPUTE_LOSS and not SINGLE_PASS:
        lane_max = tl.full([BLOCK_N // ALIGN], -float("inf"), tl.float32)
        lane_sum = tl.zeros([BLOCK_N // ALIGN], tl.float32)
        lane_best = tl.full([BLOCK_N // ALIGN], NO_COLUMN, tl.int32)
        weighted = tl.zeros([BLOCK_N], tl.float32)
        for block in range(0, n_blocked, BLOCK_N):
            cols = block + offsets
            x = _load_logits(x_ptr, cols, None, softcap, HAS_SOFTCAP, "evict_last")
            lane_max, lane_sum, lane_best = _accumulate(
                x, cols, lane_max, lane_sum, lane_best, ALIGN, HAS_CORRECT
            )
            if HAS_SMOOTHING:
                weighted += _times_weight(x, cols, None, class_weight_ptr, HAS_CLASS_WEIGHT)
        weighted_sum = tl.sum(weighted, axis=0)

    x_rest = _load_logits(x_ptr, rest_cols, rest_mask, softcap, HAS_SOFTCAP, "evict_first")
    if COMPUTE_LOSS:
        rest_max, rest_sum, rest_best = _accumulate(
            x_rest, rest_cols, -float("inf"), 0.0, NO_COLUMN, ALIGN, HAS_CORRECT
        )
        peak = tl.max(rest_max, axis=0)
        if not SINGLE_PASS:
            peak = tl.maximum(peak, tl.max(lane_max, axis=0))
        if HAS_EDGES:
            peak = tl.maximum(peak, tl.max(x_edge, axis=0))
        total, best = _over_lanes(rest_max, rest_sum, rest_best, peak)
        if not SINGLE_PASS:
            more, at = _over_lanes(lane_max, lane_sum, lane_best, peak)
            total, best = total + more, tl.minimum(best, at)
        if HAS_EDGES:
            more, at = _over_lanes(x_edge, 1.0, _or_nan(x_edge, edge_cols, edge_cols), peak)
            total, best = total + more, tl.minimum(best, at)
        if HAS_SMOOTHING:
            part = tl.where(rest_mask, x_rest, 0.0)
            part = _times_weight(part, rest_cols, rest_mask, class_weight_ptr, HAS_CLASS_WEIGHT)
            weighted_sum += tl.sum(part, axis=0)
            if HAS_EDGES:
                part = tl.where(edge_mask, x_edge, 0.0)
                part = _times_weight(part, edge_cols, edge_mask, class_weight_ptr, HAS_CLASS_WEIGHT)
                weighted_sum += tl.sum(part, axis=0)
        lse = peak + tl.log(total)
        # log(sum) − (x_t − max), not lse − x_t: the latter cancels when the loss is small.
        nll = tl.log(total) - (x_target - peak)
        loss = (1.0 - smoothing) * nll
        if HAS_Z_LOSS:
            loss += tl.cast(z_loss, tl.float32) * lse * lse
        loss *= row_weight
        if HAS_SMOOTHING:
            loss += token_weight * uniform * (weight_sum * lse - weighted_sum)
        tl.store(loss_ptr + row, tl.where(in_range, loss * scale, nan))
        # NaN for the gradient, as in torch, where a logit is +∞
        tl.store(lse_ptr + row, tl.where(peak == float("inf"), peak, lse))
        if HAS_CORRECT:
            best = tl.where(best < NAN_COLUMN // 2, best - NAN_COLUMN, best)
            tl.store(correct_ptr + row, (best + head == target).to(tl.float32))
    else:
        lse = tl.load(lse_ptr + row)
        lse = tl.where(lse == float("inf"), nan, lse)

    if WRITE_GRAD:
        scale *= upstream
        coefficient = (1.0 - smoothing) * row_weight
        if HAS_Z_LOSS:
            coefficient += 2.0 * tl.cast(z_loss, tl.float32) * lse * row_weight
        if HAS_SMOOTHING:
            coefficient += token_weight * uniform * weight_sum
        coefficient = tl.where(in_range, coefficient * scale, nan)
        uniform *= token_weight * scale
        hit = (1.0 - smoothing) * row_weight * scale
        if not COMPUTE_LOSS:  # else sums over the row have shown it
            tl.debug_barrier()  # all have read the target and the edges
        _store_grad(
            g_ptr,
            x_rest,
            rest_cols,
            rest_mask,
            lse,
            coefficient,
            uniform,
            0.0,
            softcap,
            class_weight_ptr,
            HAS_SOFTCAP,
            HAS_SMOOTHING,
            HAS_CLASS_WEIGHT,
        )
        if not SINGLE_PASS:
            for block in range(0, n_blocked, BLOCK_N):
                cols = n_blocked - BLOCK_N - block + offsets
                x = _load_logits(x_ptr, cols, None, softcap, HAS_SOFTCAP, "evict_first")
                _store_grad(
                    g_ptr,
                    x,
                    cols,
                    None,
                    lse,
                    coefficient,
                    uniform,
                    0.0,
                    softcap,
                    class_weight_ptr,
                    HAS_SOFTCAP,
                    HAS_SMOOTHING,
                    HAS_CLASS_WEIGHT,
                )
        if HAS_EDGES:
            _store_grad(
                g_ptr,
                x_edge,
                edge_cols,
                edge_mask,
                lse,
                coefficient,
                uniform,
                0.0,
                softcap,
                class_weight_ptr,
                HAS_SOFTCAP,
                HAS_SMOOTHING,
                HAS_CLASS_WEIGHT,
            )
        tl.debug_barrier()  # the target's gradient is stored last
        _store_grad(
            g_ptr,
            x_target,
            hit_col,
            in_range,
            lse,
            coefficient,
            uniform,
            hit,
            softcap,
            class_weight_ptr,
            HAS_SOFTCAP,
            HAS_SMOOTHING,
            HAS_CLASS_WEIGHT,
        )
