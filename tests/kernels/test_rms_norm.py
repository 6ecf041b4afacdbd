"""rms_norm: kernels (in the interpreter where there is no GPU), eager CPU and compiled paths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels.rms_norm import RMSNorm, rms_norm, rms_norm_reference
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

# The interpreter truncates where bf16 stores round, so bf16 is tested on a GPU alone.
HALF_DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
SLACK = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
OP = rms_norm.__module__.rpartition(".")[0].replace(".", "_")


def results(
    fn: Callable[..., object],
    inputs: dict[str, Tensor | None],
    dtypes: dict[str, torch.dtype],
    device: torch.device | str = "cpu",
    **options: object,
) -> list[Tensor]:
    """Outputs and gradients of fn on fresh leaves, in fp64, under fixed incoming gradients."""
    leaves = {
        name: None if t is None else t.detach().to(device, dtypes[name]).requires_grad_()
        for name, t in inputs.items()
    }
    out = fn(leaves["x"], leaves["weight"], residual=leaves["residual"], **options)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outs]
    grads = torch.autograd.grad(
        outs,
        [t for t in leaves.values() if t is not None],
        [g.to(o.device, o.dtype) for g, o in zip(incoming, outs, strict=True)],
    )
    return [t.detach().cpu().double() for t in (*outs, *grads)]


def assert_as_good_as_torch(
    inputs: dict[str, Tensor | None],
    dtypes: dict[str, torch.dtype],
    device: torch.device | str,
    **options: object,
) -> None:
    """The error against fp64 is at most twice plain torch's own, plus the dtype's slack."""
    # Both sides start from the inputs as rounded to their dtypes.
    inputs = {n: None if t is None else t.to(dtypes[n]).double() for n, t in inputs.items()}
    exact = results(rms_norm_reference, inputs, dict.fromkeys(inputs, torch.float64), **options)
    torch_own = results(rms_norm_reference, inputs, dtypes, **options)
    ours = results(rms_norm, inputs, dtypes, device, **options)
    slack = max(SLACK[d] for d in dtypes.values())
    assert len(ours) == len(exact)
    for index, (got, own, want) in enumerate(zip(ours, torch_own, exact, strict=True)):
        allowed = 2 * (own - want).abs().max() + slack * max(1.0, want.abs().max().item())
        assert (got - want).abs().max() <= allowed, f"result {index}"


def make_inputs(
    shape: tuple[int, ...], weight: bool, residual: bool, seed: int = 0
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "x": draw(*shape),
        "weight": 1 + draw(shape[-1]) / 4 if weight else None,
        "residual": draw(*shape) if residual else None,
    }


CASES = {
    "lead": st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple),
    # One column, QK-norm rows, a power of two, odd sizes, more than one tile of rows.
    "dim": st.sampled_from([1, 3, 64, 96, 128, 131, 257, 1000]),
    "weight": st.booleans(),
    "residual": st.booleans(),
    "zero_centered": st.booleans(),
    "eps": st.sampled_from([1e-6, 1e-5, 0.1]),
    "x_dtype": st.sampled_from([torch.float32, *HALF_DTYPES]),
    "same_dtype": st.booleans(),
}


def compare(
    device: torch.device,
    lead: tuple[int, ...],
    dim: int,
    weight: bool,
    residual: bool,
    x_dtype: torch.dtype,
    same_dtype: bool,
    **options: Any,
) -> None:
    other = x_dtype if same_dtype else torch.float32
    inputs = make_inputs((*lead, dim), weight, residual)
    dtypes = {"x": x_dtype, "weight": other, "residual": other}
    assert_as_good_as_torch(inputs, dtypes, device, **options)


PLAIN = {"weight": True, "eps": 1e-6, "x_dtype": torch.float32, "same_dtype": True}


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**CASES)
# in column chunks, two tiles a program; several tiles a program
@example(lead=(2,), dim=16500, residual=True, zero_centered=True, **PLAIN)
@example(lead=(3, 70), dim=64, residual=False, zero_centered=False, **PLAIN)
def test_kernels_match_fp64(triton_device: torch.device, **case: Any) -> None:
    compare(triton_device, **case)


@settings(max_examples=25)
@given(**{**CASES, "x_dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16])})
def test_eager_cpu_path_matches_fp64(**case: Any) -> None:
    compare(torch.device("cpu"), **case)


def layouts() -> dict[str, Tensor]:
    """Tensors of shape (3, 5, 48) with every kind of strides that rows can have."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 5, 4, 96, generator=generator)
    return {
        "fused_projection": base[:, :, 1, :48],
        "transposed": torch.randn(5, 3, 48, generator=generator).transpose(0, 1),
        "columns_strided": base[:, :, 0, ::2],
        "expanded": base[0, 0, 0, :48].expand(3, 5, 48),
        "rows_reversed_stride_two": base[:, :, ::3, :48][:, :, 1],
        "padded_heads": torch.randn(3, 9, 50, generator=generator)[:, 2:7, 1:49],
    }


