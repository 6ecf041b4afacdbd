"""Orthogonalisation of matrices by odd quintic iterations (Newton–Schulz, Polar Express).

Each step applies X ← a X + (b A + c A²) X with A = X Xᵀ, which maps every singular value s of X to
a s + b s³ + c s⁵ and leaves the singular vectors alone; after a few steps all of them are near 1.

Wide matrices iterate on the Gram matrix instead (r ≤ c; only r×r products between the first and
the last): with P = a I + b A + c A², the factors Q ← P Q and A ← P A P give X_k = Q X_0. A step
costs 8 r³ instead of 4 r² c + 2 r³ operations, but 2 r³ + 4 r² c with the products Q X and A that
start anew. Squaring halves the digits of small singular values, so that is done after every five
steps in fp32, in fp16 after two and then every three, in bf16, as for c ≤ 1.5 r, after each: the
direct form. Five steps in fp16 take 0.74 of its operations at c = 3 r, 0.54 at 8 r, and end 0.02
from the exact result for singular values down to 1e-3 (bf16: 0.14); see benchmarks/EXPERIMENTS.md.

Scaling: the iterations need ‖X‖₂ ≤ 1. The first step's A² gives the bound ‖A²‖_F^(1/4), far tighter
than ‖X‖_F, which saves a step or two at no cost. Before any product each matrix is multiplied by
the power of two that brings its largest element into [½, 1) (in fp16 to a norm of r^¼), so that no
square under- or overflows: the result does not depend on the matrix's scale.

Sources: Jordan et al., Muon (kellerjordan.github.io/posts/muon); Amsel et al., The Polar Express,
arXiv:2505.16932 (optimal coefficients, computed here by Remez' algorithm); Zhang et al., Gram
Newton-Schulz (dao-lab.ai/blog/2026/gram-newton-schulz; the restarts).
Legend: n matrices, r rows ≤ c columns.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ._dispatch import is_traced, use_triton
from ._torch import native_bf16, unobserved
from .symmetric import add_scaled_, symmetric_product

Quintic = tuple[float, float, float]

# Jordan's coefficients: slope at zero as steep as it gets, singular values end in [0.7, 1.2].
_JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
# The classical quintic: converges to exactly 1, slowly from small singular values.
_CLASSIC: Quintic = (15 / 8, -10 / 8, 3 / 8)
NS_COEFFICIENTS = ("polar_express", "quintic", "classic")

# Singular values, relative to the bound, from which on Polar Express aims at 1: what so many steps
# bring to [0.72, 1.27] (3 steps from 1e-2 on, 4 from 3e-3 on) or nearer. Jordan's five steps end in
# [0.7, 1.2], and start from the looser bound of Frobenius' norm.
_LOWER = {1: 0.1, 2: 3e-2, 3: 1e-2, 4: 3e-3}
_LOWER_LEAST = 1e-3
# In bf16, below this they are mostly rounding noise, which should not be brought to 1.
_LOWER_OF_BF16 = 1e-2
# Optimal polynomials for a much narrower interval than [l, u] overshoot between its ends; the
# paper's remedy keeps the interval's ratio above this value.
_CUSHION = 0.024
# Rounding may push a singular value past the bound, where the quintics diverge.
_SAFETY = 1.01
_LEAST_NORM = 1e-4


def _optimal_quintic(lower: float, upper: float) -> Quintic:
    """Return the odd quintic nearest to 1 on [lower, upper] (Remez)."""
    if lower / upper > 1 - 5e-6:
        a, b, c = _CLASSIC
        return a / upper, b / upper**3, c / upper**5
    inner = [(3 * lower + upper) / 4, (lower + 3 * upper) / 4]
    error, previous = math.inf, -math.inf
    a = b = c = 0.0
    while abs(error - previous) > 1e-14:
        previous = error
        points = [lower, *inner, upper]
        rows = [[x, x**3, x**5, (-1.0) ** i] for i, x in enumerate(points)]
        with unobserved():  # numbers are needed also where tensors are fake
            system = torch.tensor(rows, dtype=torch.float64, device="cpu")
            a, b, c, error = torch.linalg.solve(system, torch.ones_like(system[0])).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
    return a, b, c


@lru_cache
def _polar_express(steps: int, least: float) -> tuple[Quintic, ...]:
    lower, upper = max(_LOWER.get(steps, _LOWER_LEAST), least), 1.0
    quintics = []
    for step in range(steps):
        a, b, c = _optimal_quintic(max(lower, _CUSHION * upper), upper)
        ends = [a * x + b * x**3 + c * x**5 for x in (lower, upper)]
        centre = 2 / sum(ends)  # the cushion moved the image off 1
        a, b, c = a * centre, b * centre, c * centre
        lower = ends[0] * centre
        upper = 2 - lower
        if step < steps - 1:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        quintics.append((a, b, c))
    return tuple(quintics)


def quintics(
    coefficients: str | Sequence[Quintic], steps: int, dtype: torch.dtype = torch.float32
) -> Sequence[Quintic]:
    """Return the triple (a, b, c) of each step, for products in ``dtype``."""
    if steps < 1:
        raise ValueError(f"newton_schulz: steps must be at least 1, got {steps}")
    if coefficients == "polar_express":
        return _polar_express(steps, _LOWER_OF_BF16 if dtype is torch.bfloat16 else 0.0)
    if coefficients in ("quintic", "classic"):
        return [_JORDAN if coefficients == "quintic" else _CLASSIC] * steps
    if isinstance(coefficients, str):
        raise ValueError(
            f"newton_schulz: coefficients must be one of {NS_COEFFICIENTS} or triples, "
            f"got {coefficients!r}"
        )
    chosen = [coefficients[min(i, len(coefficients) - 1)] for i in range(steps)]
    if any(len(triple) != 3 for triple in chosen):
        raise ValueError("newton_schulz: each step needs three coefficients (a, b, c)")
    return chosen


@torch.no_grad()
def newton_schulz_reference(
    g: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[Quintic] = "polar_express",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `newton_schulz` in fp64 through the singular values, without any iteration on g.

    ``dtype``: that of the products which it is compared with; bf16 has coefficients of its own.
    """
    x = g.double()
    largest = x.abs().amax((-2, -1), keepdim=True) if x.numel() else x.new_ones(())
    u, s, vh = torch.linalg.svd(x / torch.where(largest == 0, 1.0, largest), full_matrices=False)
    bound = s.pow(8).sum(-1, keepdim=True).pow(1 / 8) * _SAFETY
    s = s / torch.where(bound == 0, 1.0, bound)
    for a, b, c in quintics(coefficients, steps, dtype):
        s = a * s + b * s**3 + c * s**5
    product: Tensor = u @ (s.unsqueeze(-1) * vh)
    return product


