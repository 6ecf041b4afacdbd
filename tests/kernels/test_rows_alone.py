"""A row of a loss depends on that row alone, whatever NaN, infinities and sizes the others hold.

Rows of all kinds lie beside each other, in any order. What each of them yields is compared with
what plain torch makes of that row alone in fp64.
"""

import importlib
import math
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import cpu as _cpu
from fasttrain_kernels import triton_on_cpu
from fasttrain_kernels.cpu import linear_cross_entropy as in_cpp
from fasttrain_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from fasttrain_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

LINEAR = importlib.import_module("fasttrain_kernels.linear_cross_entropy")
IGNORED = -100
if not torch.cuda.is_available():
    # Triton imports this at the first launch, and then it must be told to interpret.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.experimental.gluon")

# Triton's interpreter computes with NumPy, which warns where a GPU's arithmetic goes on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning"),
]

OPTIONS = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "softcap": st.sampled_from([None, 5.0]),
        "class_weight": st.booleans(),
        "token_weight": st.booleans(),
        "scale": st.sampled_from([None, 0.37]),
        "reduction": st.sampled_from(["none", "sum", "mean"]),
    }
)
SEEDS = st.integers(0, 2**20)
ERRORS = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Row(NamedTuple):
    """What plain torch makes of one row in fp64."""

    loss: Tensor
    lse: Tensor
    correct: Tensor
    grads: tuple[Tensor, ...]  # of the leaves


def alone(
    logits: Tensor, target: int, leaves: tuple[Tensor, ...], token_weight: float, options: Any
) -> Row:
    """Compute one row, (V,), whose weights are constants."""
    if target == IGNORED:
        zero = torch.zeros((), dtype=torch.float64)
        return Row(zero, zero, zero, tuple(torch.zeros_like(leaf) for leaf in leaves))
    softcap, class_weight = options["softcap"], options["class_weight"]
    x = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    t = torch.tensor(target)
    loss = F.cross_entropy(
        x, t, class_weight, reduction="sum", label_smoothing=options["label_smoothing"]
    )
    lse = torch.logsumexp(x, 0)
    if options["z_loss"]:
        own_weight = 1.0 if class_weight is None else class_weight[target]
        loss = loss + own_weight * options["z_loss"] * lse.square()
    loss = loss * token_weight
    if options["scale"] is not None:
        loss = loss * options["scale"].double()
    grads = torch.autograd.grad(loss, leaves)
    return Row(loss.detach(), lse.detach(), (x.argmax() == target).double(), grads)


def drawn_weights(options: dict[str, Any], targets: Tensor, n_cols: int) -> dict[str, Any]:
    """Return the options with weights; those of ignored rows are not finite."""
    dtype, n_rows = torch.float32, targets.shape[0]
    made = dict(options)
    weight = torch.rand(n_cols, dtype=dtype) + 0.5
    made["class_weight"] = weight if options["class_weight"] else None
    weight = torch.rand(n_rows, dtype=dtype) + 0.5
    weight[targets == IGNORED] = torch.tensor([math.nan, math.inf]).repeat(n_rows)[
        : int((targets == IGNORED).sum())
    ]
    made["token_weight"] = weight if options["token_weight"] else None
    made["scale"] = None if options["scale"] is None else torch.tensor(options["scale"])
    return made


def exact(options: dict[str, Any]) -> dict[str, Any]:
    weight = options["class_weight"]
    return options | {"class_weight": None if weight is None else weight.double()}


def mean_factor(options: dict[str, Any], targets: Tensor) -> float:
    """Return what a mean multiplies the sum by."""
    counted = targets != IGNORED
    weight = torch.ones(int(counted.sum()), dtype=torch.float64)
    if options["class_weight"] is not None:
        weight = weight * options["class_weight"].double()[targets[counted]]
    if options["token_weight"] is not None:
        weight = weight * options["token_weight"].double()[counted]
    return 1 / float(weight.sum())


