"""Every op of the catalogue at many sizes, against fp64 and plain torch in the same dtype.

The error is at most twice that of plain torch in the same dtype, plus 1e-5 (1e-3 in half
precision), relative to the largest value. Optimizers, whose results are rounded once, are held to
twice that rounding.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fasttrain_kernels.catalogue import (
    DTYPES,
    ELEMENTWISE,
    Op,
    adamw,
    apply_rope,
    cross_entropy,
    grad_norm,
    linear_cross_entropy,
    muon,
    results,
    rms_norm,
    symmetric_matmul,
)
from torch import Tensor


def compare(name: str, op: Op, ours: list[Tensor]) -> float:
    """Assert that our results are right; return the largest error as a share of what it may be.

    Rounding to half precision may have little bias. Truncation, which errors of that size may
    hide, has one of half a unit in the last place.
    """
    exact = results(op.reference, op, torch.float64)
    plain = [e.to(o) for e, o in zip(exact, ours, strict=True)]
    plain = plain if op.in_fp64 else results(op.reference, op)
    worst = 0.0
    for i, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.shape == truth.shape, name
        largest = truth.abs().max().clamp_min(1e-30)
        error, allowed = (
            ((x.double() - truth).abs().max() / largest).item() for x in (mine, theirs)
        )
        half = any(x.dtype.itemsize == 2 for x in op.inputs)
        allowed = 2 * allowed + (1e-3 if half else 1e-5)
        assert error <= allowed, f"{name}, result {i}: error {error:.3g} exceeds {allowed:.3g}"
        worst = max(worst, error / allowed)
        normal = truth.abs() >= torch.finfo(mine.dtype).tiny
        if op.rounds_once and mine.dtype.itemsize == 2 and normal.sum() >= 1000:
            rounded, right = mine[normal].double(), truth[normal]
            ulp = torch.finfo(mine.dtype).eps / 2 * right.frexp().exponent.double().exp2()
            away = ((rounded - right) * right.sign() / ulp).clamp(-1, 1).mean().abs().item()
            assert away <= 0.25, f"{name}, result {i}: rounded {away:.2g} units away on average"
    return worst


# (operation, options), of which names are made. These run by default; no block divides their sizes.
SMALL: list[tuple[Callable[..., Op], dict[str, Any]]] = [
    (cross_entropy, {"dtype": "bf16", "n_cols": 50257}),
    (cross_entropy, {"dtype": "bf16", "n_cols": 131, "n_rows": 3}),
    (cross_entropy, {"dtype": "fp32", "n_cols": 4099, "every": True}),
    (linear_cross_entropy, {"dtype": "bf16", "n_cols": 509}),
    (rms_norm, {"dtype": "bf16", "dim": 1000}),
    (rms_norm, {"dtype": "fp32", "dim": 131, "residual": True}),
    *((op, {"dtype": "bf16", "n_cols": 1003}) for op in ELEMENTWISE),
    (apply_rope, {"dtype": "bf16", "head_dim": 64, "n_tokens": 13}),
    (adamw, {"dtype": "fp32", "n": 8197, "scalars": True}),
    (adamw, {"dtype": "bf16", "n": 8200}),
    (muon, {"dtype": "fp32", "rows": 97, "cols": 101, "scalars": True}),
    (muon, {"dtype": "bf16", "rows": 40, "cols": 24}),
    (grad_norm, {"dtype": "bf16", "sizes": (16389, 8195, 1)}),
]
# Those whose kernel is for Hopper. Tiles on the diagonal and below it, some partly or all outside;
# more steps along a row than there are stages.
HOPPER: list[tuple[Callable[..., Op], dict[str, Any]]] = [
    (symmetric_matmul, {"dtype": "bf16", "rows": 392, "cols": 72, "n": 1}),
    (symmetric_matmul, {"dtype": "fp16", "rows": 264, "cols": 264, "add": True}),
]


def _large() -> Iterator[tuple[Callable[..., Op], dict[str, Any]]]:
    for dtype in DTYPES:
        for n_cols in (131, 1000, 8001, 16001, 16384, 32000, 50257, 50304, 70001, 128256):
            yield cross_entropy, {"dtype": dtype, "n_cols": n_cols, "n_rows": 3}
        for n_cols in (131, 8192, 8001, 50257, 128256):
            for reduction in ("mean", "none"):
                options = {"n_cols": n_cols, "every": True, "reduction": reduction}
                yield cross_entropy, {"dtype": dtype, **options}
        for n_cols in (512, 509, 50257):
            yield linear_cross_entropy, {"dtype": dtype, "n_cols": n_cols}
        for dim, residual in itertools.product(
            (1, 64, 128, 131, 768, 1000, 4096, 8192, 16384, 32768), (False, True)
        ):
            yield rms_norm, {"dtype": dtype, "dim": dim, "residual": residual}
        for op, n_cols in itertools.product(ELEMENTWISE, (1, 1003, 2048, 4096)):
            yield op, {"dtype": dtype, "n_cols": n_cols}
        for head_dim in (2, 32, 64, 80, 128):
            yield apply_rope, {"dtype": dtype, "head_dim": head_dim, "n_tokens": 33}
        for n, offset, scalars in ((1, 0, False), (16384, 0, True), (20005, 1, False)):
            yield adamw, {"dtype": dtype, "n": n, "offset": offset, "scalars": scalars}
            yield grad_norm, {"dtype": dtype, "sizes": (n, 8195, 1), "offset": offset}
        for rows, cols, scalars in ((1, 1, False), (33, 20, True), (128, 192, False)):
            yield muon, {"dtype": dtype, "rows": rows, "cols": cols, "scalars": scalars}
    yield adamw, {"dtype": "fp32", "n": 20005, "state_dtype": torch.bfloat16}
    for options in ({"master_weights": True, "state_dtype": torch.float32},
                    {"stochastic_rounding": True}):  # fmt: skip
        yield adamw, {"dtype": "bf16", "n": 20005, **options}


def _name(op: Callable[..., Op], options: dict[str, Any]) -> str:
    words = [f"{key}={value}" for key, value in options.items() if key != "dtype"]
    return " ".join([op.__name__, options["dtype"], *words])


_BY_NAME = {_name(*entry): entry for entry in [*SMALL, *HOPPER, *_large()]}
SMALL_NAMES = [_name(*entry) for entry in SMALL]
HOPPER_NAMES = [_name(*entry) for entry in HOPPER]
LARGE_NAMES = [name for name in _BY_NAME if name not in (*SMALL_NAMES, *HOPPER_NAMES)]


def op_named(name: str) -> Op:
    """Make the inputs of a call, which its name determines."""
    torch.manual_seed(0)
    op, options = _BY_NAME[name]
    return op(**options)
