"""Orthogonalisation of matrices by odd quintic iterations (Newton–Schulz, Polar Express).

Each step applies X ← a X + (b A + c A²) X with A = X Xᵀ, which maps every singular value s of X to
a s + b s³ + c s⁵ and leaves the singular vectors alone; after a few steps all of them are near 1.

Wide matrices iterate on the Gram matrix instead (r ≤ c; only r×r products between the first and
the last): with P = a I + b A + c A², the factors Q ← P Q and A ← P A P give X_k = Q X_0. A step
costs 8 r³ instead of 4 r² c + 2 r³ operations. Squaring halves the digits of small singular
values, so this needs fp32; bf16 always takes the direct form.

Scaling: the iterations need ‖X‖₂ ≤ 1. The trace of the first step's A is ‖X‖_F²; its A² gives the
far tighter bound ‖A²‖_F^(1/4), which saves a step or two at no cost.

Sources: Jordan et al., Muon (kellerjordan.github.io/posts/muon); Amsel et al., The Polar Express,
arXiv:2505.16932 (optimal coefficients, computed here by Remez' algorithm).
Legend: n matrices, r rows ≤ c columns.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._dispatch import use_triton
from ._torch import native_bf16
from .symmetric import symmetric_matmul, symmetric_product

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
# Optimal polynomials for a much narrower interval than [l, u] overshoot between its ends; the
# paper's remedy keeps the interval's ratio above this value.
_CUSHION = 0.024
# Rounding may push a singular value past the bound, where the quintics diverge.
_SAFETY = 1.01
_TINY = 1e-30
# On CUDA half the tiles of a smaller Gram matrix do not fill the device: cuBLAS computes them all.
_SYMMETRIC_MIN_ROWS = 1024


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
        system = torch.tensor(rows, dtype=torch.float64)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
    return a, b, c


@lru_cache
def _polar_express(steps: int) -> tuple[Quintic, ...]:
    lower, upper = _LOWER.get(steps, _LOWER_LEAST), 1.0
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


def quintics(coefficients: str | Sequence[Quintic], steps: int) -> Sequence[Quintic]:
    """Return the triple (a, b, c) of each step."""
    if steps < 1:
        raise ValueError(f"newton_schulz: steps must be at least 1, got {steps}")
    if coefficients == "polar_express":
        return _polar_express(steps)
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
    g: Tensor, steps: int = 5, coefficients: str | Sequence[Quintic] = "polar_express"
) -> Tensor:
    """Compute `newton_schulz` in fp64 through the singular values, without any iteration on g."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt().clamp_min(_TINY)
    s = s / (s.pow(8).sum(-1, keepdim=True).pow(1 / 8) * _SAFETY).clamp_min(_TINY)
    for a, b, c in quintics(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    product: Tensor = u @ (s.unsqueeze(-1) * vh)
    return product


def products_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 where matrix products run at full speed in it, else fp32."""
    return torch.bfloat16 if native_bf16(device) else torch.float32


@torch.no_grad()
def newton_schulz(
    g: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[Quintic] = "polar_express",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return approximately the nearest matrices with orthonormal rows (or columns).

    Args:
        g: matrices (..., rows, cols), any floating dtype; left unchanged.
        steps: quintic steps.
        coefficients: "polar_express" (optimal for singular values above 1e-3 of the largest, with
            four steps above 3e-3, with three above 1e-2), "quintic" (Jordan's), "classic"
            (converges to exactly 1, slowly), or a sequence of triples (a, b, c); the last one
            repeats.
        dtype: of the products. None: bf16 where the device multiplies it natively, else fp32.

    Returns:
        U f(S) Vᵀ for g = U S Vᵀ, with f near 1; zero for a zero matrix. Shape of g, dtype of the
        products.

    Raises:
        ValueError: g has fewer than two dimensions, or the coefficients are malformed.

    Numerics: in fp32 singular values below about 3e-4 of the largest are amplified less exactly
        on the Gram path. Two runs agree bit for bit.
    Memory: two copies of g and three Gram matrices, in the products' dtype.
    Source: arXiv:2505.16932; kellerjordan.github.io/posts/muon.
    """
    if g.ndim < 2:
        raise ValueError(f"newton_schulz: g must be a matrix or a batch of them, got {g.ndim}-d")
    polynomials = quintics(coefficients, steps)
    dtype = dtype or products_dtype(g.device)
    x = g if dtype is torch.float16 else g.to(dtype)  # fp16 has no room for what is not scaled yet
    if x.numel() == 0:
        return x.to(dtype, copy=True)
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    batch = x.reshape(-1, *x.shape[-2:])
    rows, cols = batch.shape[-2:]
    gram_flops = 4 * cols / rows + 8 * steps - 6
    direct_flops = steps * (4 * cols / rows + 2)
    if dtype is torch.float16:
        # Halfway between what overflows for rank 1 and what underflows for equal singular values:
        # those of A² are from 1/r to r.
        norm = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        batch = (batch * (norm.clamp_min(_TINY).reciprocal() * rows**0.25)).to(dtype)
    if dtype in (torch.float32, torch.float64) and gram_flops < direct_flops:
        out = _iterate_gram(batch, polynomials)
    else:
        out = _iterate_direct(batch, polynomials)
    out = out.view(x.shape)
    return out.mT if transposed else out


def _tighten(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and A² of s·X, whose bound ‖A²‖_F^(1/4) is 1, and the scale s; given A of X."""
    scale = torch.ones((), device=gram.device)
    if gram.dtype is not torch.float16:  # its X has been scaled already
        # The trace is ‖X‖_F². A power of two costs no digit.
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)[:, None, None]
        scale = (trace.clamp_min(_TINY).log2() / -2).round().exp2()
        gram = _scaled(gram, scale.square())
    gram2 = _square(gram)
    norm = torch.linalg.vector_norm(gram2, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    inverse = norm.clamp_min(_TINY).pow(-0.25) / _SAFETY
    square = inverse.square()
    return _scaled(gram, square), _scaled(gram2, square.square()), scale * inverse


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x times fp32 factors, which may lie outside the range of fp16."""
    return (x * factor).to(x.dtype) if x.dtype is torch.float16 else x * factor.to(x.dtype)


def _square(x: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Return α X Xᵀ + β add by whatever is fastest for the device and size."""
    if use_triton(x) and x.shape[1] < _SYMMETRIC_MIN_ROWS:
        if add is None:
            return torch.bmm(x, x.mT)
        return torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)
    return symmetric_matmul(x, add=add, alpha=alpha, beta=beta)


def _iterate_direct(x: Tensor, polynomials: Sequence[Quintic]) -> Tensor:
    """Iterate on (n, r, c) matrices."""
    for step, (a, b, c) in enumerate(polynomials):
        gram = _square(x)  # (n, r, r)
        if step == 0:
            gram, gram2, scale = _tighten(gram)
            x = _scaled(x, scale)
            update = gram.mul_(b).add_(gram2, alpha=c)
        else:
            update = _square(gram, add=gram, alpha=c, beta=b)
        x = torch.baddbmm(x, update, x, beta=a)
    return x


def _iterate_gram(x: Tensor, polynomials: Sequence[Quintic]) -> Tensor:
    """The same as X_k = Q_k X_0; all factors commute, so their products are symmetric."""
    gram, gram2, scale = _tighten(_square(x))  # (n, r, r)
    factor = None
    for step, (a, b, c) in enumerate(polynomials):
        if step > 0:
            gram2 = _square(gram)
        polynomial = gram2.mul_(c).add_(gram, alpha=b)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        if step < len(polynomials) - 1:
            gram = symmetric_product(symmetric_product(polynomial, gram), polynomial)
        factor = polynomial if factor is None else symmetric_product(polynomial, factor)
    assert factor is not None
    return torch.bmm(factor.mul_(scale.to(x.dtype)), x)
