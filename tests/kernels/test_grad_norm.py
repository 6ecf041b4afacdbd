"""grad_norm and clip_grad_norm_ against fp64, torch's clipping, and the traps of norms."""

import importlib
import math

import fasttrain_kernels
import pytest
import torch
from fasttrain_kernels.grad_norm import clip_grad_norm_, grad_norm, grad_norm_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

MODULE = importlib.import_module("fasttrain_kernels.grad_norm")
SHAPES = [(33, 20), (0,), (8192,), (8192 * 2 + 5,), (7,), ()]


@pytest.fixture(params=["cpu", "cpp", "triton"])
def path(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs in torch and in C++ on the CPU, and on the Triton path."""
    if request.param != "cpu":
        return request.getfixturevalue(f"{request.param}_device")
    return torch.device("cpu")


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES]


def assert_matches(tensors: list[Tensor], max_norm: float) -> None:
    actual = grad_norm(tensors, max_norm)
    expected = grad_norm_reference(tensors, max_norm)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == ()
        assert abs(a.item() - e.item()) <= 2e-6 * abs(e.item()) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_fp64(path: torch.device, dtype: torch.dtype) -> None:
    assert_matches(make(path, dtype), 1.0)
    assert_matches(make(path, dtype), 1e6)  # coefficient 1


def test_mixed_dtypes_strides_and_alignment(path: torch.device) -> None:
    tensors = make(path) + make(path, torch.float16)
    tensors += [
        torch.randn(50, 6, device=path)[:, 1:4],
        torch.randn(6, 50, device=path).t(),
        torch.randn(4, device=path).expand(3, 4),
        torch.randn(100, device=path)[1:],
    ]
    assert_matches(tensors, 2.0)


def test_equal_sizes_of_other_alignment(path: torch.device) -> None:
    """Launched apart, they must not share a table of addresses."""
    assert_matches([torch.full((100,), 2.0, device=path), torch.ones(101, device=path)[1:]], 1.0)


@settings(max_examples=20)
@given(
    numels=st.lists(st.integers(0, 20_000), min_size=1, max_size=5),
    exponent=st.integers(-12, 12),
    triton=st.booleans(),
)
def test_any_sizes_and_magnitudes(numels: list[int], exponent: int, triton: bool) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    tensors = [torch.randn(n, device=device) * 10.0**exponent for n in numels]
    if triton and not cuda:
        with fasttrain_kernels.triton_on_cpu():
            assert_matches(tensors, 1.0)
    else:
        assert_matches(tensors, 1.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 8191, 8192 * 2 + 4])
def test_one_bad_element_is_found(path: torch.device, value: float, where: int) -> None:
    tensors = make(path)
    assert grad_norm(tensors).found_inf.item() == 0
    tensors[3][where] = value
    result = grad_norm(tensors, 1.0)
    assert result.found_inf.item() == 1
    assert not math.isfinite(result.norm.item())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter
def test_overflowing_sum_counts_as_not_finite(path: torch.device) -> None:
    for tensors in ([torch.full((4,), 3e38)], [torch.full((1,), 1.5e19)] * 2):
        result = grad_norm([t.to(path) for t in tensors], 1.0)
        assert result.found_inf.item() == 1


def test_nothing_to_sum(path: torch.device) -> None:
    for tensors in ([], [torch.empty(0, device=path)], [torch.zeros(5, device=path)]):
        result = grad_norm(tensors, 1.0)
        assert [t.item() for t in result] == [0.0, 0.0, 1.0]


def test_what_has_no_gradient_is_left_out(path: torch.device) -> None:
    grad = torch.full((9,), 2.0, device=path)
    for norm in (grad_norm, grad_norm_reference):
        assert norm([None, grad, None]).norm.item() == 6.0
        assert [t.item() for t in norm([None], 1.0)] == [0.0, 0.0, 1.0]
    parameter = torch.zeros(9, device=path, requires_grad=True)
    parameter.grad = grad
    unused = torch.zeros(3, device=path, requires_grad=True)
    assert clip_grad_norm_([None, parameter, unused], 3.0).item() == 6.0
    assert grad.norm().item() == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("cpp", [False, True])
def test_large_sums_keep_their_digits(
    cpp: bool, cpp_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cpp:
        monkeypatch.setattr(MODULE, "fits", lambda _: False)
    tensor = torch.full((1 << 22,), 1e-3)
    tensor[0] = 1.0
    exact = math.sqrt(1 + ((1 << 22) - 1) * float(tensor[1]) ** 2)
    error = abs(grad_norm([tensor]).norm.item() / exact - 1)
    # Equal elements are the worst case: all roundings go the same way.
    assert error < (1e-7 if cpp else 4e-5)
    assert error <= 2 * abs(tensor.norm().item() / exact - 1) + 1e-6


def test_a_penalty_of_the_norm_has_a_gradient(cpp_device: torch.device) -> None:
    x = torch.arange(1.0, 5.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    grad_norm([gradient]).norm.backward()
    square = 9 * x.detach() ** 4
    torch.testing.assert_close(x.grad, 2 * square / x.detach() / square.sum().sqrt())


def test_new_tensors_of_equal_sizes_are_noticed(path: torch.device) -> None:
    first, second = [torch.ones(100, device=path)], [torch.full((100,), 2.0, device=path)]
    assert grad_norm(first).norm.item() == 10.0
    assert grad_norm(second).norm.item() == 20.0
    assert grad_norm(first).norm.item() == 10.0


def test_runs_are_bit_identical(path: torch.device) -> None:
    tensors = make(path)
    assert torch.equal(grad_norm(tensors).norm, grad_norm(tensors).norm)


def test_it_does_not_depend_on_the_number_of_threads(path: torch.device) -> None:
    tensors = [torch.randn(n) * 10.0**k for k, n in enumerate((3, 50_000, 16_384, 16_385, 0))]
    tensors = [t.to(path) for t in tensors]
    before, norms = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            norms.append(grad_norm(tensors).norm)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(norms[0], grad_norm_reference(tensors).norm)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_no_bound_and_no_norm_have_no_coefficient(path: torch.device) -> None:
    """As in torch, where infinite gradients become NaN."""
    tensor = torch.full((5,), math.inf, device=path)
    assert grad_norm([tensor], math.inf).clip_coefficient.isnan()


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip_matches_torch(path: torch.device, max_norm: float) -> None:
    a = [nn.Parameter(t) for t in make(path)]
    b = [nn.Parameter(t.clone()) for t in make(path)]
    for p, q in zip(a[1:], b[1:], strict=True):  # the first has no gradient
        p.grad, q.grad = p.detach().clone(), q.detach().clone()
    norm = clip_grad_norm_(iter(a), max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(b, max_norm))
    for p, q in zip(a[1:], b[1:], strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_clip_can_raise() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_: .*\bnan\b.*error_if_nonfinite=False"):
        clip_grad_norm_(p, 1.0, error_if_nonfinite=True)


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"grad_norm: max_norm .*-1"):
        grad_norm([torch.ones(2)], -1.0)
    with pytest.raises(ValueError, match=r"grad_norm: .*cpu and meta"):
        grad_norm([torch.ones(2), torch.ones(2, device="meta")])


def test_norms_of_fp64_gradients_keep_their_range() -> None:
    for size in (1e25, 1e-30):
        param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        param.grad = torch.full_like(param, size)
        norm = clip_grad_norm_([param], size)
        assert norm.item() == pytest.approx(size * 2**0.5, rel=1e-6)


def test_what_is_sparse_or_complex_is_refused_by_name() -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(
            TypeError, match=r"grad_norm: .*torch\.(sparse_coo|complex64)\b.*Tensor\.to_dense"
        ):
            grad_norm([torch.ones(2), tensor])


def test_clip_takes_the_arguments_of_torch() -> None:
    results = []
    for clip in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        param = torch.nn.Parameter(torch.zeros(3))
        param.grad = torch.full((3,), 2.0)
        clip([param], 1.0, 2.0, False, True)
        results.append(param.grad)
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match=r"clip_grad_norm_: norm_type .*\b2\b.*\binf\b"):
        clip_grad_norm_([param], 1.0, norm_type=float("inf"))
