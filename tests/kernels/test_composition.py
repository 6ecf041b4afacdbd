"""Ops within torch's own machinery: transforms, hooks for saved tensors, counters, meta tensors."""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import (
    FusedAdamW,
    Muon,
    RMSNorm,
    apply_rope,
    apply_rope_reference,
    cross_entropy,
    cross_entropy_reference,
    grad_norm,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    relu_squared,
    relu_squared_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
    symmetric_matmul,
    triton_on_cpu,
)
from fasttrain_kernels._torch import fake_tensors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# Raised by torch's own code, for jvp and where it is compiled.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")

CPU = torch.device("cpu")
N, D, V = 4, 8, 13
SMALL_CHUNK = 1e-4
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0}
COS, SIN = torch.linspace(-1, 1, 8).view(2, 4).cos(), torch.linspace(-1, 1, 8).view(2, 4).sin()

# Name: op, reference, and the inputs that have a gradient. All take rows first.
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]


def rope_of(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor) -> Tensor:
        q, k = (x.view(*x.shape[:-1], 2, 1, 8) for x in (q, k))
        rotated = rotate(q, k, COS.to(q.device), SIN.to(q.device))
        return torch.cat([x.flatten(-3) for x in rotated], -1)

    return call


def loss_of(
    loss: Callable[..., Any], reduction: str, n_targets: int = N, **options: Any
) -> Callable[..., Tensor]:
    def call(*operands: Tensor) -> Tensor:
        targets = torch.tensor([1, -100, V - 1, 0][:n_targets], device=operands[0].device)
        value: Tensor = loss(*operands, targets, reduction=reduction, **options)
        return value

    return call


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    x, other, weight = torch.randn(N, D), torch.randn(N, D), torch.rand(D) + 0.5
    q, k = torch.randn(N, 16), torch.randn(N, 16)
    logits, hidden, head = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D)
    found: dict[str, Case] = {
        "rms_norm": (rms_norm, rms_norm_reference, (x, weight)),
        "rms_norm without a weight": (rms_norm, rms_norm_reference, (x,)),
        "rms_norm with a residual": (
            lambda x, r, w: torch.cat(rms_norm(x, w, residual=r), -1),
            lambda x, r, w: torch.cat(rms_norm_reference(x, w, residual=r), -1),
            (x, other, weight),
        ),
        "swiglu": (swiglu, swiglu_reference, (x, other)),
        "relu_squared": (relu_squared, relu_squared_reference, (x,)),
        "apply_rope": (rope_of(apply_rope), rope_of(apply_rope_reference), (q, k)),
    }
    for reduction in ("mean", "none"):
        for words, options in (("", {}), (" with options", OPTIONS)):
            found[f"cross_entropy {reduction}{words}"] = (
                loss_of(cross_entropy, reduction, **options),
                loss_of(cross_entropy_reference, reduction, **options),
                (logits,),
            )
            for mib, how in ((None, "at once"), (SMALL_CHUNK, "in chunks")):
                found[f"linear_cross_entropy {reduction} {how}{words}"] = (
                    loss_of(linear_cross_entropy, reduction, max_chunk_mib=mib, **options),
                    loss_of(linear_cross_entropy_reference, reduction, **options),
                    (hidden, head),
                )
    return found


CASES = cases()
every_case = pytest.mark.parametrize("name", CASES)


