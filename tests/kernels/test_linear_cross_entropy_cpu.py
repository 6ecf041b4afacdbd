"""linear_cross_entropy in C++ against the same in plain torch, and when it is used."""

import importlib
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels import cpu as _cpu
from fasttrain_kernels._loss_options import LossOptions
from fasttrain_kernels.cpu import linear_cross_entropy as in_cpp
from fasttrain_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from torch import Tensor

MODULE = importlib.import_module("fasttrain_kernels.linear_cross_entropy")
PLAIN = LossOptions()
pytestmark = pytest.mark.skipif(not _cpu.is_supported(), reason="needs a known CPU and a compiler")


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Small problems go through C++ too, few columns and many; yields the rows of each call."""
    rows: list[int] = []
    real, before = in_cpp.run_in_cpp, torch.get_num_threads()
    monkeypatch.setattr(in_cpp, "computes_in", lambda _: True)  # bf16 anywhere
    monkeypatch.setattr(in_cpp, "_LEAST", 0)
    monkeypatch.setattr(in_cpp, "_LEAST_OF_FEW", defaultdict(int))
    monkeypatch.setattr(in_cpp, "_FEW", 700)
    monkeypatch.setattr(MODULE, "run_in_cpp", lambda h, *a: rows.append(h.shape[0]) or real(h, *a))
    yield rows
    torch.set_num_threads(before)


def problem(rows: int, dim: int, n_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, dim), torch.randn(n_cols, dim) * 2 / dim**0.5
    return hidden, weight, torch.randint(0, n_cols, (rows,))


def outcome(op: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Any:
    """Outputs and both gradients under an incoming gradient that is not 1."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = op(h, w, targets, return_lse=True, return_accuracy=True, **options)
    grads = torch.autograd.grad(result[0], (h, w), torch.full_like(result[0], 0.7))
    return [x.detach() for x in (*result, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_ignored", [0, 30])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((97, 32, 1333), {"reduction": "mean"}),
        ((1, 16, 770), {"reduction": "sum", "z_loss": 1e-2}),
        ((301, 48, 912), {"reduction": "sum", "z_loss": 1e-2, "softcap": 3.0}),
        ((97, 32, 769), {"reduction": "none", "z_loss": 1e-2}),
        ((90, 16, 784), {"reduction": "mean", "max_chunk_mib": 0.1, "token_weight": None}),
        ((97, 32, 65), {"reduction": "mean", "z_loss": 1e-2}),
        ((1, 16, 3), {"reduction": "sum"}),
        ((301, 272, 65), {"reduction": "none", "softcap": 3.0}),
        ((600, 48, 301), {"reduction": "mean", "max_chunk_mib": 0.1, "token_weight": None}),
    ],
)
def test_agrees_with_fp64(
    runs: list[int],
    shape: tuple[int, int, int],
    options: dict[str, Any],
    n_ignored: int,
    dtype: torch.dtype,
) -> None:
    hidden, weight, targets = problem(*shape)
    hidden, weight = hidden.to(dtype), weight.to(dtype).float()  # bf16 multiplies an fp32 weight
    targets[1 : 1 + n_ignored] = -100
    targets[0] = shape[2] - 1
    hidden = torch.cat((hidden, hidden), 1)[:, : shape[1]]  # rows that lie apart
    if "token_weight" in options:
        options = options | {"token_weight": torch.rand(shape[0])}
    budget = {"max_chunk_mib": 1.0} | options  # so that none is held at once
    ours = outcome(linear_cross_entropy, hidden, weight, targets, **budget)
    assert runs == [shape[0]] * (2 if options["reduction"] == "none" else 1)
    plain = outcome(linear_cross_entropy_reference, hidden, weight, targets, **options)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = outcome(
        linear_cross_entropy_reference, hidden.double(), weight.double(), targets, **wide
    )
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == (dtype if a.shape == hidden.shape else torch.float32)
        bound = 2 * (b.double() - c).abs().max() + 1e-6 * max(1.0, float(c.abs().max()))
        assert (a.double() - c).abs().max() <= bound