@pytest.mark.parametrize("layout", list(layouts()))
def test_strided_inputs_and_gradients(triton_device: torch.device, layout: str) -> None:
    x = layouts()[layout].to(triton_device)
    weight = torch.linspace(0.5, 2, 48, device=triton_device)
    wanted_leaf = x.contiguous().requires_grad_()
    wanted = rms_norm_reference(wanted_leaf, weight)
    got_leaf = x.detach().requires_grad_()
    got = rms_norm(got_leaf, weight)
    torch.testing.assert_close(got, wanted)
    (dx,) = torch.autograd.grad(got, got_leaf, x)  # the incoming gradient is as strided
    (dx_wanted,) = torch.autograd.grad(wanted, wanted_leaf, x.contiguous())
    torch.testing.assert_close(dx, dx_wanted)
    (dx,) = torch.autograd.grad(rms_norm(got_leaf, weight).sum(), got_leaf)  # an expanded one
    (dx_wanted,) = torch.autograd.grad(rms_norm_reference(wanted_leaf, weight).sum(), wanted_leaf)
    torch.testing.assert_close(dx, dx_wanted)


def test_rows_further_apart_than_int32(triton_device: torch.device) -> None:
    # Untouched pages of the buffer are never backed by memory, so 4 GiB apart costs nothing.
    stride = 2**31 + 64
    buffer = torch.empty(stride + 64, dtype=torch.float16, device=triton_device)
    x = buffer.as_strided((2, 64), (stride, 1))
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()
    x.copy_(rows)
    leaf = rows.clone().requires_grad_()
    wanted = rms_norm_reference(leaf)
    (dx_wanted,) = torch.autograd.grad(wanted, leaf, rows)
    x.requires_grad_()
    got = rms_norm(x)
    torch.testing.assert_close(got.cpu(), wanted)
    (dx,) = torch.autograd.grad(got, x, rows.to(x.device))
    torch.testing.assert_close(dx.cpu(), dx_wanted)


def test_large_and_tiny_magnitudes_do_not_overflow_half(triton_device: torch.device) -> None:
    for scale in (3e4, 1e-4):
        x = (torch.tensor([[1.0, -1.0, 1.0, -1.0]]) * scale).half().to(triton_device)
        wanted = rms_norm_reference(x.double(), eps=1e-12)
        torch.testing.assert_close(rms_norm(x, eps=1e-12).double(), wanted, rtol=2e-3, atol=0)


def test_two_runs_agree_bit_for_bit(device: torch.device) -> None:
    inputs = make_inputs((150, 64), weight=True, residual=True)
    dtypes = dict.fromkeys(inputs, torch.float32)
    first = results(rms_norm, inputs, dtypes, device)
    for a, b in zip(first, results(rms_norm, inputs, dtypes, device), strict=True):
        assert torch.equal(a, b)


def test_no_rows(device: torch.device) -> None:
    inputs = {"x": torch.empty(0, 3, 8), "weight": torch.ones(8), "residual": None}
    y, dx, dw = results(rms_norm, inputs, dict.fromkeys(inputs, torch.float32), device)
    assert y.shape == dx.shape == (0, 3, 8)
    assert torch.equal(dw, torch.zeros(8).double())