def on(device: torch.device, name: str) -> Case:
    op, reference, inputs = CASES[name]
    return op, reference, tuple(x.to(device) for x in inputs)


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def total(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar whose gradient is not constant."""
    return lambda *inputs: op(*inputs).sin().sum()


@every_case
def test_transforms_of_torch_func_are_those_of_the_reference(
    device: torch.device, name: str
) -> None:
    op, reference, inputs = on(device, name)
    numbers = tuple(range(len(inputs)))
    for transform in (
        lambda f: grad(total(f), numbers)(*inputs),
        lambda f: grad_and_value(total(f), numbers)(*inputs),
        lambda f: vjp(f, *inputs)[1](torch.ones_like(f(*inputs))),
        lambda f: jvp(f, inputs, tuple(x.cos() for x in inputs)),
        lambda f: jacrev(f)(*inputs),
        lambda f: hessian(total(f))(*inputs),
    ):
        same(transform(op), transform(reference))


@pytest.mark.parametrize(
    "op", [rms_norm, swiglu, relu_squared, cross_entropy, linear_cross_entropy]
)
def test_gradients_of_each_sample_are_those_of_a_loop(device: torch.device, op: Any) -> None:
    torch.manual_seed(1)
    shape = (3, 2, V) if op is cross_entropy else (3, 2, D)
    samples, parameter = torch.randn(shape, device=device), torch.rand(V, D, device=device)
    targets = torch.randint(V, (3, 2), device=device)

    def value(p: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if op is linear_cross_entropy:
            return linear_cross_entropy(x, p, t, z_loss=0.01)
        if op is cross_entropy:
            return cross_entropy(x * p.sum(), t, inplace=True)
        inputs = (x, p[0]) if op is rms_norm else (x * p[0],) * (2 if op is swiglu else 1)
        y: Tensor = op(*inputs)
        return y.sin().sum()

    together = vmap(grad(value), in_dims=(None, 0, 0))(parameter, samples, targets)
    values = vmap(value, in_dims=(None, 0, 0))(parameter, samples, targets)
    for i in range(3):
        leaf = parameter.clone().requires_grad_()
        loss = value(leaf, samples[i], targets[i])
        same(values[i], loss.detach())
        same(together[i], torch.autograd.grad(loss, leaf)[0])


def test_a_modules_gradient_of_each_sample(device: torch.device) -> None:
    norm, x = RMSNorm(D, device=device), torch.randn(3, 2, D, device=device)
    norm.eps = 0.1

    def value(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(norm, parameters, (x,))
        return y.sin().sum()

    grads = vmap(grad(value), in_dims=(None, 0))({"weight": norm.weight.detach()}, x)["weight"]
    for i in range(3):
        norm(x[i]).sin().sum().backward()
        same(grads[i], norm.weight.grad)
        norm.zero_grad()


@every_case
def test_batches_of_gradients_are_those_of_a_loop(device: torch.device, name: str) -> None:
    """With `is_grads_batched`, and with `vmap` of a backward pass: forward was not transformed."""
    op, reference, inputs = on(device, name)
    results = []
    for f in (op, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = f(*[x * 1 for x in leaves])
        batch = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel()).view_as(y)])

        def backward(dy: Tensor, y: Tensor = y, leaves: Any = leaves, **options: Any) -> Any:
            return torch.autograd.grad(y, leaves, dy, retain_graph=True, **options)

        batched = backward(batch, is_grads_batched=True)
        same(batched, vmap(backward)(batch))
        same(batched, tuple(map(torch.stack, zip(*map(backward, batch), strict=True))))
        results.append(batched)
    same(*results)


def test_second_derivatives_of_batches_of_gradients(device: torch.device) -> None:
    logits, targets = torch.randn(N, V, device=device), torch.arange(N, device=device)
    results = []
    for op in (cross_entropy, cross_entropy_reference):
        leaf = logits.clone().requires_grad_()
        losses = op(leaf * 1, targets, reduction="none")
        grads = torch.autograd.grad(
            losses, leaf, torch.eye(N, device=device), is_grads_batched=True, create_graph=True
        )[0]
        results.append(torch.autograd.grad(grads.square().sum(), leaf)[0])
    same(*results)


@every_case
def test_forward_mode_differentiation(device: torch.device, name: str) -> None:
    op, reference, inputs = on(device, name)
    tangents = []
    for f in (op, reference):
        with forward_ad.dual_level():
            y = f(*(forward_ad.make_dual(x, x.cos()) for x in inputs))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    same(*tangents)


@pytest.mark.parametrize("name", ["rms_norm", "linear_cross_entropy mean in chunks"])
def test_transforms_within_compiled_code(name: str) -> None:
    op, reference, inputs = CASES[name]
    compiled = torch.compile(lambda *x: grad(total(op))(*x), backend="aot_eager", fullgraph=True)
    same(compiled(*inputs), grad(total(reference))(*inputs))


def test_a_symmetric_product_of_each_sample() -> None:
    x = torch.randn(2, 256, 3)
    torch.testing.assert_close(vmap(symmetric_matmul)(x), x @ x.mT)


def losses(device: torch.device) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Losses whose gradient forward computes, with what gradients are of."""
    torch.manual_seed(2)
    logits, targets = torch.randn(N, V, device=device), torch.arange(N, device=device)
    hidden, head = torch.randn(N, D, device=device), torch.randn(V, D, device=device)
    bias = torch.randn(V, device=device)
    options: dict[str, Any] = {"max_chunk_mib": SMALL_CHUNK}
    return {
        "cross_entropy": (lambda x: cross_entropy(x * 1, targets), [logits]),
        "in place": (lambda x: cross_entropy(x * 1, targets, inplace=True), [logits]),
        "strided rows": (lambda x: cross_entropy((x * 1)[:, :9], targets), [logits]),
        "linear_cross_entropy": (
            lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, **options),
            [hidden, head, bias],
        ),
    }


LOSSES = [*losses(CPU)]


def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in inputs]


