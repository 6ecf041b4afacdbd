"""The kernels of `FusedAdamW`: one launch a class of dtypes, whatever the number of tensors.

Bytes moved an element (fp32 everything): 12 for parameter and moments in, 4 for the gradient, 12
out; bound by memory. With a master weight 8 more: it is read and written. The parameter is read
beside it to see whether it still is the master rounded; where it is not, others have changed it
since the last step, and it replaces the master. Before the update a launch of one program a
thousand tensors advances the step counts and turns the groups' hyper-parameters into nine numbers a
tensor. Rounding: once, at the store.
"""

from ._multi_tensor import load_pointer
from ._triton import tl, triton


@triton.jit
def _one_minus_power(log_base, exponent):
    """1 - base**exponent without cancellation: the series of expm1 near zero."""
    x = log_base * exponent
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.25, -series, 1 - tl.exp(x))


@triton.jit
def advance_kernel(
    hyper_ptr,
    lr_pointers_ptr,
    group_ptr,
    step_pointers_ptr,
    coefs_ptr,
    clip_ptr,
    scale_ptr,
    found_inf_ptr,
    n_tensors,
    HYPER: tl.constexpr,
    COEFS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the step of each tensor and write its coefficients; with found_inf, do nothing."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if HAS_FOUND_INF:
        n_tensors = tl.where(tl.load(found_inf_ptr) == 0, n_tensors, 0)
    mask = t < n_tensors
    row = hyper_ptr + tl.load(group_ptr + t, mask=mask, other=0) * HYPER
    group = tl.load(group_ptr + t, mask=mask, other=0)
    lr_address = tl.load(lr_pointers_ptr + group, mask=mask, other=0)
    lr = tl.load(row, mask=mask, other=0.0)
    lr_on_device = lr_address.to(tl.pointer_type(tl.float32))
    lr = tl.where(lr_address != 0, tl.load(lr_on_device, mask=mask & (lr_address != 0)), lr)
    step_ptr = tl.load(step_pointers_ptr + t, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0) + 1
    correction1 = _one_minus_power(tl.load(row + 6, mask=mask, other=-1.0), step)
    correction2 = _one_minus_power(tl.load(row + 7, mask=mask, other=-1.0), step)
    factor = tl.load(row + 9, mask=mask, other=1.0)
    if HAS_CLIP:
        factor = factor * tl.load(clip_ptr)
    if HAS_SCALE:
        factor = factor / tl.load(scale_ptr)
    out = coefs_ptr + t * COEFS
    tl.store(out, 1 - lr * tl.load(row + 1, mask=mask, other=0.0), mask=mask)
    tl.store(out + 1, lr / correction1, mask=mask)
    tl.store(out + 2, tl.rsqrt(correction2), mask=mask)
    for i in tl.static_range(4):  # β₁, 1 - β₁, β₂, 1 - β₂
        tl.store(out + 3 + i, tl.load(row + 2 + i, mask=mask, other=0.0), mask=mask)
    tl.store(out + 7, tl.load(row + 8, mask=mask, other=0.0), mask=mask)
    tl.store(out + 8, factor, mask=mask)
    tl.store(out + 9, step, mask=mask)
    tl.store(step_ptr, step, mask=mask)


@triton.jit
def _load(ptr, mask, MASKED: tl.constexpr):
    # The branch is taken at compile time: a mask, even an all-true one, narrows the accesses.
    value = tl.load(ptr, mask=mask, other=0.0) if MASKED else tl.load(ptr)
    return value.to(tl.float32)


@triton.jit
def _store(ptr, value, mask, seed, eighths, MASKED: tl.constexpr, ROUND: tl.constexpr):
    if ROUND and ptr.dtype.element_ty == tl.bfloat16:
        # A bf16 is the upper half of an fp32: add 16 random bits to the lower half and cut it off.
        # Infinities and NaN have no lower half to spare. One call of Philox, whose 7 rounds pass
        # BigCrush (Salmon et al. 2011), has the bits of 8 neighbours.
        a, b, c, d = tl.randint4x(seed, eighths, 7)
        noise = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32, bitcast=True)
        noise = tl.reshape(tl.join(noise & 0xFFFF, noise >> 16), value.shape)
        bits = value.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        value = tl.where(finite, (bits + noise) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)
    value = value.to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr, value, mask=mask)
    else:
        tl.store(ptr, value)


