"""Traps that concern several kernels: autocast, CUDA graphs, a device that is not current."""

import itertools

import pytest
import torch
from fasttrain_kernels import (
    FusedAdamW,
    cross_entropy,
    grad_norm,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    rms_norm,
    swiglu,
)
from fasttrain_kernels import _multi_tensor as multi_tensor
from fasttrain_kernels._multi_tensor import TensorTable

WIDTHS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "weight", "bias"), [*itertools.product(WIDTHS, repeat=3)])
def test_autocast_in_all_combinations(
    hidden: torch.dtype, weight: torch.dtype, bias: torch.dtype, cast: torch.dtype | None
) -> None:
    """Products are in autocast's dtype or in hidden's; gradients are in their operands'."""
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape).to(dtype).requires_grad_()
        for shape, dtype in (((6, 16), hidden), ((33, 16), weight), ((33,), bias))
    ]
    targets = torch.randint(0, 33, (6,))
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2])
    loss.backward()  # outside, as is usual
    assert loss.dtype == torch.float32
    assert [x.grad.dtype for x in leaves] == [hidden, weight, bias]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    reference = linear_cross_entropy_reference(exact[0], exact[1], targets, bias=exact[2])
    reference.backward()
    width = cast or hidden
    bound = 1e-5 if {width, weight, bias} == {torch.float32} else 3e-2
    for mine, right in zip([loss, *(x.grad for x in leaves)], [reference, *exact], strict=True):
        right = right if right is reference else right.grad
        assert (mine.double() - right).abs().max() <= bound * right.abs().max()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_where_no_product_is(
    triton_device: torch.device, cast: torch.dtype
) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(2, 5, 32, device=triton_device).unbind()
    targets = torch.randint(0, 32, (5,), device=triton_device)
    calls = (lambda: cross_entropy(x, targets), lambda: rms_norm(x), lambda: swiglu(x, y))
    for call in calls:
        with torch.autocast(triton_device.type, cast):
            under = call()
        assert torch.equal(under, call())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current() -> None:
    device = torch.device("cuda", 1)
    x = torch.randn(8, 64, device=device, requires_grad=True)
    weight = torch.randn(131, 64, device=device, requires_grad=True)
    targets = torch.randint(0, 131, (8,), device=device)
    loss = linear_cross_entropy(rms_norm(x), weight, targets)
    loss.backward()
    norm = grad_norm([x.grad, weight.grad], 1.0)
    FusedAdamW([x, weight]).step(clip_coefficient=norm.clip_coefficient)
    plain = linear_cross_entropy_reference(rms_norm(x.cpu()), weight.cpu(), targets.cpu())
    ours = linear_cross_entropy(rms_norm(x), weight, targets)
    torch.testing.assert_close(ours.cpu(), plain, rtol=1e-4, atol=1e-4)


def test_a_captured_launch_has_addresses_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay copies from memory that nobody else writes, to a table that nobody else reads."""
    table = TensorTable([3, 5], 1, torch.device("cpu"))
    assert table.on_device([10, 20]).tolist() == [[10, 20]]
    kept: list[object] = []
    monkeypatch.setattr(multi_tensor, "_kept_for_graphs", kept)
    with monkeypatch.context() as patch:
        patch.setattr(multi_tensor, "capturing", lambda _: True)
        first, second = table.on_device([30, 40]), table.on_device([50, 60])
    assert [t.tolist() for t in (first, second)] == [[[30, 40]], [[50, 60]]]
    sources = [x for x in kept if isinstance(x, torch.Tensor) and x.dim() == 1]
    assert [x.tolist() for x in sources] == [[30, 40], [50, 60]]
    assert any(x is first for x in kept)
    assert table.on_device([10, 20]).tolist() == [[10, 20]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_whole_step_in_a_cuda_graph() -> None:
    """Loss, gradients, norm and update are captured, and a replay does what a step does."""
    torch.manual_seed(2)

    def make() -> tuple[torch.nn.Parameter, FusedAdamW]:
        weight = torch.nn.Parameter(torch.ones(131, 64, device="cuda"))
        return weight, FusedAdamW([weight], lr=0.01)

    hidden = torch.randn(8, 64, device="cuda")
    targets = torch.randint(0, 131, (8,), device="cuda")

    def step(weight: torch.nn.Parameter, optimizer: FusedAdamW) -> None:
        weight.grad = None
        linear_cross_entropy(rms_norm(hidden), weight, targets).backward()
        norm = grad_norm([weight.grad], 1.0)
        optimizer.step(clip_coefficient=norm.clip_coefficient, found_inf=norm.found_inf)

    captured, eager = make(), make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        step(*eager)
    torch.testing.assert_close(captured[0], eager[0], rtol=1e-5, atol=1e-6)
