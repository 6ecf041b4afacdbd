"""Compiled code, executed: the PTX of every kernel runs in an emulator, against fp64.

A process beside this one holds the kernels, decorated for the compiler and compiled for sm_90.
"""

import itertools
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain_kernels.catalogue import ELEMENTWISE

from tests.support.kernel_ops import HOPPER_NAMES, LARGE_NAMES, SMALL_NAMES
from tests.support.ptx import Fault, run_op
from tests.support.ptx_values import decode, encode

OF_ELEMENTWISE = {
    op.__name__: [f"_{op.__name__}_fwd_kernel", f"_{op.__name__}_bwd_kernel"] for op in ELEMENTWISE
}
KERNELS = OF_ELEMENTWISE | {
    "cross_entropy": ["cross_entropy_kernel"],
    "linear_cross_entropy": ["cross_entropy_kernel", "_scale_kernel"],
    "rms_norm": ["_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel", "_sum_partials_kernel"],
    "apply_rope": ["_rope_kernel"],
    "adamw": ["advance_kernel", "adamw_kernel"],
    "muon": ["muon_direction_kernel", "muon_apply_kernel"],
    "grad_norm": ["_sum_squares_kernel", "_finish_kernel"],
    "symmetric_matmul": ["_symmetric_kernel"],
}
BY_TMA = {"_symmetric_kernel"}  # which needs no masks; some barriers are not for the data
NO_BARRIER = {"_scale_kernel", "_rope_kernel", "adamw_kernel"}
NO_BARRIER |= {*KERNELS["muon"], *itertools.chain(*OF_ELEMENTWISE.values())}
NAMES = [*SMALL_NAMES, *HOPPER_NAMES]
FIRST = list({name.split()[0]: name for name in reversed(NAMES)}.values())
# Of every kernel the first operation that launches it.
PLANTED = {kernel: name for name in FIRST for kernel in KERNELS[name.split()[0]]}

Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        yield lambda *arguments: pool.submit(run_op, *arguments).result()


def test_every_kernel_is_among_them() -> None:
    package = Path(__file__).parents[2] / "kernels/fasttrain_kernels"
    source = "\n".join(path.read_text("utf-8") for path in package.glob("*.py"))
    defined = set(re.findall(r"@triton\.jit\s+def (\w+_kernel)\(", source))
    assert set(PLANTED) == defined


@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_agree_with_fp64(run: Run, name: str) -> None:
    assert set(run(name)) == set(KERNELS[name.split()[0]])


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGE_NAMES)
def test_compiled_kernels_agree_with_fp64_at_every_size(run: Run, name: str) -> None:
    assert set(run(name)) <= set(KERNELS[name.split()[0]])


@pytest.mark.parametrize("kernel", sorted(PLANTED.keys() - NO_BARRIER))
def test_removed_barriers_are_found(run: Run, kernel: str) -> None:
    with pytest.raises(Fault, match=f"{kernel}: race"):
        run(PLANTED[kernel], kernel, r"bar\.sync\s+0;")


@pytest.mark.soak
@pytest.mark.parametrize("kernel", sorted(PLANTED.keys() - NO_BARRIER - BY_TMA))
def test_any_removed_barrier_is_found(run: Run, kernel: str) -> None:
    for nth in itertools.count():
        # Atomic groups: where there are no more, no other way to count them is tried.
        pattern = rf"(?s)\A((?>.*?bar\.sync\s+0;){{{nth}}}(?>.*?(?=bar\.sync)))bar\.sync\s+0;"
        try:
            run(PLANTED[kernel], kernel, pattern, r"\1")
        except Fault:
            continue
        except AssertionError as error:
            if "is not there" not in str(error):
                raise
            break
        pytest.fail(f"barrier {nth} of {kernel} may be missing")
    assert nth > 0


@pytest.mark.parametrize("access", ["ld", "st"])
@pytest.mark.parametrize("kernel", sorted(PLANTED.keys() - BY_TMA))
def test_removed_masks_are_found(run: Run, kernel: str, access: str) -> None:
    with pytest.raises(Fault, match=kernel):
        run(PLANTED[kernel], kernel, rf"@!?%p\d+ ({access}\.global)", r"\1")


@pytest.mark.parametrize(
    ("pattern", "to", "error", "message"),
    [
        (r"mbarrier\.try_wait[^;]*;", "mov.pred complete, -1;", AssertionError, "error nan"),
        (r"(expect_tx\S+ _, \S+), 49152", r"\1, 49153", Fault, "does not arrive"),
        (r"(wgmma\.wait_group\S+) 1", r"\1 4", AssertionError, "error"),
        (r"(wgmma\.wait_group\S+) 0", r"\1 1", AssertionError, "error"),
        (r"cp\.async\.bulk\.wait_group(?:\.read)?\s+\d+;", "", AssertionError, "error"),
    ],
)
def test_what_is_not_waited_for_is_found(
    run: Run, pattern: str, to: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(HOPPER_NAMES[-1], "_symmetric_kernel", pattern, to)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_the_emulator_rounds_as_torch_does(kind: str) -> None:
    """Ties, subnormal numbers, infinities and NaN included."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    bits = np.arange(0, 1 << 16, dtype=np.uint32)
    halves = decode(bits.astype(np.uint16), kind)
    assert np.array_equal(
        halves, torch.from_numpy(bits.astype(np.int16)).view(dtype).float().numpy(), equal_nan=True
    )
    between = np.concatenate([bits << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = between.view(np.float32)
    with np.errstate(over="ignore"):
        ours = decode(encode(values, kind), kind)
    wanted = torch.from_numpy(values).to(dtype).float().numpy()
    assert np.array_equal(ours, wanted, equal_nan=True)
