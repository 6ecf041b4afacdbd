"""How the cross-entropy kernel is launched: passes, block and warps for a row width and dtype."""

from torch import Tensor

from .cpu.cross_entropy import LossTerms
from ._cross_entropy_kernels import cross_entropy_kernel
from ._scale import on_device, warp_size
from ._triton import triton

__all__ = ["launch_cross_entropy"]

# The widest row that is kept in registers, by 512 threads: 32 logits each. Options need registers
# too. At 32,768 columns 1024 threads have 64 registers each, which Triton 3.8 (sm_100) and 3.9
# (sm_90 as well) exceed and spill.
SINGLE_PASS_COLS = 16384
SINGLE_PASS_COLS_LEAST = 8192
# Wider rows go through twice, in blocks of 16 logits a thread, or 8 where that would spill. The
# second pass finds the row in L2 if the rows in flight fit there: above this size a row is given
# 1024 threads, one program an SM (132 rows of 256 KiB are 34 MB of an H200's 60 MB), else 512, two
# an SM.
WIDE_ROW_BYTES = 128 * 1024


def _configuration(
    logits: Tensor, has_edges: bool, has_z_loss: bool, has_options: bool
) -> tuple[bool, int, int]:
    """Return whether one pass is enough, the logits of a block, and the warps of a program."""
    n_cols, size = logits.shape[1], logits.element_size()
    # Wavefronts of 64 fill the 1024 threads that a program may have with half as many.
    most_warps = 32 if warp_size(logits) == 32 else 16
    narrow = has_options or (has_edges and size == 4)
    if n_cols <= (SINGLE_PASS_COLS_LEAST if narrow else SINGLE_PASS_COLS):
        block = max(16, triton.next_power_of_2(n_cols))
        return True, block, max(1, min(block // 512, 16))
    if narrow:
        return False, 4096, most_warps // 2
    if n_cols * size > WIDE_ROW_BYTES and not (has_edges or has_z_loss):
        return False, 512 * most_warps, most_warps
    return False, 8192, 16


def launch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    grad: Tensor | None,
    lse: Tensor,
    terms: LossTerms,
    *,
    losses: Tensor | None = None,
    correct: Tensor | None = None,
    class_weight_sum: Tensor | None = None,
    token_weight: Tensor | None = None,
    scale: Tensor | None = None,
    upstream: Tensor | None = None,
    skip_unit: bool = False,
) -> None:
    """Launch one program for each row of ``logits``.

    Args:
        logits: (N, V), rows contiguous; fp16, bf16 or fp32.
        targets: (N,), contiguous integers.
        grad: (N, V), written when given; may be ``logits``. Its row stride and that of ``logits``
            must leave the same remainder modulo 16 bytes.
        lse: (N,) fp32: written together with ``losses``, else read.
        terms: the options of the loss.
        losses: (N,) fp32, written when given.
        correct: (N,) fp32, written when given: 1 where the first largest logit is the target.
        class_weight_sum: (), needed with class weights.
        token_weight: (N,), any stride.
        scale: (), multiplies losses and gradient.
        upstream: (N,) or (), any stride: multiplies the gradient.
        skip_unit: leave rows whose ``upstream`` is 1 alone: their gradient is already in ``grad``.
    """
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    align = 16 // logits.element_size()
    has_edges = n_cols % align != 0 or logits.stride(0) % align != 0
    has_options = (
        terms.class_weight is not None
        or correct is not None
        or any((terms.label_smoothing, terms.softcap))
    )
    single, block, num_warps = _configuration(logits, has_edges, terms.z_loss != 0.0, has_options)
    out = logits if grad is None else grad
    per_row = 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)
    arguments = (
        logits, out, targets, lse if losses is None else losses, lse,
        lse if correct is None else correct,
        lse if terms.class_weight is None else terms.class_weight,
        lse if class_weight_sum is None else class_weight_sum,
        lse if token_weight is None else token_weight,
        lse if scale is None else scale,
        lse if upstream is None else upstream,
        n_cols, terms.ignore_index,
        logits.stride(0), out.stride(0),
        0 if token_weight is None else token_weight.stride(0), per_row,
        terms.label_smoothing, terms.z_loss, terms.softcap,
    )  # fmt: skip

    def launch() -> None:
        cross_entropy_kernel[(n_rows,)](
            *arguments,
            BLOCK_N=block,
            ALIGN=align,
            SINGLE_PASS=single,
            HAS_EDGES=has_edges,
            COMPUTE_LOSS=losses is not None,
            WRITE_GRAD=grad is not None,
            SKIP_UNIT=skip_unit,
            HAS_UPSTREAM=upstream is not None,
            HAS_SCALE=scale is not None,
            HAS_CLASS_WEIGHT=terms.class_weight is not None,
            HAS_TOKEN_WEIGHT=token_weight is not None,
            HAS_SMOOTHING=terms.label_smoothing != 0.0,
            HAS_Z_LOSS=terms.z_loss != 0.0,
            HAS_SOFTCAP=terms.softcap != 0.0,
            HAS_CORRECT=correct is not None,
            num_warps=num_warps,
        )

    on_device(logits, launch)
