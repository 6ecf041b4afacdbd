"""The elementwise work of `Muon`, before and after the products: a launch each a batch of matrices.

Bytes moved an element (fp32 parameters, products in bf16): 14 before (gradient and momentum in,
momentum and direction out) and 10 after; bound by memory. The directions and the changes are
stacked in one tensor, all others are reached through a `TensorTable`: gradients, momenta, weights.
Arithmetic is fp32; each number is rounded once, when it is stored.
"""

from ._multi_tensor import load_pointer
from ._triton import tl, triton


@triton.jit
def muon_direction_kernel(
    pointers_ptr, chunks_ptr, out_ptr, clip_ptr, found_inf_ptr,
    n_tensors, n_chunks, n_elements, blend,
    G: tl.constexpr, M: tl.constexpr, HAS_CLIP: tl.constexpr, HAS_FOUND_INF: tl.constexpr,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m ← m + (1 − μ)(g − m); write m, with Nesterov one step ahead, to the stack."""
    if HAS_FOUND_INF:  # a loop over no chunks writes nothing
        n_chunks = tl.where(tl.load(found_inf_ptr) == 0, n_chunks, 0)
    for k in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        t = tl.load(chunks_ptr + 2 * k).to(tl.int64)
        start = tl.load(chunks_ptr + 2 * k + 1).to(tl.int64) * CHUNK
        g_ptr = load_pointer(pointers_ptr, t, G, ALIGNED)
        m_ptr = load_pointer(pointers_ptr + n_tensors, t, M, ALIGNED)
        for i in range(0, CHUNK, BLOCK):
            offsets = start + i + tl.arange(0, BLOCK)
            mask = offsets < n_elements
            g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32)
            if HAS_CLIP:
                g *= tl.load(clip_ptr)
            m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
            m += blend * (g - m)
            tl.store(m_ptr + offsets, m.to(M), mask=mask)
            if NESTEROV:
                m += blend * (g - m)
            out = t * n_elements + offsets
            tl.store(out_ptr + out, m.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def muon_apply_kernel(
    pointers_ptr, chunks_ptr, change_ptr, lr_ptr, found_inf_ptr,
    n_tensors, n_chunks, n_elements, lr, weight_decay, scale,
    W: tl.constexpr, HAS_LR: tl.constexpr, HAS_FOUND_INF: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w ← (1 − lr·λ) w − lr·scale·change."""
    if HAS_FOUND_INF:
        n_chunks = tl.where(tl.load(found_inf_ptr) == 0, n_chunks, 0)
    if HAS_LR:
        lr = tl.load(lr_ptr).to(tl.float32)
    for k in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        t = tl.load(chunks_ptr + 2 * k).to(tl.int64)
        start = tl.load(chunks_ptr + 2 * k + 1).to(tl.int64) * CHUNK
        w_ptr = load_pointer(pointers_ptr + 2 * n_tensors, t, W, ALIGNED)
        for i in range(0, CHUNK, BLOCK):
            offsets = start + i + tl.arange(0, BLOCK)
            mask = offsets < n_elements
            w = tl.load(w_ptr + offsets, mask=mask).to(tl.float32)
            change = tl.load(change_ptr + t * n_elements + offsets, mask=mask).to(tl.float32)
            w = w * (1 - lr * weight_decay) - change * (lr * scale)
            tl.store(w_ptr + offsets, w.to(W), mask=mask)
