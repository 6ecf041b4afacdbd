"""Every operation with a kernel on random data, against fp64 and plain torch in the same dtype.

The catalogue of `fasttrain_kernels.aot.cases` says which launches there are; what they compute is
checked here, by the rule of the other tests: the error is at most twice that of plain torch in the
same dtype, plus 1e-5 (1e-3 in half precision), relative to the largest value. Optimizers, whose
results are rounded once, are held to twice that rounding.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import fasttrain_kernels as kernels
import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Outputs = Tensor | tuple[Tensor, ...]


class Op(NamedTuple):
    """A call: its inputs take gradients where the outputs have any, its constants do not."""

    name: str
    ours: Callable[..., Outputs]
    plain: Callable[..., Outputs] | None  # None: what fp64 gives, rounded
    exact: Callable[..., Outputs]
    inputs: tuple[Tensor, ...]
    constants: tuple[Any, ...] = ()
    target: str = "sm_90"
    rounds_once: bool = True


def results(fn: Callable[..., Outputs], op: Op, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return outputs and gradients; those of the outputs vary from element to element."""
    inputs = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in op.inputs]
    outputs = fn(*inputs, *op.constants)
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    ends = [o for o in found if o.requires_grad]
    if not ends:
        return found
    # The same in every dtype, and never 1, for which kernels have a shortcut.
    seeds = [(torch.arange(o.numel()).view_as(o).sin() + 1.5).bfloat16().to(o) for o in ends]
    return [o.detach() for o in found] + list(torch.autograd.grad(ends, inputs, seeds))


def compare(op: Op, ours: list[Tensor]) -> float:
    """Assert that our results are right; return the largest error as a share of what it may be.

    Rounding to half precision may have little bias. Truncation, which errors of that size may
    hide, has one of half a unit in the last place.
    """
    exact = results(op.exact, op, torch.float64)
    plain = (
        results(op.plain, op) if op.plain else [e.to(o) for e, o in zip(exact, ours, strict=True)]
    )
    worst = 0.0
    for i, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.shape == truth.shape, op.name
        largest = truth.abs().max().clamp_min(1e-30)
        error, allowed = (
            ((x.double() - truth).abs().max() / largest).item() for x in (mine, theirs)
        )
        half = any(x.dtype.itemsize == 2 for x in op.inputs)
        allowed = 2 * allowed + (1e-3 if half else 1e-5)
        assert error <= allowed, f"{op.name}, result {i}: error {error:.3g} exceeds {allowed:.3g}"
        worst = max(worst, error / allowed)
        normal = truth.abs() >= torch.finfo(mine.dtype).tiny
        if op.rounds_once and mine.dtype.itemsize == 2 and normal.sum() >= 1000:
            rounded, right = mine[normal].double(), truth[normal]
            ulp = torch.finfo(mine.dtype).eps / 2 * right.frexp().exponent.double().exp2()
            away = ((rounded - right) * right.sign() / ulp).clamp(-1, 1).mean().abs().item()
            assert away <= 0.25, f"{op.name}, result {i}: rounded {away:.2g} units away on average"
    return worst


def _normal(dtype: str, *shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * size).to(DTYPES[dtype])


def cross_entropy(dtype: str, n_cols: int, n_rows: int = 2, **options: Any) -> Op:
    """Cross-entropy; the last of more than two rows is ignored."""
    targets = torch.randint(n_cols, (n_rows,))
    if n_rows > 2:
        targets[-1] = -100
    if options.pop("every", False):
        options |= {"z_loss": 1e-3, "label_smoothing": 0.1, "softcap": 8.0, "return_lse": True}
        options |= {"class_weight": torch.rand(n_cols), "token_weight": torch.rand(n_rows)}
    fn = (partial(f, **options) for f in (kernels.cross_entropy, kernels.cross_entropy_reference))
    ours, plain = fn
    return Op("", ours, plain, plain, (_normal(dtype, n_rows, n_cols, size=3.0),), (targets,))


