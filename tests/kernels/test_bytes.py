"""Counted bytes: what each kernel loads and stores an element, against the floor of its operation.

The kernels run in Triton's interpreter, which sees every address. The bytes of the op's own tensors
must equal the floor exactly, each address counted once; what comes on top is listed in REREAD
(addresses read again, out of the cache) and SIDE (smaller operands), with the reason. No program
touches what another one stores.
"""

import re

import pytest
import torch
from dev.aot.traffic import LaunchTraffic, count_launches, traffic_of
from fasttrain_kernels.catalogue import CASES, Case, floor_bytes

from tests.support.interpreter import no_races

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts in Triton's interpreter, which a GPU run leaves out"
)

# Bytes an element beside the floor that come out of a cache: (kernel, case) → bytes, reason.
REREAD: list[tuple[str, str, float, str]] = [
    ("cross_entropy_kernel", r"bf16 V=(32000|50257|50304|128256)", 2, "blocks, twice, from L2"),
    ("cross_entropy_kernel", r"fp32 V=(32000|50257|50304|128256)", 4, "blocks, twice, from L2"),
    ("cross_entropy_kernel", r"fp32 V=8001 every option", 4, "blocks, twice, from L2"),
    ("_rms_norm_fwd_kernel", r"bf16 D=32768", 2, "rows above 16384 are read twice, from L2"),
    ("_rms_norm_bwd_kernel", r"bf16 D=32768", 4, "x and dy of rows above 8192, twice"),
    ("_rms_norm_bwd_kernel", r"fp32 D=16384", 8, "x and dy of rows above 8192, twice"),
]  # fmt: skip

# Operands smaller than the op's tensor: what they are read or written for. "row", "chunk" and
# "program" cost at most the bytes of MOST for each; "cached" operands are shared by the rows and
# come out of a cache, or (partial sums) grow with the programs, as many as fit on the GPU.
SIDE: dict[str, dict[str, str]] = {
    "cross_entropy_kernel": {
        "targets_ptr": "row",
        "loss_ptr": "row",
        "lse_ptr": "row",
        "correct_ptr": "row",
        "token_weight_ptr": "row",
        "class_weight_sum_ptr": "row",
        "scale_ptr": "row",
        "upstream_ptr": "row",
        "class_weight_ptr": "cached",  # (V,), shared by all rows
    },
    "_scale_kernel": {"factor_ptr": "program"},
    "_rms_norm_fwd_kernel": {"weight_ptr": "cached", "rstd_ptr": "row"},
    "_rms_norm_bwd_kernel": {"weight_ptr": "cached", "rstd_ptr": "row", "partial_ptr": "cached"},
    "_rope_kernel": {"cos_ptr": "cached", "sin_ptr": "cached"},  # shared by the heads of a token
    "adamw_kernel": dict.fromkeys(
        ("pointers_ptr", "lengths_ptr", "chunks_ptr", "coefs_ptr", "found_inf_ptr"), "chunk"
    ),
    "muon_direction_kernel": dict.fromkeys(
        ("pointers_ptr", "chunks_ptr", "clip_ptr", "found_inf_ptr"), "chunk"
    ),
    "muon_apply_kernel": dict.fromkeys(
        ("pointers_ptr", "chunks_ptr", "lr_ptr", "found_inf_ptr"), "chunk"
    ),
    "_sum_squares_kernel": dict.fromkeys(
        ("pointers_ptr", "lengths_ptr", "chunks_ptr", "partial_ptr"), "chunk"
    ),
}
# The most bytes of side operands for a unit: 9 numbers of at most 8 bytes a row (target, loss, lse,
# hit, scale, upstream, weights); a chunk of 8192 elements costs 4 blocks of 9 coefficients, five
# pointers and three table entries.
MOST = {"row": 72, "program": 4, "chunk": 4 * 9 * 4 + 5 * 8 + 24 + 12}

COUNTED = [case for case in CASES if case.elements]


def signature_of(launch: LaunchTraffic) -> dict[str, str]:
    """Return the dtypes of a launch's pointers in Triton's notation."""
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    return {
        name: names[value.dtype]
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor) and value.dtype in names
    }


def check_side_operands(launch: LaunchTraffic, case: Case) -> None:
    n_rows = 16 if "rms_norm" in case.name else 2
    n_programs = launch.arguments["n_elements"] // 4096 + 1 if "_scale" in launch.kernel else 0
    units = {"row": n_rows, "program": n_programs, "chunk": 2 + 4}
    for operand, n_bytes in launch.side.items():
        unit = SIDE[launch.kernel][operand]  # a KeyError is an operand that nothing explains
        if unit != "cached":
            assert n_bytes <= MOST[unit] * units[unit], (launch.kernel, operand, n_bytes)


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_bytes_equal_the_floor(case: Case) -> None:
    with no_races():
        launches = traffic_of(case)
    assert launches, "the call launches no kernel"
    table = []
    for launch in launches:
        floor = floor_bytes(launch.kernel, signature_of(launch), launch.arguments)
        if floor is None:
            continue
        distinct, every = launch.distinct / case.elements, launch.bulk / case.elements
        table.append(f"{launch.kernel:24s} {every:8.3f} {distinct:8.3f} {floor:4d}")
        assert distinct == floor, f"{case.name}: {launch.kernel} moves {distinct}, floor {floor}"
        check_side_operands(launch, case)
        if floor == 0:
            assert every == 0
            continue
        slack = 0.0
        if launch.kernel == "cross_entropy_kernel":
            # Of each row the target's logit is read and its gradient stored once more, and the up
            # to 2 x 15 bytes of its edges are read less often.
            n_cols, block = (launch.arguments[name] for name in ("n_cols", "BLOCK_N"))
            slack = (2 * launch.arguments["logits_ptr"].element_size() + 30) / n_cols
        extra = sum(
            extra for name, pattern, extra, _ in REREAD
            if name == launch.kernel and re.search(pattern, case.name)
        )  # fmt: skip
        if launch.kernel == "cross_entropy_kernel":  # what is left beside the blocks stays on chip
            extra *= (n_cols - 1) // block * block / n_cols
        if not (
            launch.arguments.get("COMPUTE_LOSS", True) and launch.arguments.get("WRITE_GRAD", True)
        ):
            extra = 0.0  # loss or gradient alone takes one pass
        assert abs(every - floor - extra) <= slack, f"{launch.kernel}: {every - floor} read again"
    print("kernel, bytes an element, each address once, floor:", *table, sep="\n")


def test_the_count_sees_what_a_kernel_moves() -> None:
    """The counter itself: a masked, partial second access is counted, and once in `distinct`."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        cols = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n, other=0.0)
        x += tl.load(x_ptr + cols, mask=cols < n // 2, other=0.0)
        tl.store(y_ptr + cols, x, mask=cols < n)

    kernel = triton.runtime.interpreter.InterpretedFunction(kernel.fn)
    x, y = torch.ones(100), torch.empty(100)
    with count_launches(100) as launches:
        kernel[(1,)](x, y, 100, BLOCK=128)
    assert y[:50].eq(2).all()
    assert y[50:].eq(1).all()
    assert (launches[0].bulk, launches[0].distinct) == (400 + 200 + 400, 800)