def live_bytes() -> int:
    """Return the bytes of all tensors that Python's objects refer to."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            with contextlib.suppress(RuntimeError):  # of a transform: without storage
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_all_that_backward_needs_passes_through_hooks(
    device: torch.device, name: str, factor: float
) -> None:
    """Copies that hooks have made, without the strides of what was saved, do as well."""
    loss, inputs = losses(device)[name]
    expected, leaves = leaves_of(inputs), leaves_of(inputs)
    (loss(*expected) * factor).backward()

    def pack(x: Tensor) -> tuple[list[float], torch.Size, torch.dtype]:
        return x.flatten().tolist(), x.shape, x.dtype

    def unpack(packed: Any) -> Tensor:
        values, shape, dtype = packed
        return torch.tensor(values, dtype=dtype, device=device).view(shape)

    before = live_bytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        value = loss(*leaves)
    assert live_bytes() - before <= 64, "tensors that no hook has seen"
    (value * factor).backward()
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_loss_keeps_no_gradient(
    device: torch.device, name: str, reentrant: bool
) -> None:
    loss, inputs = losses(device)[name]
    expected, leaves = leaves_of(inputs), leaves_of(inputs)
    loss(*expected).backward()
    before = live_bytes()
    value = checkpoint(loss, *leaves, use_reentrant=reentrant, preserve_rng_state=False)
    assert live_bytes() - before <= 64
    value.backward()
    for leaf, other in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "in place"])
def test_a_retained_graph_after_gradients_were_written_to(device: torch.device, name: str) -> None:
    """Backward hands out what forward has saved; what a user does to it changes nothing later."""
    loss, inputs = losses(device)[name]
    leaves = leaves_of(inputs)
    value = loss(*leaves)
    first = torch.autograd.grad(value * 3, leaves, retain_graph=True)
    for handed_out in first:
        handed_out.zero_()
    second = torch.autograd.grad(value, leaves, retain_graph=True)
    third = torch.autograd.grad(value, leaves)
    expected = leaves_of(inputs)
    loss(*expected).backward()
    for two, three, leaf in zip(second, third, expected, strict=True):
        torch.testing.assert_close(two, leaf.grad, rtol=1e-5, atol=1e-7)
        assert torch.equal(two, three)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_that_forward_computed_is_handed_out_without_a_copy(name: str) -> None:
    """Also as the gradient of a leaf, which autograd copies where something else refers to it."""
    loss, inputs = losses(CPU)[name]
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.data_ptr())
        return x

    leaves = leaves_of(inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss(*leaves)
    value.backward()
    shared = [leaf.grad.data_ptr() in saved for leaf in leaves]
    assert all(shared) if name == "linear_cross_entropy" else len(shared) == 1


def count(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        value = run()
        if value.requires_grad:
            value.backward()
    total: int = counter.get_total_flops()
    return total


@pytest.mark.parametrize("mib", [None, SMALL_CHUNK], ids=["at once", "in chunks"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_floating_point_operations_are_counted_as_those_of_torch(
    device: torch.device, mib: float | None, needs: tuple[bool, bool]
) -> None:
    targets = torch.arange(N, device=device)
    shapes = ((N, D), (V, D))
    hidden, head = (
        torch.randn(shape, device=device, requires_grad=need)
        for shape, need in zip(shapes, needs, strict=True)
    )
    plain = count(lambda: F.cross_entropy(F.linear(hidden, head), targets))
    assert plain == 2 * N * D * V * (1 + sum(needs))
    assert count(lambda: linear_cross_entropy(hidden, head, targets, max_chunk_mib=mib)) == plain
    # The gradients of each row's loss need the logits once more.
    rows = count(
        lambda: linear_cross_entropy(
            hidden, head, targets, max_chunk_mib=mib, reduction="none"
        ).sum()
    )
    assert rows == plain + 2 * N * D * V * any(needs)


def test_operations_of_a_symmetric_product_are_counted(
    triton_device: torch.device, any_size: None
) -> None:
    x = torch.randn(1, 264, 16, dtype=torch.float16, device=triton_device)
    counted = count(lambda: symmetric_matmul(x))
    assert counted in (264 * 265 * 16, 2 * 264 * 264 * 16)  # ours, and where it is cuBLAS's


META = torch.device("meta")


@every_case
def test_meta_tensors_give_shapes(name: str) -> None:
    op, _, inputs = CASES[name]
    value = op(*inputs)
    leaves = [x.to(META).requires_grad_() for x in inputs]
    y = op(*leaves)
    assert (y.shape, y.dtype, y.device, y.requires_grad) == (value.shape, value.dtype, META, True)
    y.sum().backward()
    for leaf in leaves:
        assert (leaf.grad.shape, leaf.grad.device) == (leaf.shape, META)
    with torch.no_grad():
        assert not op(*leaves).requires_grad


@every_case
def test_fake_tensors_give_shapes(device: torch.device, name: str) -> None:
    op, _, inputs = CASES[name]
    with fake_tensors():
        leaves = [torch.empty(x.shape, requires_grad=True) for x in inputs]
        y = op(*leaves)
        y.sum().backward()
        for leaf in leaves:
            assert leaf.grad.shape == leaf.shape
    assert y.shape == op(*inputs).shape


@pytest.mark.parametrize("place", ["cpu", "triton"])
@pytest.mark.parametrize("make", [FusedAdamW, Muon])
def test_optimizers_step_on_fake_tensors(make: Any, place: str) -> None:
    """As programs do that estimate the memory of a training without the device."""
    with fake_tensors(), triton_on_cpu() if place == "triton" else contextlib.nullcontext():
        param = nn.Parameter(torch.empty(16, 24))
        param.grad = torch.empty_like(param)
        optimizer = make([param], lr=0.1)
        clip = grad_norm([param.grad], 1.0).clip_coefficient
        optimizer.step(clip_coefficient=clip)
        shapes = {value.shape for value in optimizer.state[param].values() if value.ndim}
    assert shapes == {param.shape}