def close(name: str, ours: Tensor, right: Tensor, error: float, size: Tensor | float = 0.0) -> None:
    """Compare what is finite within an error of the largest number, and the rest exactly."""
    right = right.to(torch.float32).double() if ours.dtype != torch.float64 else right
    if ours.dtype == torch.float16:
        right = right.half().double()
    ours = ours.detach().double()
    assert ours.shape == right.shape
    finite = right.isfinite()
    torch.testing.assert_close(
        ours[~finite], right[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )
    bound = error * (1 + right.abs() + size)
    wrong = ~((ours - right).abs() <= bound) & finite
    assert not wrong.any(), (name, ours[wrong][:4], right[wrong][:4])


def kinds_of_logits(n_cols: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, int]]:
    """Return a row, (V,), and its target for each kind."""
    inf, nan, last = math.inf, math.nan, n_cols - 1
    large = 3e4 if dtype == torch.float16 else 1e30

    def row(*changes: tuple[Any, float]) -> Tensor:
        x = torch.randn(n_cols, dtype=torch.float64)
        for columns, value in changes:
            x[columns] = value
        return x

    return {
        "ordinary": (row(), 3),
        "ordinary, last": (row(), last),
        "ignored": (row(), IGNORED),
        "ignored NaN": (row((slice(None), nan)), IGNORED),
        "ignored inf": (row((2, inf), (5, -inf)), IGNORED),
        "ignored huge": (row((slice(None), large)), IGNORED),
        "NaN": (row((4, nan)), 3),
        "NaN, at the target": (row((4, nan)), 4),
        "two NaN": (row((last, nan), (7, nan)), 7),
        "all NaN": (row((slice(None), nan)), 0),
        "+inf": (row((6, inf)), 1),
        "+inf, at the target": (row((6, inf)), 6),
        "-inf elsewhere": (row((slice(8, None), -inf)), 2),
        "-inf at the target": (row((2, -inf)), 2),
        "all -inf": (row((slice(None), -inf)), 0),
        "huge": (row((slice(None), large / 2), (1, large), (slice(4, None), -large)), 9),
        "underflow": (row((5, -150.0)), 5),
        "far below": (row((5, -large)), 5),
        "equal": (row((slice(None), 2.0)), 0),
    }


def check_logits(
    function: Any, dtype: torch.dtype, n_cols: int, seed: int, options: Any, **more: Any
) -> None:
    torch.manual_seed(seed)
    smooth = options["label_smoothing"] > 0
    kinds = kinds_of_logits(n_cols, dtype)
    names = [list(kinds)[i] for i in torch.randperm(len(kinds))]
    x = torch.stack([kinds[name][0] for name in names]).to(dtype)
    targets = torch.tensor([kinds[name][1] for name in names])
    options = drawn_weights(options, targets, n_cols)
    leaf = x.clone().requires_grad_()
    loss, lse, correct = function(
        leaf * 1, targets, return_lse=True, return_accuracy=True, **options, **more
    )
    upstream = torch.ones_like(loss)
    if options["reduction"] == "none":
        upstream = torch.rand_like(loss) + 0.5
        upstream[targets == IGNORED] = math.nan
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    factor = mean_factor(options, targets) if options["reduction"] == "mean" else 1.0
    for i, name in enumerate(names):
        own = x[i].double().requires_grad_()
        token_weight = 1.0 if options["token_weight"] is None else float(options["token_weight"][i])
        right = alone(own, int(targets[i]), (own,), token_weight, exact(options))
        up = upstream[i].double() if options["reduction"] == "none" else factor
        up = 0.0 if targets[i] == IGNORED else up
        finite = own.detach()[own.detach().isfinite()].abs()
        # a sum of V logits, of both signs, has an error of the largest
        size = n_cols * float(finite.max()) if smooth and finite.numel() else 0.0
        exactness = ERRORS[torch.float32 if dtype != torch.float64 else dtype]
        if options["reduction"] == "none":
            close(f"loss, {name}", loss[i], right.loss, exactness, size)
            close(f"accuracy, {name}", correct[i], right.correct, 0.0)
        close(f"lse, {name}", lse[i], right.lse, exactness)
        close(f"gradient, {name}", grad[i], right.grads[0] * up, ERRORS[dtype])


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(list(ERRORS)), n_cols=st.sampled_from([11, 131, 700]), seed=SEEDS,
    options=OPTIONS, inplace=st.booleans(),
)  # fmt: skip
def test_R37_a_row_of_logits_in_torch(dtype, n_cols, seed, options, inplace) -> None:
    check_logits(cross_entropy, dtype, n_cols, seed, options, inplace=inplace)


