"""Triton kernel of the cross-entropy of a row of logits and its gradient.

One program a row. Rows that fit are held on chip: a logit is read once and its
gradient written once. Longer rows are read twice, the second time from L2, where the first pass
asked for them to stay.

A row of any length starts at any multiple of the element size, and a masked 16-byte access needs a
mask that is constant over 16 bytes. So a row is split into an *interior*, which starts on a 16-byte
boundary and whose length is a multiple of 16 bytes, and the *edges*, the few logits before and
after it, which are handled by one narrow access. This is what keeps V=50257 as fast as V=50304.

All arithmetic is in fp32; the gradient is rounded once, when it is stored. Row offsets are int64.
"""

from ._triton import tl, triton


@triton.jit
def _load_logits(ptr, cols, mask, softcap, HAS_SOFTCAP: tl.constexpr, EVICT: tl.constexpr):
    """Logits in fp32, capped when asked; −inf where the mask is off."""
    x = tl.load(ptr + cols, mask=mask, other=-float("inf"), eviction_policy=EVICT).to(tl.float32)
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(x / softcap))
        tanh = (1.0 - decay) / (1.0 + decay)
        x = tl.where(mask, tl.where(x < 0, -tanh, tanh) * softcap, -float("inf"))
    return x


@triton.jit
def _store_grad(
    ptr, x, cols, mask, target, lse, coefficient, uniform, hit, softcap, class_weight_ptr, col0,
    HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Store p·coefficient − uniform·w − hit·onehot(target), through the cap's derivative."""
    grad = tl.exp(x - lse) * coefficient
    if HAS_SMOOTHING:
        if HAS_CLASS_WEIGHT:
            w = tl.load(class_weight_ptr + col0 + cols, mask=mask, other=0.0).to(tl.float32)
            grad -= uniform * w
        else:
            grad -= uniform
    grad = tl.where(col0 + cols == target, grad - hit, grad)
    if HAS_SOFTCAP:
        tanh = tl.where(mask, x, 0.0) / softcap
        grad *= 1.0 - tanh * tanh
    tl.store(ptr + cols, grad.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, grad_ptr, targets_ptr, loss_ptr, lse_ptr, correct_ptr, class_weight_ptr,
    class_weight_sum_ptr, token_weight_ptr, scale_ptr, upstream_ptr,
    n_cols, ignore_index, stride_logits_row, stride_grad_row, stride_token_weight,
    stride_upstream, label_smoothing, z_loss, softcap,
    BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, SINGLE_PASS: tl.constexpr,
    HAS_EDGES: tl.constexpr, COMPUTE_LOSS: tl.constexpr, WRITE_GRAD: tl.constexpr,
    SKIP_UNIT: tl.constexpr, HAS_UPSTREAM: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_TOKEN_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_CORRECT: tl.constexpr,
):  # fmt: skip
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
    offsets = tl.arange(0, BLOCK_N)
    # Edge columns are relative to the interior as well: −head…−1, then n_interior onwards.
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
            for block in range(0, n_interior, BLOCK_N):
                zeros = tl.zeros([BLOCK_N], grad_ptr.dtype.element_ty)
                tl.store(g_ptr + block + offsets, zeros, mask=block + offsets < n_interior)
            if HAS_EDGES:
                zeros = tl.zeros([2 * ALIGN], grad_ptr.dtype.element_ty)
                tl.store(g_ptr + edge_cols, zeros, mask=edge_mask)
        return

    in_range = (target >= 0) & (target < n_cols)
    # A 1-element mask would be enough, but an out-of-range address must not even be formed.
    safe_target = tl.where(in_range, target, 0)
    token_weight = 1.0
    if HAS_TOKEN_WEIGHT:
        token_weight = tl.load(token_weight_ptr + row * stride_token_weight).to(tl.float32)
    row_weight = token_weight
    weight_sum = tl.cast(n_cols, tl.float32)
    if HAS_CLASS_WEIGHT:
        row_weight *= tl.load(class_weight_ptr + safe_target).to(tl.float32)
        weight_sum = tl.load(class_weight_sum_ptr).to(tl.float32)
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    smoothing = tl.cast(label_smoothing, tl.float32)
    uniform = smoothing / n_cols
    softcap = tl.cast(softcap, tl.float32)
    nan = float("nan")

    if SINGLE_PASS:
        x = _load_logits(x_ptr, offsets, offsets < n_interior, softcap, HAS_SOFTCAP, "evict_first")
    if HAS_EDGES:
        x_edge = _load_logits(x_ptr, edge_cols, edge_mask, softcap, HAS_SOFTCAP, "")

    if COMPUTE_LOSS:
        x_target = _load_logits(
            logits_ptr + start, safe_target, safe_target < n_cols, softcap, HAS_SOFTCAP, ""
        )
        weighted_sum = 0.0
        if SINGLE_PASS:
            peak = tl.max(x, axis=0)
            if HAS_EDGES:
                peak = tl.maximum(peak, tl.max(x_edge, axis=0))
            total = tl.sum(tl.exp(x - peak), axis=0)
            if HAS_CORRECT:
                best = tl.min(tl.where(x == peak, offsets + head, n_cols), axis=0)
            if HAS_SMOOTHING:
                weights = tl.full([BLOCK_N], 1.0, tl.float32)
                if HAS_CLASS_WEIGHT:
                    weights = tl.load(
                        class_weight_ptr + head + offsets, mask=offsets < n_interior, other=0.0
                    ).to(tl.float32)
                weighted_sum = tl.sum(tl.where(offsets < n_interior, x, 0.0) * weights, axis=0)
        else:
            # Each lane keeps its own maximum and sum, so that a block costs one exponential a
            # logit and no reduction across the program.
            lane_max = tl.full([BLOCK_N], -3.0e38, tl.float32)
            lane_sum = tl.zeros([BLOCK_N], tl.float32)
            lane_best = tl.full([BLOCK_N], 2147483647, tl.int32)
            lane_weighted = tl.zeros([BLOCK_N], tl.float32)
            for block in range(0, n_interior, BLOCK_N):
                cols = block + offsets
                mask = cols < n_interior
                x = _load_logits(x_ptr, cols, mask, softcap, HAS_SOFTCAP, "evict_last")
                delta = x - lane_max
                decay = tl.exp(-tl.abs(delta))
                lane_sum = tl.where(delta > 0, lane_sum * decay + 1.0, lane_sum + decay)
                if HAS_CORRECT:
                    lane_best = tl.where(delta > 0, cols + head, lane_best)
                lane_max = tl.maximum(lane_max, x)
                if HAS_SMOOTHING:
                    if HAS_CLASS_WEIGHT:
                        weights = tl.load(class_weight_ptr + head + cols, mask=mask, other=0.0)
                        lane_weighted += tl.where(mask, x, 0.0) * weights.to(tl.float32)
                    else:
                        lane_weighted += tl.where(mask, x, 0.0)
            peak = tl.max(lane_max, axis=0)
            if HAS_EDGES:
                peak = tl.maximum(peak, tl.max(x_edge, axis=0))
            total = tl.sum(lane_sum * tl.exp(lane_max - peak), axis=0)
            if HAS_CORRECT:
                best = tl.min(tl.where(lane_max == peak, lane_best, n_cols), axis=0)
            if HAS_SMOOTHING:
                weighted_sum = tl.sum(lane_weighted, axis=0)
        if HAS_EDGES:
            total += tl.sum(tl.exp(x_edge - peak), axis=0)
            if HAS_CORRECT:
                edge_best = tl.min(tl.where(x_edge == peak, edge_cols + head, n_cols), axis=0)
                best = tl.minimum(best, edge_best)
            if HAS_SMOOTHING:
                edge_weights = tl.full([2 * ALIGN], 1.0, tl.float32)
                if HAS_CLASS_WEIGHT:
                    edge_weights = tl.load(
                        class_weight_ptr + head + edge_cols, mask=edge_mask, other=0.0
                    ).to(tl.float32)
                weighted_sum += tl.sum(tl.where(edge_mask, x_edge, 0.0) * edge_weights, axis=0)
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
        tl.store(lse_ptr + row, lse)
        if HAS_CORRECT:
            tl.store(correct_ptr + row, (best == target).to(tl.float32))
    else:
        lse = tl.load(lse_ptr + row)

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
        column = tl.where(in_range, target, -1).to(tl.int32)
        if SINGLE_PASS:
            _store_grad(
                g_ptr, x, offsets, offsets < n_interior, column, lse, coefficient, uniform, hit,
                softcap, class_weight_ptr, head, HAS_SOFTCAP, HAS_SMOOTHING, HAS_CLASS_WEIGHT,
            )  # fmt: skip
        else:
            for block in range(0, n_interior, BLOCK_N):
                cols = block + offsets
                mask = cols < n_interior
                x = _load_logits(x_ptr, cols, mask, softcap, HAS_SOFTCAP, "evict_first")
                _store_grad(
                    g_ptr, x, cols, mask, column, lse, coefficient, uniform, hit, softcap,
                    class_weight_ptr, head, HAS_SOFTCAP, HAS_SMOOTHING, HAS_CLASS_WEIGHT,
                )  # fmt: skip
        if HAS_EDGES:
            _store_grad(
                g_ptr, x_edge, edge_cols, edge_mask, column, lse, coefficient, uniform, hit,
                softcap, class_weight_ptr, head, HAS_SOFTCAP, HAS_SMOOTHING, HAS_CLASS_WEIGHT,
            )  # fmt: skip