def products_dtype(device: torch.device) -> torch.dtype:
    """Return fp16 on a GPU and bf16 on a CPU where products run at full speed in bf16, else fp32.

    fp16 has three digits more, and the range suffices for what is scaled to norms near 1.
    """
    if not native_bf16(device):
        return torch.float32
    return torch.bfloat16 if device.type == "cpu" else torch.float16


@torch.no_grad()
def newton_schulz(
    g: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[Quintic] = "polar_express",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return approximately the nearest matrices with orthonormal rows (or columns).

    The result depends on the direction of each matrix alone, not on its scale: it is the same, to
    the bit, for a matrix times a power of two, as long as no element becomes subnormal or infinite.

    Args:
        g: matrices (..., rows, cols), any floating dtype; left unchanged.
        steps: quintic steps.
        coefficients: "polar_express" (optimal for singular values above 1e-3 of the largest, with
            four steps above 3e-3, with three or in bf16 above 1e-2), "quintic" (Jordan's),
            "classic" (converges to exactly 1, slowly), or a sequence of triples (a, b, c); the last
            one repeats.
        dtype: of the products. None: half precision where the device has bf16 (fp16 on a GPU, bf16
            on a CPU), else fp32.

    Returns:
        U f(S) Vᵀ for g = U S Vᵀ, with f near 1; zeros for a zero matrix. A NaN or infinity makes
        its own matrix NaN and no other. Shape of g, dtype of the products.

    Raises:
        ValueError: g has fewer than two dimensions, or the coefficients are malformed.

    Numerics: in fp32 singular values below about 3e-4 of the largest are amplified less exactly on
        the Gram path. Two runs agree bit for bit. In a matrix of low rank, rounding errors are
        amplified along with small singular values. Distance from U Vᵀ, relative to its norm, of
        random 256 × 256 matrices after five steps (torch.optim.Muon's in bf16):

        ====  ====  ====  ====  ================
        rank  bf16  fp16  fp32  torch.optim.Muon
        ====  ====  ====  ====  ================
        1     0.64  0.31  0.12  1.17
        3     0.53  0.25  0.09  0.74
        16    0.39  0.19  0.08  0.37
        256   0.06  0.10  0.10  0.21
        ====  ====  ====  ====  ================
    Memory: two copies of g and three Gram matrices, in the products' dtype.
    Source: arXiv:2505.16932; kellerjordan.github.io/posts/muon.
    """
    if g.ndim < 2:
        raise ValueError(f"newton_schulz: g must be a matrix or a batch of them, got {g.ndim}-d")
    dtype = dtype or products_dtype(g.device)
    polynomials = quintics(coefficients, steps, dtype)
    if g.numel() == 0:
        return g.to(dtype, copy=True)
    rows, cols = sorted(g.shape[-2:])
    batch = g.reshape(-1, *g.shape[-2:])
    if dtype is torch.float16:
        if batch.dtype is torch.float64:  # whose squares may under- or overflow even in fp64
            batch = _of_unit_size(batch, torch.float32)
        # Halfway between what overflows for rank 1 and what underflows for equal singular values:
        # those of A² are from 1/r to r.
        norm = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        batch = _scaled(batch, rows**0.25 / torch.where(norm == 0, 1.0, norm), dtype)
    else:
        batch = _of_unit_size(batch, dtype)
    transposed = g.shape[-2] > g.shape[-1]
    batch = batch.mT if transposed else batch
    restarts = range(1, steps)  # the direct form
    if dtype is not torch.bfloat16 and 2 * cols > 3 * rows:
        restarts = range(2, steps, 3) if dtype is torch.float16 else range(4, steps, 4)
    out = _iterate(batch, polynomials, restarts)
    return (out.mT if transposed else out).view(g.shape)


def _tighten(gram: Tensor, b: float, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and b A + c A² of s·X, whose bound ‖A²‖_F^(1/4) is 1, and s; given A of X."""
    gram2 = symmetric_product(gram, gram)
    dtype = torch.promote_types(gram2.dtype, torch.float32)
    norm = torch.linalg.vector_norm(gram2, dim=(-2, -1), keepdim=True, dtype=dtype)
    # X has been scaled: the norm is at least 1/16, in fp16 1/√r, unless it is zero.
    inverse = norm.clamp_min(_LEAST_NORM).pow(-0.25) / _SAFETY
    gram = _scaled(gram, inverse.square())
    return gram, add_scaled_(_scaled(gram2, inverse.pow(4) * c), gram, b), inverse


def largest_elements(x: Tensor) -> Tensor:
    """Return the largest absolute value of each matrix (n, r, c), as (n, 1, 1), in fp32 or fp64."""
    largest: Tensor = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
    return largest if largest.dtype is torch.float64 else largest.float()


def _of_unit_size(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each matrix (n, r, c) times a power of two, its largest element in [½, 1), rounded.

    Zero matrices stay zero.
    """
    if x.is_cpu and not is_traced(x) and not use_triton(x):
        # The host reads the largest elements; to find them in one pass takes torch ten times as
        # long.
        ends = zip(x.amax((-2, -1)).tolist(), x.amin((-2, -1)).tolist(), strict=True)
        exponents = [math.frexp(max(high, -low))[1] for high, low in ends]
        if all(-126 < e < 127 for e in exponents):  # torch computes with fp64 factors slowly
            factors = torch.tensor([2.0**-e for e in exponents], dtype=torch.float32, device="cpu")
            return _scaled(x, factors.view(-1, 1, 1), dtype)
        exponent = torch.tensor(exponents, device="cpu").view(-1, 1, 1)
    else:
        exponent = torch.frexp(largest_elements(x)).exponent
    return times_power_of_two(x, -exponent, dtype)


def times_power_of_two(x: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x times 2^exponent, which may lie outside the range of its dtype, rounded once."""
    if x.dtype is torch.float64:  # 2^e may overflow: in two steps
        half = exponent // 2
        return _scaled(_scaled(x, _power_of_two(half)), _power_of_two(exponent - half), dtype)
    return _scaled(x, _power_of_two(exponent), dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent in fp64, exactly, for integers from -1022 to 1023."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return x times factors, which may lie outside the range of its dtype, rounded once."""
    out = torch.empty_like(x, dtype=dtype)
    return torch.mul(x, factor, out=out)


def _iterate(x: Tensor, polynomials: Sequence[Quintic], restarts: Sequence[int]) -> Tensor:
    """Iterate on (n, r, c) matrices; all factors of X commute, so their products are symmetric."""
    for start, end in pairwise((0, *restarts, len(polynomials))):
        gram, factor = symmetric_product(x, x), None  # (n, r, r)
        for step, (a, b, c) in enumerate(polynomials[start:end], start):
            if step == 0:
                gram, polynomial, scale = _tighten(gram, b, c)
            else:
                polynomial = symmetric_product(gram, gram, gram, c, b)
            if end - start == 1:
                x = x if step else _scaled(x, scale)
                x = _times(polynomial, x, a)
                continue
            polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
            factor = polynomial if factor is None else symmetric_product(polynomial, factor)
            if step < end - 1:
                gram = symmetric_product(symmetric_product(polynomial, gram), polynomial)
        if factor is not None:
            x = _times(factor if start else _scaled(factor, scale), x)
    return x


def _times(p: Tensor, x: Tensor, beta: float = 0.0) -> Tensor:
    """Return P X + β X for P (n, r, r), laid out in memory as X is."""
    if x.is_contiguous():
        return torch.bmm(p, x) if beta == 0.0 else torch.baddbmm(x, p, x, beta=beta)
    y, p = x.mT, p.mT  # of a tall matrix: (P X)ᵀ = Xᵀ Pᵀ
    return (torch.bmm(y, p) if beta == 0.0 else torch.baddbmm(y, y, p, beta=beta)).mT
