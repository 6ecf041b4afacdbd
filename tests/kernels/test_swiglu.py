"""swiglu, relu_squared and other elementwise ops: kernels, eager CPU path, compiled path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fasttrain_kernels.catalogue import ELEMENTWISE, Op
from fasttrain_kernels.swiglu import (
    relu_squared,
    relu_squared_reference,
    swiglu,
    swiglu_reference,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

# The interpreter truncates where bf16 stores round, so bf16 is tested on a GPU alone.
HALF_DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
SLACK = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
EVERY = pytest.mark.parametrize(
    "op", [make("fp32", 1) for make in ELEMENTWISE], ids=[make.__name__ for make in ELEMENTWISE]
)
NAMESPACE = swiglu.__module__.rpartition(".")[0].replace(".", "_")


def results(
    fn: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, device: torch.device | str = "cpu"
) -> list[Tensor]:
    leaves = [t.detach().to(device).requires_grad_() for t in inputs]
    y = fn(*leaves)
    grads = torch.autograd.grad(y, leaves, dy.to(y.device, y.dtype))
    return [t.detach().cpu().double() for t in (y, *grads)]


def assert_as_good_as_torch(
    op: Op, fn: Callable[..., Any], inputs: list[Tensor], device: torch.device | str
) -> None:
    """The error against fp64 is at most twice plain torch's own, plus the dtype's slack."""
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(inputs[0].shape, generator=generator).to(inputs[0].dtype)
    exact = results(op.torch, [t.double() for t in inputs], dy.double())
    torch_own = results(op.torch, inputs, dy)
    ours = results(fn, inputs, dy, device)
    for got, own, want in zip(ours, torch_own, exact, strict=True):
        assert got.shape == want.shape
        if want.numel():
            slack = SLACK[inputs[0].dtype] * max(1.0, want.abs().max().item())
            assert (got - want).abs().max() <= 2 * (own - want).abs().max() + slack


SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=2).flatmap(
    lambda lead: st.sampled_from([1, 7, 64, 300, 2049]).map(lambda n: (*lead, n))
)


@EVERY
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=SHAPES, dtype=st.sampled_from([torch.float32, *HALF_DTYPES]), fused=st.booleans())
def test_kernels_match_fp64(
    triton_device: torch.device,
    op: Op,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fused: bool,
) -> None:
    whole = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0))
    parts = whole.to(dtype).chunk(2, dim=-1)[: len(op.inputs)]  # the halves of one fused projection
    parts = tuple(parts if fused else (p.contiguous() for p in parts))
    assert_as_good_as_torch(op, op.ours, list(parts), triton_device)


@EVERY
@settings(max_examples=20)
@given(shape=SHAPES, dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_eager_cpu_path_matches_fp64(op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in op.inputs]
    assert_as_good_as_torch(op, op.ours, inputs, "cpu")
    assert_as_good_as_torch(op, op.reference, inputs, "cpu")


@EVERY
def test_strided_inputs_and_gradients(triton_device: torch.device, op: Op) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 3, 2, 32, generator=generator).to(triton_device)
    views = [base.transpose(0, 1), base[..., ::2], base[:, :, 1, 3:9], base[0, 0, 0].expand(3, 32)]
    for view in views:
        x = view.detach().requires_grad_()
        inputs = [x, x.flip(0)][: len(op.inputs)]
        incoming = torch.ones((), device=triton_device).expand(x.shape)
        (got,) = torch.autograd.grad(op.ours(*inputs), x, incoming)
        (wanted,) = torch.autograd.grad(op.reference(*inputs), x, incoming)
        torch.testing.assert_close(op.ours(*inputs), op.reference(*inputs))
        torch.testing.assert_close(got, wanted)


def test_rows_further_apart_than_int32(triton_device: torch.device) -> None:
    # Untouched pages of the buffer are never backed by memory, so 4 GiB apart costs nothing.
    stride = 2**31 + 64
    buffer = torch.empty(stride + 64, dtype=torch.float16, device=triton_device)
    x = buffer.as_strided((2, 64), (stride, 1))
    x.copy_(torch.linspace(-3, 3, 128).view(2, 64))
    other = torch.ones(2, 64, dtype=torch.float16, device=triton_device)
    torch.testing.assert_close(swiglu(x, other), swiglu_reference(x, other))
    torch.testing.assert_close(swiglu(other, x), swiglu_reference(other, x))
    torch.testing.assert_close(relu_squared(x), relu_squared_reference(x))


def test_nan_and_saturation(device: torch.device) -> None:
    x = torch.tensor([float("nan"), -60.0, -0.0, 0.0, 60.0], device=device)
    torch.testing.assert_close(relu_squared(x), torch.relu(x).square(), equal_nan=True)
    wanted = torch.nn.functional.silu(x) * 2
    torch.testing.assert_close(swiglu(x, torch.full_like(x, 2)), wanted, equal_nan=True)


@EVERY
def test_opcheck(triton_device: torch.device, op: Op) -> None:
    namespace, name = getattr(torch.ops, NAMESPACE), op.ours.__name__
    leaves = [torch.randn(3, 20, device=triton_device, requires_grad=True) for _ in op.inputs]
    torch.library.opcheck(getattr(namespace, name).default, leaves)
    args = [torch.randn(3, 20, device=triton_device) for _ in (None, *op.inputs)]
    torch.library.opcheck(getattr(namespace, f"{name}_backward").default, args)


@EVERY
def test_gradcheck_in_fp64(op: Op) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in op.inputs]
    assert torch.autograd.gradcheck(op.ours, [t.requires_grad_() for t in leaves])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiles_to_one_graph_and_matches() -> None:
    torch._dynamo.reset()

    def both(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up) + relu_squared(gate)

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(6, 40, generator=generator) for _ in range(2)]
    dy = torch.randn(6, 40, generator=generator)
    compiled = torch.compile(both, fullgraph=True, backend="inductor")
    wanted = results(both, inputs, dy)
    for a, b in zip(results(compiled, inputs, dy), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@EVERY
def test_two_runs_agree_bit_for_bit_also_under_autocast(
    triton_device: torch.device, op: Op
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(9, 50, generator=generator) for _ in op.inputs]
    dy = torch.randn(9, 50, generator=generator)
    first = results(op.ours, inputs, dy, triton_device)
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        second = results(op.ours, inputs, dy, triton_device)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EVERY
def test_eager_saves_its_inputs_alone(op: Op) -> None:
    leaves = [torch.randn(8, 16, requires_grad=True) for _ in op.inputs]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.ours(*leaves)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in leaves]


def test_mixed_dtypes_promote() -> None:
    gate, up = torch.ones(4, dtype=torch.bfloat16), torch.ones(4, requires_grad=True)
    gate.requires_grad_()
    y = swiglu(gate, up)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert gate.grad is not None
    assert gate.grad.dtype == torch.bfloat16


def test_errors_name_value_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"swiglu: gate and up .*\(2, 4\).*\(2, 5\)"):
        swiglu(torch.ones(2, 4), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"swiglu: gate and up .*\bcpu\b.*\bmeta\b"):
        swiglu(torch.ones(2), torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"swiglu: .*torch\.int64"):
        swiglu(torch.ones(2), torch.arange(2))
    with pytest.raises(ValueError, match=r"relu_squared: .*torch\.int64"):
        relu_squared(torch.arange(2))