def linear_cross_entropy(dtype: str, n_cols: int, dim: int = 64) -> Op:
    """The loss of a linear layer, in chunks."""
    inputs = _normal(dtype, 16, dim), _normal(dtype, n_cols, dim, size=dim**-0.5)
    plain = kernels.linear_cross_entropy_reference
    targets = torch.randint(n_cols, (16,))
    ours = kernels.linear_cross_entropy
    return Op("", ours, plain, plain, inputs, (targets,), rounds_once=False)


def rms_norm(dtype: str, dim: int, n_rows: int = 7, *, residual: bool = False) -> Op:
    """RMSNorm with an fp32 weight; with a residual it has two outputs."""
    inputs = [_normal(dtype, n_rows, dim), 1 + _normal("fp32", dim, size=0.1)]
    inputs += [_normal(dtype, n_rows, dim)] * residual

    def call(fn: Callable[..., Outputs], x: Tensor, weight: Tensor, *more: Tensor) -> Outputs:
        return fn(x, weight, residual=more[0]) if more else fn(x, weight)

    plain = partial(call, kernels.rms_norm_reference)
    return Op("", partial(call, kernels.rms_norm), plain, plain, tuple(inputs))


def swiglu(dtype: str, n_cols: int, n_rows: int = 3) -> Op:
    """SwiGLU of two tensors."""
    inputs = _normal(dtype, n_rows, n_cols), _normal(dtype, n_rows, n_cols)
    return Op("", kernels.swiglu, kernels.swiglu_reference, kernels.swiglu_reference, inputs)


def relu_squared(dtype: str, n_cols: int, n_rows: int = 3) -> Op:
    """The squared ReLU."""
    plain = kernels.relu_squared_reference
    return Op("", kernels.relu_squared, plain, plain, (_normal(dtype, n_rows, n_cols),))