def test_each_output_and_each_input_alone(device: torch.device) -> None:
    for used in (0, 1):
        grads = []
        for fn in (rms_norm, rms_norm_reference):
            generator = torch.Generator().manual_seed(0)
            x, r = (torch.randn(4, 8, generator=generator).to(device) for _ in range(2))
            w = torch.ones(8, device=device)
            leaves = [t.requires_grad_() for t in (x, w, r)]
            out = fn(x, w, residual=r)[used].square().sum()
            grads.append(torch.autograd.grad(out, leaves, allow_unused=True))
        for got, wanted in zip(*grads, strict=True):
            if wanted is None:
                assert got is None or not got.any()
            else:
                torch.testing.assert_close(got, wanted)
    x, w = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    frozen_weight = rms_norm(x.requires_grad_(), w).square().sum()
    wanted = torch.autograd.grad(rms_norm_reference(x, w).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen_weight, x)[0], wanted)
    x = x.detach()
    frozen_input = rms_norm(x, w.requires_grad_()).square().sum()
    wanted = torch.autograd.grad(rms_norm_reference(x, w).square().sum(), w)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen_input, w)[0], wanted)


def test_used_twice_in_one_graph(triton_device: torch.device) -> None:
    x = torch.randn(6, 24, device=triton_device, requires_grad=True)
    norm = RMSNorm(24, device=triton_device)
    norm(norm(x) * 3).square().sum().backward()
    wanted_x, w = x.detach().clone().requires_grad_(), torch.ones_like(norm.weight)
    w.requires_grad_()
    rms_norm_reference(rms_norm_reference(wanted_x, w) * 3, w).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, w.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(triton_device: torch.device, residual: bool) -> None:
    x, r = (torch.randn(3, 5, 24, device=triton_device, requires_grad=True) for _ in range(2))
    w = torch.rand(24, device=triton_device, requires_grad=True)
    op = getattr(torch.ops, OP)
    torch.library.opcheck(op.rms_norm.default, (x, w, r if residual else None, 1e-6, True))
    _, h, rstd = op.rms_norm(x, w, r, 1e-6, True)
    args = (torch.randn_like(h), None, h.detach(), w.detach(), rstd.detach(), True, True)
    torch.library.opcheck(op.rms_norm_backward.default, args)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradcheck_in_fp64(zero_centered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    w = torch.randn(5, dtype=torch.float64, generator=generator)
    leaves = [t.requires_grad_() for t in (x, w, r)]
    assert torch.autograd.gradcheck(
        lambda x, w, r: rms_norm(x, w, residual=r, zero_centered=zero_centered), leaves
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("path", ["kernels", "cpu"])
def test_compiles_to_one_graph(path: str, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_device") if path == "kernels" else "cpu"
    backend = "inductor" if path == "cpu" else "aot_eager"
    torch._dynamo.reset()
    norm = RMSNorm(40, zero_centered=True, device=device)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x, x * 2)

    grads = []
    for fn in (both, torch.compile(both, fullgraph=True, backend=backend)):
        x = torch.linspace(-2, 3, 240, device=device).view(6, 40).requires_grad_()
        y, h = fn(x)
        grads.append(torch.autograd.grad((y * y * h).sum(), (x, norm.weight)))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_it_alone(device: torch.device) -> None:
    inputs = make_inputs((7, 24), weight=True, residual=True)
    dtypes = {"x": torch.float16, "weight": torch.float32, "residual": torch.float32}
    plain = results(rms_norm, inputs, dtypes, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):  # the backward too
        inside = results(rms_norm, inputs, dtypes, device)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)
    y, h = rms_norm(torch.ones(2, 4).half(), residual=torch.ones(2, 4))
    assert y.dtype == h.dtype == torch.float32  # what x + residual promotes to


def test_eager_saves_the_input_and_one_number_a_row() -> None:
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    w = torch.ones(32, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, w)
    assert sorted(t.nbytes for t in saved) == sorted([x.nbytes, w.nbytes, 64 * 4])


# Samples with a negative eps: the interpreter computes its padding rows, 0 + eps, as well.
@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt:RuntimeWarning")
def test_torch_samples(device: torch.device) -> None:
    op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in op_db if op.name == "nn.functional.rms_norm"]
    checked = 0
    for sample in info.sample_inputs(str(device), torch.float32):
        shape, *rest = sample.args
        weight = rest[0] if rest else sample.kwargs.get("weight")
        eps = rest[1] if len(rest) > 1 else sample.kwargs.get("eps")
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        wanted = F.rms_norm(sample.input, shape, weight, eps)
        flat = sample.input.flatten(-len(shape))
        got = rms_norm(flat, None if weight is None else weight.flatten(), eps=eps)
        torch.testing.assert_close(got.view(wanted.shape), wanted)
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        (torch.ones(2, 4), torch.ones(5), None, r"weight .*\(4,\).*\(5,\)"),
        (torch.ones(2, 4), torch.ones(4, 1), None, r"weight .*\(4,\).*\(4, 1\)"),
        (torch.ones(2, 4), None, torch.ones(1, 4), r"residual .*\(2, 4\).*\(1, 4\)"),
        (torch.ones(2, 0), None, None, r"x .*\bD\b.*\(2, 0\)"),
        (torch.ones(2, 4, dtype=torch.int32), None, None, r"x .*torch\.int32"),
        (torch.ones(2, 4), torch.ones(4, device="meta"), None, r"weight .*\bmeta\b.*\bcpu\b"),
    ],
)
def test_errors_name_value_and_remedy(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(x, weight, residual=residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_eps_is_torchs_own(device: torch.device, dtype: torch.dtype) -> None:
    """The epsilon of what rows are summed in, which rows of this size show."""
    x = (torch.randn(4, 32) * 3e-4).to(device, dtype)
    if dtype == torch.float64:
        x *= 1e-5
    theirs = torch.nn.RMSNorm(32, dtype=dtype, device=device)
    ours = RMSNorm(32, theirs.eps, dtype=dtype, device=device)
    expected = theirs(x)
    half = dtype.itemsize == 2
    tolerances = {"rtol": 2 * torch.finfo(dtype).eps if half else 1e-5, "atol": 0}
    for y in (ours(x), rms_norm(x, eps=None), rms_norm_reference(x, eps=None)):
        torch.testing.assert_close(y, expected, **tolerances)
    plain = rms_norm(x, eps=1e-12).double()
    assert (plain / expected.double() - 1).abs().max() > 0.1  # it matters here
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


def test_module() -> None:
    norm = RMSNorm(8, eps=1e-3, zero_centered=True, dtype=torch.bfloat16)
    assert norm.weight is not None
    assert norm.weight.dtype == torch.bfloat16
    assert not norm.weight.any()
    assert repr(norm) == "RMSNorm(8, eps=0.001, zero_centered=True)"
    bare = RMSNorm(8, elementwise_affine=False)
    assert list(bare.parameters()) == []
    x = torch.randn(3, 8)
    torch.testing.assert_close(bare(x), rms_norm_reference(x))
    torch.testing.assert_close(norm(x), rms_norm_reference(x, eps=1e-3))
    with torch.device("meta"):
        assert RMSNorm(8).weight.device.type == "meta"


def test_weight_gradient_over_many_rows():
    """The sum over the rows of a batch is as good as torch's, which adds in a tree."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(8192, 64), torch.randn(64), torch.randn(8192, 64)

    def gradient(op, dtype):
        w = weight.to(dtype).requires_grad_()
        return torch.autograd.grad(op(x.to(dtype), w), w, dy.to(dtype))[0].double()

    exact = gradient(rms_norm_reference, torch.float64)
    ours, plain = (
        (gradient(op, torch.float32) - exact).abs().max() for op in (rms_norm, rms_norm_reference)
    )
    assert ours <= 2 * plain + 1e-5