@triton.jit
def _is_rounded(stored, value, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """Return where ``stored`` is what `_store` makes of ``value``; both are fp32."""
    same = stored == value.to(DTYPE).to(tl.float32)
    if ROUND and tl.bfloat16 == DTYPE:  # either neighbour: less than 2**16 away, as integers
        bits = value.to(tl.uint32, bitcast=True)
        distance = stored.to(tl.uint32, bitcast=True) - bits + 0xFFFF
        same = same | (((bits & 0x7F800000) != 0x7F800000) & (distance <= 0x1FFFE))
    return same


@triton.jit
def _update(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    master_ptr,
    coefs_ptr,
    seed,
    start,
    i,
    length,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Update the block from element i of a chunk on, which begins at ``start``."""
    offsets = i + tl.arange(0, BLOCK)
    mask = offsets < length
    g = _load(g_ptr + offsets, mask, MASKED) * tl.load(coefs_ptr + 8)
    m = _load(m_ptr + offsets, mask, MASKED)
    v = _load(v_ptr + offsets, mask, MASKED)
    p = _load(master_ptr + offsets, mask, MASKED)  # the parameter itself where there is none
    if HAS_MASTER:
        stored = _load(p_ptr + offsets, mask, MASKED)
        p = tl.where(_is_rounded(stored, p, p_ptr.dtype.element_ty, ROUND), p, stored)
    m = tl.load(coefs_ptr + 3) * m + tl.load(coefs_ptr + 4) * g
    v = tl.load(coefs_ptr + 5) * v + tl.load(coefs_ptr + 6) * g * g
    denominator = tl.sqrt(v) * tl.load(coefs_ptr + 2) + tl.load(coefs_ptr + 7)
    p = p * tl.load(coefs_ptr) - tl.load(coefs_ptr + 1) * m / denominator
    eighths = ((start + i) // 8 + tl.arange(0, BLOCK // 8)).to(tl.int32)
    _store(m_ptr + offsets, m, mask, seed, eighths, MASKED, ROUND)
    _store(v_ptr + offsets, v, mask, seed + 1, eighths, MASKED, ROUND)
    if HAS_MASTER:
        _store(master_ptr + offsets, p, mask, seed, eighths, MASKED, False)
    _store(p_ptr + offsets, p, mask, seed + 2, eighths, MASKED, ROUND)


@triton.jit
def adamw_kernel(
    pointers_ptr,
    lengths_ptr,
    chunks_ptr,
    coefs_ptr,
    found_inf_ptr,
    n_tensors,
    n_chunks,
    seed,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    COEFS: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    ROUND: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update every n-th chunk."""
    if HAS_FOUND_INF:  # a loop over no chunks writes nothing
        n_chunks = tl.where(tl.load(found_inf_ptr) == 0, n_chunks, 0)
    for k in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        t = tl.load(chunks_ptr + 2 * k)
        start = tl.load(chunks_ptr + 2 * k + 1).to(tl.int64) * CHUNK
        length = tl.load(lengths_ptr + t)
        coefs = coefs_ptr + t * COEFS
        p_ptr = load_pointer(pointers_ptr, t, P, ALIGNED) + start
        g_ptr = load_pointer(pointers_ptr + n_tensors, t, G, GRAD_ALIGNED) + start
        m_ptr = load_pointer(pointers_ptr + 2 * n_tensors, t, M, ALIGNED) + start
        v_ptr = load_pointer(pointers_ptr + 3 * n_tensors, t, V, ALIGNED) + start
        master_ptr = p_ptr
        if HAS_MASTER:
            master_ptr = load_pointer(pointers_ptr + 4 * n_tensors, t, tl.float32, ALIGNED) + start
        tensor_seed = seed
        if ROUND:
            tensor_seed = seed + (tl.load(coefs + 9).to(tl.int32) * n_tensors + t) * 4
        rest = tl.minimum(length - start, CHUNK).to(tl.int32)
        if rest == CHUNK:  # no mask, so that the accesses are 16 bytes wide
            for i in range(0, CHUNK, BLOCK):
                _update(
                    p_ptr,
                    g_ptr,
                    m_ptr,
                    v_ptr,
                    master_ptr,
                    coefs,
                    tensor_seed,
                    start,
                    i,
                    rest,
                    BLOCK,
                    False,
                    HAS_MASTER,
                    ROUND,
                )
        else:
            for i in range(0, rest, BLOCK):
                _update(
                    p_ptr,
                    g_ptr,
                    m_ptr,
                    v_ptr,
                    master_ptr,
                    coefs,
                    tensor_seed,
                    start,
                    i,
                    rest,
                    BLOCK,
                    True,
                    HAS_MASTER,
                    ROUND,
                )