def apply_rope(dtype: str, head_dim: int, n_tokens: int = 5) -> Op:
    """RoPE of queries and of half as many keys."""
    angle = torch.rand(n_tokens, head_dim // 2) * 6.283
    inputs = _normal(dtype, 2, n_tokens, 4, head_dim), _normal(dtype, 2, n_tokens, 2, head_dim)
    plain = kernels.apply_rope_reference
    return Op("", kernels.apply_rope, plain, plain, inputs, (angle.cos(), angle.sin()))


def adamw(dtype: str, n: int, *, offset: int = 0, scalars: bool = False, **options: Any) -> Op:
    """The second step of AdamW: parameter, master weight and moments after it."""
    lr = 0.1
    values = [_normal(dtype, n + offset)[offset:] for _ in range(2)]
    state_dtype = options.get("state_dtype") or DTYPES[dtype]
    moments = [_normal("fp32", n, size=0.1).to(state_dtype), torch.rand(n).to(state_dtype)]
    given = {"clip_coefficient": torch.tensor(0.5), "grad_scale": torch.tensor(2.0)}
    given["found_inf"] = torch.zeros(())

    def ours(param: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> Outputs:
        leaf = nn.Parameter(param.detach().new_empty(n + offset)[offset:])
        leaf.data.copy_(param)
        leaf.grad = grad.detach()
        optimizer = kernels.FusedAdamW([leaf], lr=lr, **options)
        optimizer.step(grad_scale=torch.tensor(torch.inf), found_inf=torch.ones(()))  # makes state
        state = optimizer.state[leaf]
        state["exp_avg"].copy_(m.detach())
        state["exp_avg_sq"].copy_(v.detach())
        state["step"].fill_(1)
        optimizer.step(**given if scalars else {})
        names = [name for name in ("exp_avg", "exp_avg_sq", "master") if name in state]
        return (leaf.detach(), *(state[name] for name in names))

    def exact(param: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> Outputs:
        scale = 0.25 if scalars else 1.0
        with torch.no_grad():
            found = kernels.adamw_reference(param, grad, m, v, 2, lr=lr, scale=scale)
        return found + found[:1] * options.get("master_weights", False)

    return Op("", ours, None, exact, (*values, *moments))


def grad_norm(dtype: str, n: int, *, offset: int = 0) -> Op:
    """The norm of three tensors and the coefficient that clips it."""
    inputs = tuple(_normal(dtype, m + offset)[offset:] for m in (n, 8192 + 3, 1))

    def call(fn: Callable[..., Any], *tensors: Tensor) -> Outputs:
        found = fn([t.detach() for t in tensors], 1.0)
        return found.norm, found.clip_coefficient

    return Op(
        "",
        partial(call, kernels.grad_norm),
        None,
        partial(call, kernels.grad_norm_reference),
        inputs,
    )


def symmetric_matmul(dtype: str, rows: int, cols: int, *, add: bool = False) -> Op:
    """α X Xᵀ + β C, compiled for sm_80, whose products an emulator can follow."""
    x = _normal(dtype, 2, rows, cols, size=cols**-0.5)
    c = _normal(dtype, 2, rows, rows)
    inputs = (x, c + c.mT) if add else (x,)

    def call(fn: Callable[..., Tensor], x: Tensor, *added: Tensor) -> Tensor:
        more = {"add": added[0].detach()} if added else {}
        return fn(x.detach(), alpha=0.5, beta=0.25, **more)

    exact = partial(call, kernels.symmetric_matmul_reference)
    return Op("", partial(call, kernels.symmetric_matmul), None, exact, inputs, target="sm_80")


# (operation, options), of which names are made. These run by default; no block divides their sizes.
SMALL: list[tuple[Callable[..., Op], dict[str, Any]]] = [
    (cross_entropy, {"dtype": "bf16", "n_cols": 50257}),
    (cross_entropy, {"dtype": "bf16", "n_cols": 131, "n_rows": 3}),
    (cross_entropy, {"dtype": "fp32", "n_cols": 4099, "every": True}),
    (linear_cross_entropy, {"dtype": "bf16", "n_cols": 509}),
    (rms_norm, {"dtype": "bf16", "dim": 1000}),
    (rms_norm, {"dtype": "fp32", "dim": 131, "residual": True}),
    (swiglu, {"dtype": "bf16", "n_cols": 1003}),
    (relu_squared, {"dtype": "bf16", "n_cols": 1003}),
    (apply_rope, {"dtype": "bf16", "head_dim": 64, "n_tokens": 13}),
    (adamw, {"dtype": "fp32", "n": 8197, "scalars": True}),
    (adamw, {"dtype": "bf16", "n": 8200}),
    (grad_norm, {"dtype": "bf16", "n": 16389}),
    (symmetric_matmul, {"dtype": "bf16", "rows": 136, "cols": 72}),
    (symmetric_matmul, {"dtype": "fp32", "rows": 67, "cols": 41, "add": True}),
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
        for op, n_cols in itertools.product((swiglu, relu_squared), (1, 1003, 2048, 4096)):
            yield op, {"dtype": dtype, "n_cols": n_cols}
        for head_dim in (2, 32, 64, 80, 128):
            yield apply_rope, {"dtype": dtype, "head_dim": head_dim, "n_tokens": 33}
        for n, offset, scalars in ((1, 0, False), (16384, 0, True), (20005, 1, False)):
            yield adamw, {"dtype": dtype, "n": n, "offset": offset, "scalars": scalars}
            yield grad_norm, {"dtype": dtype, "n": n, "offset": offset}
        for rows, cols in ((16, 16), (128, 64), (129, 65), (256, 320), (300, 200)):
            for add in (False, True):
                yield symmetric_matmul, {"dtype": dtype, "rows": rows, "cols": cols, "add": add}
    yield adamw, {"dtype": "fp32", "n": 20005, "state_dtype": torch.bfloat16}
    for options in ({"master_weights": True, "state_dtype": torch.float32},
                    {"stochastic_rounding": True}):  # fmt: skip
        yield adamw, {"dtype": "bf16", "n": 20005, **options}


def _name(op: Callable[..., Op], options: dict[str, Any]) -> str:
    words = [f"{key}={value}" for key, value in options.items() if key != "dtype"]
    return " ".join([op.__name__, options["dtype"], *words])


_BY_NAME = {_name(*entry): entry for entry in [*SMALL, *_large()]}
SMALL_NAMES = [_name(*entry) for entry in SMALL]
LARGE_NAMES = [name for name in _BY_NAME if name not in SMALL_NAMES]


def op_named(name: str) -> Op:
    """Make the inputs of a call, which its name determines."""
    torch.manual_seed(0)
    op, options = _BY_NAME[name]
    return op(**options)._replace(name=name)