@settings(max_examples=6)
@given(dtype=st.sampled_from(list(ERRORS)), seed=SEEDS, options=OPTIONS)
def test_R37_a_row_of_logits_in_the_reference(dtype, seed, options) -> None:
    check_logits(cross_entropy_reference, dtype, 37, seed, options)


@settings(max_examples=6)
@given(
    dtype=st.sampled_from(list(ERRORS)), n_cols=st.sampled_from([11, 131, 8300]), seed=SEEDS,
    options=OPTIONS, inplace=st.booleans(),
)  # fmt: skip
def test_R37_a_row_of_logits_in_triton(dtype, n_cols, seed, options, inplace) -> None:
    with triton_on_cpu():
        check_logits(cross_entropy, dtype, n_cols, seed, options, inplace=inplace)


def kinds_of_hidden(dim: int, n_cols: int, poison: bool) -> dict[str, tuple[Tensor, int]]:
    """Return a hidden state, (D,), and its target for each kind; ``poison``: some count as NaN."""
    inf, nan = math.inf, math.nan

    def row(size: float = 1.0, **first: float) -> Tensor:
        x = torch.randn(dim) * size
        for value in first.values():
            x[0] = value
        return x

    kinds = {
        "ordinary": (row(), 3),
        "ordinary, last": (row(), n_cols - 1),
        "ignored": (row(), IGNORED),
        "ignored NaN": (row() * nan, IGNORED),
        "ignored inf": (row(first=inf), IGNORED),
        "ignored -inf": (row(first=-inf), IGNORED),
        "ignored huge": (row(6e4 / 4), IGNORED),
        "underflow": (row(200.0), 5),
        "far": (row(200.0), 6),
        "equal": (torch.zeros(dim), 7),
    }
    if poison:
        kinds |= {"NaN": (row() * nan, 3), "a NaN": (row(first=nan), 4), "inf": (row(first=inf), 9)}
    return kinds