@pytest.mark.parametrize("n_cols", [65, 2000])
def test_results_do_not_depend_on_the_number_of_threads(n_cols: int) -> None:
    hidden, weight, targets = problem(300, 32, n_cols)
    results = []
    for n in (1, 2, 3, 1):
        torch.set_num_threads(n)
        results.append(outcome(linear_cross_entropy, hidden, weight, targets, max_chunk_mib=1))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rows", [64, 50])
def test_torchs_own_products_take_turns_with_it(runs: list[int], rows: int) -> None:
    """A thread has one configuration of AMX's tiles: one that torch took away is a SIGILL."""
    hidden, weight, targets = problem(rows, 32, 768)
    operands, a = (hidden.bfloat16(), weight.bfloat16(), targets), torch.randn(100, 72).bfloat16()
    torch.set_num_threads(1)
    made = [(linear_cross_entropy(*operands), a @ a.T) for _ in range(3)]
    assert runs == [rows] * 3
    assert all(torch.equal(x, y) for other in made for x, y in zip(other, made[0], strict=True))


@pytest.mark.parametrize("n_cols", [310, 800])
@pytest.mark.parametrize("first", [math.nan, 1e30, -1e30, 1e-28])
def test_what_is_not_finite_is_as_in_torch(
    monkeypatch: pytest.MonkeyPatch, runs: list[int], first: float, n_cols: int
) -> None:
    """NaN, and logits of +inf, -inf or 100 in one column of one row."""
    hidden, weight, targets = problem(5, 16, n_cols)
    hidden[:, 0], weight[:, 0] = 0, 0
    hidden[2, 0], weight[300, 0] = first, 1e30
    options = {"reduction": "none", "max_chunk_mib": 1.0}
    ours = outcome(linear_cross_entropy, hidden, weight, targets, **options)
    monkeypatch.setattr(in_cpp, "_LEAST", math.inf)
    monkeypatch.setattr(in_cpp, "_LEAST_OF_FEW", defaultdict(lambda: math.inf))
    in_torch = outcome(linear_cross_entropy, hidden, weight, targets, **options)
    assert len(runs) == 2
    torch.testing.assert_close(ours, in_torch, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("n_cols", [300, 800])
def test_the_first_of_equal_logits_counts_as_the_largest(runs: list[int], n_cols: int) -> None:
    hidden, weight = torch.ones(3, 16), torch.zeros(n_cols, 16)
    weight[[5, 250, n_cols - 10]] = 1
    _, n_right = linear_cross_entropy(
        hidden, weight, torch.tensor([5, 250, n_cols - 10]),
        reduction="none", return_accuracy=True, max_chunk_mib=1,
    )  # fmt: skip
    assert n_right.tolist() == [1, 0, 0]
    assert runs == [3]


@pytest.mark.parametrize("n_cols", [65, 800])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_trained_has_a_gradient(
    runs: list[int], needs: tuple[bool, bool], n_cols: int
) -> None:
    hidden, weight, targets = problem(40, 16, n_cols)
    whole = outcome(linear_cross_entropy, hidden, weight, targets)[3:]
    leaves = [x.clone().requires_grad_(n) for x, n in zip((hidden, weight), needs, strict=True)]
    (0.7 * linear_cross_entropy(*leaves, targets)).backward()
    assert len(runs) == 2
    for leaf, need, grad in zip(leaves, needs, whole, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


def test_rows_that_are_ignored_may_hold_anything(runs: list[int]) -> None:
    hidden, weight, targets = problem(40, 16, 65)
    hidden[7], targets[7] = math.nan, -100
    loss, *rest = outcome(linear_cross_entropy, hidden, weight, targets)
    kept = torch.arange(40) != 7
    alone = outcome(linear_cross_entropy, hidden[kept], weight, targets[kept])
    torch.testing.assert_close([loss, rest[-1]], [alone[0], alone[-1]])
    assert rest[0][7] == 0
    assert torch.equal(rest[2][7], torch.zeros(16))
    nothing = outcome(linear_cross_entropy, hidden, weight, torch.full_like(targets, -100))
    assert not any(x.any() for x in nothing)
    assert runs == [40, 39, 40]


@pytest.mark.parametrize("shape", [(4096, 768, 50304), (2048, 256, 4096), (600, 64, 1000)])
@pytest.mark.parametrize("rows", [512, 1024])
@pytest.mark.parametrize("dtype", in_cpp._WIDTH)
def test_it_takes_the_memory_of_a_chunk_of_logits(
    shape: tuple[int, int, int], rows: int, dtype: torch.dtype
) -> None:
    """Besides the packed weight."""
    n, dim, n_cols = shape
    chunk, width, parts = in_cpp._layout(n, dim, n_cols, rows, dtype)
    held = chunk * (8 + -(-n_cols // width) * (width * dtype.itemsize // 2 + 6) + (parts + 3) * dim)
    assert held <= rows * n_cols
    assert (chunk % 16, width % 32, width <= in_cpp._WIDTH[dtype]) == (0, 0, True)
    assert min(parts, chunk / 16) >= 4
    assert in_cpp._layout(n, dim, 65, rows, dtype)[1:] == [96, 1]


@pytest.mark.parametrize(
    ("change", "yes"),
    [
        ({}, True),
        ({"hidden": torch.empty(8, 20), "weight": torch.empty(800, 20)}, False),
        ({"hidden": torch.empty(8, 0), "weight": torch.empty(800, 0)}, False),
        ({"hidden": torch.empty(8, 256), "weight": torch.empty(800, 256)}, False),
        ({"hidden": torch.empty(8, 256), "weight": torch.empty(600, 256)}, True),
        ({"hidden": torch.empty(8, 2048), "weight": torch.empty(600, 2048)}, False),
        ({"weight": torch.empty(16, 800).t()}, False),
        ({"hidden": torch.empty(8, 16, dtype=torch.bfloat16)}, True),
        ({"bias": torch.empty(800)}, False),
        ({"options": PLAIN._replace(label_smoothing=0.1)}, False),
        ({"options": PLAIN._replace(class_weight=torch.empty(800))}, False),
    ],
)
def test_it_is_used_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], yes: bool
) -> None:
    arguments = {"hidden": torch.empty(8, 16), "weight": torch.empty(800, 16), "bias": None}
    arguments |= {"options": PLAIN} | change
    assert in_cpp.fits(**arguments) is yes
    monkeypatch.setattr(in_cpp, "_LEAST", 2**20)
    monkeypatch.setattr(in_cpp, "_LEAST_OF_FEW", {torch.float32: 2**18})
    assert not in_cpp.fits(**arguments)


def test_where_it_cannot_be_built_torch_computes(
    monkeypatch: pytest.MonkeyPatch, runs: list[int], tmp_path: Path
) -> None:
    """A folder that cannot be made stands for all that building needs; found out once."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "under"))
    monkeypatch.setattr(_cpu, "load", _cpu.load.__wrapped__)
    anew = partial(cache(_cpu.load_or_warn.__wrapped__), *in_cpp._library.args)
    monkeypatch.setattr(in_cpp, "_library", anew)
    hidden, weight, targets = problem(40, 16, 800)
    with pytest.warns(UserWarning, match=r"cross_entropy\.cpp .*Not a directory"):
        ours = outcome(linear_cross_entropy, hidden, weight, targets, max_chunk_mib=1)
    expected = outcome(linear_cross_entropy_reference, hidden, weight, targets)
    torch.testing.assert_close(ours, expected)
    linear_cross_entropy(hidden, weight, targets, max_chunk_mib=1)
    assert runs == []


@pytest.mark.parametrize("n_cols", [65, 800])
def test_it_is_differentiable_once(runs: list[int], n_cols: int) -> None:
    """Where the gradient of a gradient is wanted there is an error, not a part of it."""
    hidden, weight, targets = problem(40, 16, n_cols)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, max_chunk_mib=1)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"\bonce\b.*linear_cross_entropy_reference"):
        (loss + gradient.square().sum()).backward()
    assert runs == [40]
    plain = torch.func.grad(lambda h: linear_cross_entropy(h, weight, targets))(hidden.detach())
    torch.testing.assert_close(plain, gradient.detach(), rtol=1e-4, atol=1e-6)
    assert runs == [40]  # a transform goes by torch's operations
