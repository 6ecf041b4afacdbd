"""Newton–Schulz and Muon see a matrix's direction, not its scale; zeros stay zeros."""

import importlib
import math
from typing import Any

import fasttrain_kernels
import pytest
import torch
from fasttrain_kernels import Muon, newton_schulz
from fasttrain_kernels.newton_schulz import newton_schulz_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.kernels.test_muon import be_one_of_one_rank

PRODUCTS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 7), (7, 1), (8, 8), (16, 24), (24, 16), (5, 64)]
TINY, HUGE = -45, 38  # powers of ten that fp32 reaches


def matrix(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    """Return a matrix of at most this rank, its largest element 1, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    g = left @ torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    return g / g.abs().max()


@settings(max_examples=150)
@given(
    products=st.sampled_from(PRODUCTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    shape=st.sampled_from(SHAPES),
    rank=st.integers(1, 64),
    exponent=st.integers(TINY, HUGE),
    seed=st.integers(0, 9),
)
def test_a_direction_is_that_of_the_same_matrix_at_any_scale(
    products: torch.dtype,
    dtype: torch.dtype,
    shape: tuple[int, int],
    rank: int,
    exponent: int,
    seed: int,
) -> None:
    scaled = (matrix(shape, rank, seed) * 10.0**exponent).to(dtype)
    # The same numbers at an ordinary scale, to the bit
    back = math.frexp(scaled.abs().max().item())[1]
    plain = (scaled.double() * 0.5**back).float() if back > -1000 else scaled.float()
    got = newton_schulz(scaled, dtype=products)
    assert got.dtype == products
    if not scaled.any():
        assert not got.any()
        return
    assert torch.equal(got, newton_schulz(plain, dtype=products))
    assert torch.linalg.svdvals(got.double()).max() < 1.5


@settings(max_examples=40)
@given(exponent=st.integers(-1070, 1020), products=st.sampled_from(PRODUCTS))
def test_fp64_matrices_of_any_exponent_have_the_same_direction(
    exponent: int, products: torch.dtype
) -> None:
    g = torch.tensor([[1.0, -0.5, 0.25], [0.5, 1.0, -0.75]], dtype=torch.float64)
    scaled = g * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
    expected = newton_schulz(g, dtype=products)
    assert torch.equal(newton_schulz(scaled, dtype=products), expected)
    reference = newton_schulz_reference(scaled)
    torch.testing.assert_close(reference, newton_schulz_reference(g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("products", PRODUCTS)
def test_matrices_of_a_batch_have_scales_of_their_own(products: torch.dtype) -> None:
    g = matrix((16, 24), 24, 0).float()
    scales = (1.0, 2.0**-100, 2.0**100, 2.0**-120, 0.0)
    bad = [g.clone(), g.clone()]
    bad[0][3, 4] = math.nan
    bad[1][5, 6] = math.inf
    out = newton_schulz(torch.stack([*(g * scale for scale in scales), *bad]), dtype=products)
    expected = newton_schulz(g, dtype=products)
    for scale, matrix_out in zip(scales, out[:5], strict=True):  # batches sum in another order
        torch.testing.assert_close(
            matrix_out, expected if scale else torch.zeros_like(expected), rtol=0, atol=0.02
        )
    assert out[5:].isnan().all()


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_device_that_the_host_does_not_read_scales_alike(
    products: torch.dtype, triton_device: torch.device
) -> None:
    g = matrix((16, 24), 24, 0).float()
    batch = torch.stack([g, g * 2.0**-140, g * 1e-38, g * 2.0**120, g * 0.0]).to(triton_device)
    expected = newton_schulz(batch, dtype=products)
    with fasttrain_kernels.triton_on_cpu():
        got = newton_schulz(batch, dtype=products)
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=0.02)
    assert not got[4].any()


def of_unit_size(g: Tensor) -> Tensor:
    """Return the matrix times the power of two that brings its largest element to [½, 1)."""
    return torch.ldexp(g.double(), -torch.frexp(g.double().abs().max()).exponent).to(g.dtype)


def update(
    g: Tensor, products: torch.dtype | None, *, triton: bool = False, **options: Any
) -> Tensor:
    """Return what one step of Muon changes a matrix of zeros by, turned around."""
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = Muon([p], lr=1.0, momentum=0.0, scale="none", ns_dtype=products, **options)
    p.grad = g
    if triton:
        with fasttrain_kernels.triton_on_cpu():
            optimizer.step()
    else:
        optimizer.step()
    return -p.detach()


@settings(max_examples=60)
@given(
    products=st.sampled_from([None, *PRODUCTS]),
    shape=st.sampled_from(SHAPES),
    exponent=st.integers(TINY, HUGE - 1),
    seed=st.integers(0, 9),
)
def test_an_update_of_muon_does_not_depend_on_the_scale_of_the_gradient(
    products: torch.dtype | None, shape: tuple[int, int], exponent: int, seed: int
) -> None:
    g = (matrix(shape, min(shape), seed) * 10.0**exponent).float()
    got = update(g, products)
    torch.testing.assert_close(got, update(of_unit_size(g), products), rtol=0, atol=1e-6)


EXPONENTS = [-147, -140, -128, -60, 60, 120]  # of 2; fp32's subnormal numbers begin at -149


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_an_update_by_the_kernels_does_not_depend_on_the_scale_of_the_gradient(
    products: torch.dtype, exponent: int, triton_device: torch.device
) -> None:
    g = (matrix((16, 24), 24, 0) * 2.0**exponent).float().to(triton_device)
    got = update(g, products, triton=True)
    assert got.any()
    assert torch.equal(got, update(of_unit_size(g), products, triton=True))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_a_sharded_direction_does_not_depend_on_its_scale(
    products: torch.dtype, exponent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_one_of_one_rank(monkeypatch)
    module = importlib.import_module("fasttrain_kernels.muon")
    tiny = (matrix((8, 12), 8, 1) * 2.0**exponent).float()
    plain = matrix((8, 12), 8, 0).float()
    group = {"ns_steps": 5, "coefficients": "polar_express"}
    batch = module.MatrixStack(group, 1.0, (8, 12), object(), 1)
    expected = batch.orthogonalise(torch.stack([plain, of_unit_size(tiny), plain]), products)
    got = batch.orthogonalise(torch.stack([plain, tiny, 0 * plain]), products)
    assert torch.equal(got[:2], expected[:2])
    assert not got[2].any()


@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e-7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_update_of_a_half_precision_matrix_is_that_of_the_same_numbers_in_fp32(
    dtype: torch.dtype, scale: float
) -> None:
    g = (matrix((16, 24), 24, 0) * scale).to(dtype)
    assert g.any()
    expected = update(g.float(), torch.float32)
    assert distance(update(g, torch.float32).float(), expected.double()) < 0.01
    clip = torch.tensor(1e-9)
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g
    Muon([p], lr=1.0, momentum=0.0, scale="none", ns_dtype=torch.float32, nesterov=False).step(
        clip_coefficient=clip
    )
    assert distance(-p.detach().float(), expected.double()) < 0.01


def test_products_may_be_in_fp64() -> None:
    g = matrix((16, 24), 24, 0)
    exact = newton_schulz_reference(g, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(g, dtype=torch.float64), exact, rtol=0, atol=0.02)


def test_a_rank_that_owns_no_matrix_unpacks_none() -> None:
    module = importlib.import_module("fasttrain_kernels.muon")
    parts = [torch.empty(0, 13), torch.empty(0, 7), torch.empty(0, 1)]  # of 2, 1 and no rows
    assert module._unpacked(parts, 6).shape == (0, 3, 6)


@settings(max_examples=60)
@given(
    products=st.sampled_from(PRODUCTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    exponents=st.lists(st.integers(-150, 125), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_shards_that_differ_in_scale_make_the_matrix_that_they_are_parts_of(
    products: torch.dtype, dtype: torch.dtype, exponents: list[int], seed: int
) -> None:
    """Rows of ranks are packed each at a scale of its own; the largest says that of the matrix."""
    module = importlib.import_module("fasttrain_kernels.muon")
    rows = [(matrix((2, 6), 2, seed + k) * 2.0**e).to(dtype)[None] for k, e in enumerate(exponents)]
    rows.append(torch.empty(1, 0, 6, dtype=dtype))  # of a rank that has none
    rows.append(torch.zeros(1, 1, 6, dtype=dtype))
    whole = torch.cat(rows, dim=1)
    got = module._unpacked([module._packed(shard, products) for shard in rows], 6)
    assert (got.dtype, got.shape) == (products, whole.shape)
    if not whole.any():
        assert not got.any()
        return
    torch.testing.assert_close(
        of_unit_size(got.double()),
        of_unit_size(whole.double()),
        rtol=2 * torch.finfo(products).eps,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", PRODUCTS)
def test_momentum_that_fades_to_zero_leaves_weights_finite(
    products: torch.dtype, dtype: torch.dtype
) -> None:
    p = nn.Parameter(matrix((4, 6), 4, 0).to(dtype))
    optimizer = Muon([p], lr=0.02, ns_dtype=products, ns_steps=3)
    p.grad = matrix((4, 6), 4, 1).to(dtype) * 1e-3
    optimizer.step()
    momentum = optimizer.state[p]["momentum_buffer"]
    for _ in range(40):  # faster than 2,000 steps without a gradient
        momentum.mul_(0.01)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert p.isfinite().all()
    momentum.zero_()
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


def distance(direction: Tensor, right: Tensor) -> float:
    return ((direction.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("rank", [1, 3, 32])
def test_a_direction_of_any_rank_is_no_further_from_the_polar_factor_than_torchs(
    rank: int, products: torch.dtype
) -> None:
    """Polar Express brings small singular values up; in bf16 those of rounding must stay small."""
    g = matrix((32, 48), rank, 3).float()
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    right = u[:, :rank] @ vh[:rank]
    q = nn.Parameter(torch.zeros_like(g))
    q.grad = g
    torch.optim.Muon([q], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    assert distance(newton_schulz(g, dtype=products), right) <= distance(-q.detach(), right)