def check_hidden(
    function: Any, dtype: torch.dtype, n_cols: int, seed: int, options: Any, poison: bool,
    bias: bool, dim: int = 16, **more: Any,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kinds = kinds_of_hidden(dim, n_cols, poison)
    if bias:  # ∞ − ∞ beside ∞ among its logits: lse is NaN in torch and ∞ in Triton
        kinds.pop("inf", None)
    names = [list(kinds)[i] for i in torch.randperm(len(kinds))]
    h = torch.stack([kinds[name][0] for name in names]).to(dtype)
    targets = torch.tensor([kinds[name][1] for name in names])
    w = (torch.randn(n_cols, dim) / dim**0.5).to(dtype)
    b = torch.randn(n_cols).to(dtype) if bias else None
    if b is not None:
        b[[2, 5]] = -math.inf  # no row's target, and one's
    options = drawn_weights(options, targets, n_cols)
    leaves = tuple(x.clone().requires_grad_() for x in (h, w, b) if x is not None)
    loss, lse, _ = function(
        *leaves[:2], targets, bias=leaves[2] if bias else None, return_lse=True,
        return_accuracy=True, **options, **more,
    )  # fmt: skip
    upstream = torch.ones_like(loss)
    if options["reduction"] == "none":
        upstream = torch.rand_like(loss) + 0.5
        upstream[targets == IGNORED] = math.nan
    grads = torch.autograd.grad(loss, leaves, upstream)
    factor = mean_factor(options, targets) if options["reduction"] == "mean" else 1.0
    totals = [torch.zeros(x.shape, dtype=torch.float64) for x in leaves[1:]]
    # Products in half precision round the logits.
    error = ERRORS[dtype] * (1 if dtype.itemsize > 2 else 2)
    for i, name in enumerate(names):
        own = tuple(x.double().requires_grad_() for x in (h[i], w, b) if x is not None)
        logits = F.linear(own[0], *own[1:])
        token_weight = 1.0 if options["token_weight"] is None else float(options["token_weight"][i])
        right = alone(logits, int(targets[i]), own, token_weight, exact(options))
        up = upstream[i].double() if options["reduction"] == "none" else factor
        up = 0.0 if targets[i] == IGNORED else up
        # a few logits of hundreds may round to others
        known = dtype.itemsize > 2 or name not in ("underflow", "far")
        largest = logits.detach().abs().nan_to_num(0.0, 0.0).max()
        size = float(largest) if known else 1e4
        if options["reduction"] == "none":
            close(f"loss, {name}", loss[i], right.loss, error, size)
        close(f"lse, {name}", lse[i], right.lse, error, size)
        close(f"gradient, {name}", grads[0][i], right.grads[0] * up, error * (1 if known else 100))
        totals = [total + own * up for total, own in zip(totals, right.grads[1:], strict=True)]
    for total, grad in zip(totals, grads[1:], strict=True):
        largest = float(total.abs().nan_to_num(0.0, 0.0).max())
        close("gradient of a leaf", grad, total, error if dtype.itemsize > 2 else 1.0, largest)


PATHS = {
    "torch": {},
    "chunks": {"max_chunk_mib": 4e-4},
}
HIDDEN = {
    "dtype": st.sampled_from(list(ERRORS)),
    "n_cols": st.sampled_from([11, 131]),
    "seed": SEEDS,
    "options": OPTIONS,
    "poison": st.booleans(),
    "bias": st.booleans(),
}


@pytest.mark.parametrize("path", list(PATHS))
@settings(max_examples=25)
@given(**HIDDEN)
def test_R37_a_hidden_row_in_torch(path, dtype, n_cols, seed, options, poison, bias) -> None:
    check_hidden(linear_cross_entropy, dtype, n_cols, seed, options, poison, bias, **PATHS[path])


@settings(max_examples=6)
@given(**HIDDEN)
def test_R37_a_hidden_row_in_the_reference(dtype, n_cols, seed, options, poison, bias) -> None:
    check_hidden(linear_cross_entropy_reference, dtype, n_cols, seed, options, poison, bias)


@pytest.mark.parametrize("path", list(PATHS))
@settings(max_examples=6)
@given(**HIDDEN)
def test_R37_a_hidden_row_in_triton(path, dtype, n_cols, seed, options, poison, bias) -> None:
    with triton_on_cpu():
        check_hidden(
            linear_cross_entropy, dtype, n_cols, seed, options, poison, bias, **PATHS[path]
        )


@pytest.mark.skipif(not _cpu.is_supported(), reason="needs a known CPU and a compiler")
@settings(max_examples=6)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), n_cols=st.sampled_from([131, 1100]),
    seed=SEEDS, options=OPTIONS, poison=st.booleans(),
)  # fmt: skip
def test_R37_a_hidden_row_in_cpp(monkeypatch, dtype, n_cols, seed, options, poison) -> None:
    monkeypatch.setattr(in_cpp, "computes_in", lambda _: True)  # bf16 anywhere
    monkeypatch.setattr(in_cpp, "_LEAST", 0)
    monkeypatch.setattr(in_cpp, "_LEAST_OF_FEW", defaultdict(int))
    plain = options | {"label_smoothing": 0.0, "class_weight": False}
    more = {"max_chunk_mib": 1.0}
    check_hidden(linear_cross_entropy, dtype, n_cols, seed, plain, poison, False, **more)


@pytest.mark.parametrize("mib", [None, 4e-4], ids=["small", "chunks"])
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_R37_a_hidden_row_compiled(mib, poison, reduction) -> None:
    options = {
        "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": None, "class_weight": True,
        "token_weight": True, "scale": 0.37, "reduction": reduction,
    }  # fmt: skip
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager")
    check_hidden(compiled, torch.float32, 37, 0, options, poison, True, max_chunk_mib=mib)
    torch.compiler.reset()
    if mib is None:
        compiled = torch.compile(cross_entropy, backend="aot_eager")
        check_logits(compiled, torch.float32, 37, 0, options)


def test_R37_a_class_that_is_ignored_adds_nothing() -> None:
    """An ignored class in range, which is no target of any other row."""
    h, w = torch.randn(4, 8), torch.randn(11, 8, requires_grad=True)
    h[1] = math.nan
    loss, hits = linear_cross_entropy(
        h, w, torch.tensor([3, 0, 4, 5]), ignore_index=0, reduction="sum", return_accuracy=True
    )
    plain = linear_cross_entropy(h, w, torch.tensor([3, 0, 4, 5]), ignore_index=0, reduction="sum")
    for value in (loss, plain):
        (grad,) = torch.autograd.grad(value, w)
        assert grad.isfinite().all()
    logits = torch.zeros(2, 5)
    _, hits = cross_entropy(
        logits, torch.tensor([0, 0]), ignore_index=0, reduction="sum", return_accuracy=True
    )
    assert hits == 0
