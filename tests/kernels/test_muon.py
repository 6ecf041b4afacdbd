"""Muon, newton_schulz and symmetric_matmul against fp64 and torch.optim.Muon."""

import contextlib
import copy
import importlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fasttrain_kernels
import pytest
import torch
from fasttrain_kernels.muon import Muon
from fasttrain_kernels.newton_schulz import newton_schulz, newton_schulz_reference, quintics
from fasttrain_kernels.symmetric import symmetric_matmul, symmetric_matmul_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPES = [(24, 24), (24, 60), (60, 24), (24, 24), (8, 60)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def conditioned(n: int, rows: int, cols: int, smallest: float, seed: int = 0) -> Tensor:
    """Matrices whose singular values run from 1 down to ``smallest``."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, rows, cols, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(gaussian, full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), s.shape[-1], dtype=torch.float64)
    return ((u * values) @ vh).float().to(DEVICE)


@pytest.mark.parametrize("shape", [(48, 48), (48, 60), (48, 200), (200, 48), (1, 7), (256, 300)])
@pytest.mark.parametrize("coefficients", ["polar_express", "quintic", "classic"])
def test_newton_schulz_matches_the_singular_values(
    shape: tuple[int, int], coefficients: str
) -> None:
    g = conditioned(2, *shape, 1e-2) * 1e-4
    out = newton_schulz(g, 5, coefficients, dtype=torch.float32)
    reference = newton_schulz_reference(g, 5, coefficients)
    assert out.shape == g.shape
    assert (out - reference).norm() <= 5e-4 * reference.norm()


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_polar_express_brings_singular_values_to_one(shape: tuple[int, int]) -> None:
    g = conditioned(2, *shape, 1e-2)
    s = torch.linalg.svdvals(newton_schulz(g, 6, dtype=torch.float32))
    assert s.min() > 0.99
    assert s.max() < 1.01
    s = torch.linalg.svdvals(newton_schulz(g, 5, dtype=torch.float32))
    assert s.min() > 0.85
    assert s.max() < 1.15


def test_coefficients_are_the_papers() -> None:
    # arXiv:2505.16932, lower bound 1e-3, before the safety factor of 1.01.
    first = [v * 1.01**k for v, k in zip(quintics("polar_express", 8)[0], (1, 3, 5), strict=True)]
    torch.testing.assert_close(
        torch.tensor(first), torch.tensor([8.2872, -23.5959, 17.3004]), rtol=1e-3, atol=0
    )
    last = quintics("polar_express", 8)[-1]
    torch.testing.assert_close(torch.tensor(last), torch.tensor([1.875, -1.25, 0.375]))


def test_bf16_products_stay_near_the_reference() -> None:
    g = conditioned(2, 32, 96, 0.1)
    out = newton_schulz(g, 5, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    reference = newton_schulz_reference(g, dtype=torch.bfloat16)
    assert (out.double() - reference).norm() < 0.1 * reference.norm()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e5])
@pytest.mark.parametrize("kind", ["flat", "rank 1", "normal"])
def test_fp16_products_stay_in_range(kind: str, scale: float) -> None:
    """Norms far from 1, and spectra for which 1/‖A²‖ leaves the range of fp16."""
    g = {
        "flat": torch.eye(512)[None],
        "rank 1": torch.ones(1, 300, 300),
        "normal": torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0)),
    }[kind]
    got = newton_schulz(scale * g, dtype=torch.float16)
    assert got.dtype == torch.float16
    torch.testing.assert_close(
        got.float(), newton_schulz(g, dtype=torch.float32), rtol=0, atol=0.03
    )


def be_one_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a batch take whatever it is given for the group of ranks over which it is sharded."""
    alone = SimpleNamespace(
        get_world_size=lambda _: 1, get_rank=lambda _: 0,
        all_to_all_single=lambda out, sent, *_, **__: out.copy_(sent),
    )  # fmt: skip
    monkeypatch.setattr(importlib.import_module("fasttrain_kernels.muon"), "dist", alone)


def test_sharded_muon_indexes_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA tensor indexed by a list of numbers waits until they are uploaded."""
    module = importlib.import_module("fasttrain_kernels.muon")

    class Indexing(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen += "index" in func.__name__
            return func(*args, **(kwargs or {}))

    be_one_of_one_rank(monkeypatch)
    directions = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    group = {"ns_steps": 5, "coefficients": "polar_express"}
    batch = module.MatrixStack(group, 1.0, (8, 12), object(), 2)
    with Indexing() as mode:
        got = batch.orthogonalise(directions.clone(), torch.float32)
    assert not mode.seen
    expected = newton_schulz(directions, dtype=torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_sharded_directions_below_the_range_of_fp16_survive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be_one_of_one_rank(monkeypatch)
    directions = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    group = {"ns_steps": 5, "coefficients": "polar_express"}
    batch = importlib.import_module("fasttrain_kernels.muon").MatrixStack(
        group, 1.0, (8, 24), object(), 0
    )
    got = batch.orthogonalise(1e-9 * directions, torch.float16)
    expected = newton_schulz(directions, dtype=torch.float32)
    assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("is_native", [True, False])
def test_products_are_in_half_precision_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, is_native: bool
) -> None:
    module = importlib.import_module("fasttrain_kernels.newton_schulz")
    monkeypatch.setattr(module, "native_bf16", lambda _: is_native)
    found = [module.products_dtype(torch.device(kind)) for kind in ("cuda", "cpu")]
    assert found == ([torch.float16, torch.bfloat16] if is_native else [torch.float32] * 2)


def test_batched_equals_single_and_reruns_are_identical() -> None:
    g = conditioned(3, 40, 100, 0.01)
    whole = newton_schulz(g, dtype=torch.float32)
    for matrix, expected in zip(g, whole, strict=True):
        single = newton_schulz(matrix, dtype=torch.float32)
        torch.testing.assert_close(single, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(whole, newton_schulz(g, dtype=torch.float32))
    assert torch.equal(newton_schulz(g.view(3, 1, 40, 100), dtype=torch.float32)[:, 0], whole)


def test_zero_and_empty_matrices() -> None:
    assert newton_schulz(torch.zeros(2, 5, 9, device=DEVICE)).abs().max() == 0
    assert newton_schulz(torch.zeros(0, 5, 9, device=DEVICE)).shape == (0, 5, 9)
    assert newton_schulz(torch.zeros(5, 0, device=DEVICE)).shape == (5, 0)


@settings(max_examples=8)
@given(
    n=st.integers(1, 2),
    rows=st.sampled_from([8, 136, 264, 520]),
    cols=st.sampled_from([8, 64, 72, 200]),
    half=st.booleans(),
    with_add=st.booleans(),
)
def test_symmetric_matmul_matches_fp64(
    any_size: None, n: int, rows: int, cols: int, half: bool, with_add: bool
) -> None:
    dtype = torch.float16 if half else torch.float32
    x = torch.randn(n, rows, cols, device=DEVICE).to(dtype)
    add = torch.randn(n, rows, rows, device=DEVICE)
    add = (add + add.mT).to(dtype) if with_add else None
    with fasttrain_kernels.triton_on_cpu():
        out = symmetric_matmul(x, add=add, alpha=0.5, beta=-2.0)
    expected = symmetric_matmul_reference(x, add=add, alpha=0.5, beta=-2.0)
    plain = 0.5 * (x @ x.mT) + (0 if add is None else -2.0 * add)
    floor = 1e-3 if half else 1e-5
    limit = 2 * (plain.double() - expected).abs().max() + floor * expected.abs().max()
    assert (out.double() - expected).abs().max() <= limit
    if half:  # a tile off the diagonal and its mirror image are the same numbers
        assert torch.equal(out[:, :256, 256:], out[:, 256:, :256].mT)


def test_operands_need_not_be_aligned(any_size: None, triton_device: torch.device) -> None:
    """TMA reads from multiples of 16 bytes on."""
    x = torch.randn(8 * 64 + 1, device=triton_device).half()[1:].view(1, 8, 64)
    torch.testing.assert_close(symmetric_matmul(x), x @ x.mT, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "shape", "is_launched"),
    [
        (torch.float16, (16, 2048, 64), True),
        (torch.bfloat16, (2, 4096, 64), True),
        (torch.bfloat16, (24, 1024, 64), False),  # too few tiles
        (torch.bfloat16, (64, 768, 64), False),  # too many of all tiles are on the diagonal
        (torch.bfloat16, (2, 4096, 60), False),  # rows that TMA cannot read
        (torch.float32, (2, 4096, 64), False),
    ],
)
@pytest.mark.parametrize("arch", [80, 90, 100, "gfx90a"])
def test_the_kernel_runs_where_it_is_predicted_ahead_of_cublas(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    is_launched: bool,
    arch: Any,
) -> None:
    module = importlib.import_module("fasttrain_kernels.symmetric")
    monkeypatch.setattr(module, "target", lambda _: SimpleNamespace(arch=arch))
    with fasttrain_kernels.triton_on_cpu():
        assert module._pays(torch.empty(shape, dtype=dtype)) == (is_launched and arch == 90)


@pytest.mark.parametrize("rows", [5, 256, 301])
def test_symmetric_matmul_does_not_read_what_counts_nothing(rows: int) -> None:
    x, nothing = torch.randn(rows, 8), torch.full((rows, rows), torch.nan)
    torch.testing.assert_close(symmetric_matmul(x, add=nothing, beta=0.0), symmetric_matmul(x))


def test_symmetric_matmul_of_no_columns_is_zero() -> None:
    assert torch.equal(symmetric_matmul(torch.zeros(3, 0)), torch.zeros(3, 3))
    assert symmetric_matmul(torch.zeros(0, 3, 4)).shape == (0, 3, 3)


@pytest.mark.parametrize("rows", [5, 256, 301])
def test_symmetric_matmul_on_the_cpu(rows: int) -> None:
    x = torch.randn(2, rows, 70)
    out = symmetric_matmul(x, add=torch.eye(rows).expand(2, rows, rows), alpha=2.0)
    expected = symmetric_matmul_reference(x, add=torch.eye(rows).expand(2, rows, rows), alpha=2.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=rf"symmetric_matmul: add .*\(2, {rows}, {rows}\)"):
        symmetric_matmul(x, add=x)


def test_newton_schulz_through_the_triton_product(
    any_size: None, triton_device: torch.device
) -> None:
    g = conditioned(1, 136, 400, 0.1).to(triton_device)
    with fasttrain_kernels.triton_on_cpu():
        out = newton_schulz(g, 3, dtype=torch.float16)
    reference = newton_schulz_reference(g, 3)
    assert (out - reference).norm() <= 1e-2 * reference.norm()


@pytest.mark.parametrize("coefficients", ["polar_express", "quintic"])
@pytest.mark.parametrize("smallest", [1e-3, 1e-6])
def test_gram_newton_schulz_in_fp16_is_nearer_than_the_direct_form_in_bf16(
    smallest: float, coefficients: str
) -> None:
    """Without the restart it is NaN, or 38 times as large, from 1e-3 on."""
    g = conditioned(1, 96, 384, smallest)
    reference = newton_schulz_reference(g, 5, coefficients)
    far = newton_schulz(g, 5, coefficients, dtype=torch.bfloat16).double() - reference
    near = newton_schulz(g, 5, coefficients, dtype=torch.float16).double() - reference
    assert near.norm() <= 0.25 * far.norm()
    assert near.norm() <= 0.06 * reference.norm()


@pytest.mark.parametrize("steps", [5, 8, 10])
@pytest.mark.parametrize("coefficients", ["polar_express", "quintic"])
def test_gram_newton_schulz_in_fp32_does_not_drift(steps: int, coefficients: str) -> None:
    """Without a restart eight of Jordan's steps end 13 times as large."""
    g = conditioned(1, 96, 10, 0.1) @ conditioned(1, 10, 288, 0.1)
    g = g + 1e-6 * conditioned(1, 96, 288, 0.1)
    reference = newton_schulz_reference(g, steps, coefficients)
    out = newton_schulz(g, steps, coefficients, dtype=torch.float32)
    assert (out - reference).norm() <= 0.05 * reference.norm()


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in SHAPES]


def set_grads(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def reference_step(
    p: Tensor, grad: Tensor, momentum: Tensor, lr: float, decay: float, scale: str
) -> tuple[Tensor, Tensor]:
    m = 0.95 * momentum + 0.05 * grad.double()
    update = newton_schulz_reference(0.05 * grad.double() + 0.95 * m)
    rows, cols = p.shape
    factor = {"match_adamw": 0.2 * math.sqrt(max(rows, cols)), "none": 1.0}.get(
        scale, math.sqrt(max(1.0, rows / cols))
    )
    return (1 - lr * decay) * p.double() - lr * factor * update, m


@pytest.mark.parametrize("scale", ["match_adamw", "spectral", "none"])
def test_muon_matches_reference(scale: str) -> None:
    params = make()
    optimizer = Muon(params, 0.03, weight_decay=0.1, scale=scale, ns_dtype=torch.float32)
    momenta = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for step in range(3):
        set_grads(params, step)
        clip = torch.tensor(0.5, device=DEVICE)
        expected = [
            reference_step(p.detach(), 0.5 * p.grad, m, 0.03, 0.1, scale)
            for p, m in zip(params, momenta, strict=True)
        ]
        optimizer.step(clip_coefficient=clip)
        for i, (p, (value, momentum)) in enumerate(zip(params, expected, strict=True)):
            assert (p - value).norm() <= 2e-3 * 0.03 * 0.2 * math.sqrt(p.numel() * 60)
            buffer = optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(buffer.double(), momentum, rtol=1e-5, atol=1e-6)
            momenta[i] = momentum


def test_update_has_the_size_of_adamws() -> None:
    p = nn.Parameter(torch.zeros(64, 256, device=DEVICE))
    p.grad = torch.randn(64, 256, device=DEVICE)
    Muon([p], 1.0).step()
    assert 0.15 < p.detach().square().mean().sqrt().item() < 0.25  # AdamW's is 0.2 to 0.4


def test_found_inf_leaves_every_bit() -> None:
    params = make()
    optimizer = Muon(params, weight_decay=0.1)
    set_grads(params, 0)
    optimizer.step(found_inf=torch.zeros((), device=DEVICE))
    snapshot = [(p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in params]
    set_grads(params, 1)
    params[1].grad[0, 0] = math.nan
    optimizer.step(found_inf=torch.ones((), device=DEVICE))
    for p, (value, momentum) in zip(params, snapshot, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_kernels_do_what_torch_does(nesterov: bool) -> None:
    """Strided, tall, wide and unaligned matrices; a learning rate and a flag on the device."""
    runs = []
    for device, path in (
        ("cpu", contextlib.nullcontext),
        (DEVICE, fasttrain_kernels.triton_on_cpu),
    ):
        strided = torch.arange(9 * 24.0).sin().view(9, 24).t()
        params = [nn.Parameter(p.detach().to(device)) for p in [*make(), strided]]
        options = {"weight_decay": 0.1, "nesterov": nesterov, "ns_dtype": torch.float32}
        optimizer = Muon(params, torch.tensor(0.1, device=device), **options)
        for step in range(4):
            set_grads(params, step)
            if step == 2:
                params[0].grad[0, 0] = math.nan
            scalars = torch.tensor([0.5, step == 2], device=device).unbind()
            with path():
                optimizer.step(clip_coefficient=scalars[0], found_inf=scalars[1])
        momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
        runs.append([t.detach().cpu() for t in (*params, *momenta)])
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 12), (0, 12)])
def test_shards_go_through_the_kernels(
    triton_device: torch.device, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_one_of_one_rank(monkeypatch)
    group = {"ns_steps": 5, "coefficients": "polar_express", "momentum": 0.95, "nesterov": True}
    group |= {"lr": 0.1, "weight_decay": 0.1}
    weights, grads, momenta = torch.randn(3, 5, *shape, device=triton_device)
    results = []
    for ranks in (object(), None):
        batch = importlib.import_module("fasttrain_kernels.muon").MatrixStack(
            group, 1.0, shape, ranks, 3
        )
        batch.momenta = list(momenta.clone())
        moved = list(weights.clone())
        flag = torch.zeros((), device=triton_device)
        if ranks is None:
            batch.update_in_torch(moved, list(grads), torch.float32, None)
        else:
            batch.update(moved, list(grads), torch.float32, None, flag)
            batch.update(moved, list(grads), torch.float32, None, flag + 1)  # does nothing
        results.append([*moved, *batch.momenta])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def for_each_number_of_threads(run: Callable[[], Tensor]) -> list[Tensor]:
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in range(1, 7):
            torch.set_num_threads(n_threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def test_what_is_added_to_products_in_bf16_does_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the products themselves the library decides that multiplies."""
    module = importlib.import_module("fasttrain_kernels.newton_schulz")
    monkeypatch.setattr(module, "symmetric_product", lambda a, b: a * b)
    gram = torch.randn(8, 128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = for_each_number_of_threads(lambda: module._tighten(gram, -4.775, 2.0315)[1])
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("shape", [(64, 2051), (257, 515)])  # not whole vectors a thread
def test_an_update_of_bf16_weights_does_not_depend_on_the_number_of_threads(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fasttrain_kernels.muon")
    monkeypatch.setattr(module, "newton_schulz", lambda g, *_, dtype: g.to(dtype))
    start, grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    def step() -> Tensor:
        param = nn.Parameter(start.clone())
        param.grad = grad.clone()
        options = {"momentum": 0.0, "scale": "none", "weight_decay": 0.1}
        Muon([param], lr=0.615, ns_dtype=torch.float32, **options).step()
        return param.detach()

    results = for_each_number_of_threads(step)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 43), (torch.bfloat16, 46)])
def test_a_step_moves_few_bytes_and_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int
) -> None:
    """Bytes a parameter outside the products in half precision, with shapes as of GPT-2.

    What the two kernels move, 16 and 10 bytes, test_bytes counts; here they do not run.
    """

    class Counting(TorchDispatchMode):
        moved, calls = 0, 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            assert name not in {"_local_scalar_dense", "nonzero", "equal", "index"}
            if not (func.is_view or "empty" in name or "bmm" in name):
                written = name == "copy_"  # and not read; out= is what is returned
                read = args[written:], {k: v for k, v in (kwargs or {}).items() if k != "out"}
                tensors = [t for t in tree_leaves((read, out)) if torch.is_tensor(t)]
                self.moved += sum(t.nbytes for t in tensors)
                self.calls += 1
            return out

    module, launched = importlib.import_module("fasttrain_kernels.muon"), []
    for name in ("muon_direction_kernel", "muon_apply_kernel"):
        kernel = {(1,): lambda *_, name=name, **__: launched.append(name)}
        monkeypatch.setattr(module, name, kernel)
    tables = importlib.import_module("fasttrain_kernels._multi_tensor")
    monkeypatch.setattr(tables, "launch_grid", lambda *_: 1)
    shapes = [(192, 64), (64, 64), (256, 64), (64, 256)] * 3
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Muon(params, torch.tensor(0.1), weight_decay=0.1, ns_dtype=dtype)
    set_grads(params, 0)
    with fasttrain_kernels.triton_on_cpu():
        for mode in (contextlib.nullcontext(), Counting()):  # the first step makes tables
            launched.clear()
            with mode:
                optimizer.step(clip_coefficient=torch.tensor(0.5), found_inf=torch.tensor(0.0))
    assert len(launched) == 2 * 4  # before and after each shape
    assert 16 + 10 + mode.moved / sum(p.numel() for p in params) <= most
    assert mode.calls <= 26 * 4  # of a shape, small numbers included


def test_state_dict_continues_a_run_and_matches_torchs_keys() -> None:
    a, b = make(), make()
    x, y = Muon(a, 0.1), Muon(b, 0.1)
    for step in range(4):
        if step == 2:  # y is replaced by an optimizer that loads its state
            saved = copy.deepcopy(y.state_dict())
            y = Muon(b)
            y.load_state_dict(saved)
            assert y.param_groups[0]["lr"] == 0.1
        for params, optimizer in ((a, x), (b, y)):
            set_grads(params, step)
            optimizer.step()
    assert all(map(torch.equal, a, b))
    assert set(x.state[a[0]]) == {"momentum_buffer"}
    theirs = torch.optim.Muon(make(), lr=0.1)
    theirs.load_state_dict({**theirs.state_dict(), "state": copy.deepcopy(x.state_dict()["state"])})
    for p, q in zip(theirs.param_groups[0]["params"], a, strict=True):
        assert torch.equal(theirs.state[p]["momentum_buffer"], x.state[q]["momentum_buffer"])


def test_params_without_gradient_and_new_addresses() -> None:
    a, b = make(), make()
    x, y = Muon(a, 0.1), Muon(b, 0.1)
    for step, absent in enumerate([(0,), (), (1, 3), ()]):
        set_grads(a, step)
        set_grads(b, step)
        for i in absent:
            a[i].grad = b[i].grad = None
        b[2].data = b[2].detach().clone()
        x.step()
        y.step()
    assert all(map(torch.equal, a, b))
    untouched = make()[0]
    p = nn.Parameter(untouched.detach().clone())
    Muon([p]).step()
    assert torch.equal(p, untouched)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -0.1}, r"Muon: lr .*-0\.1"),
        ({"momentum": 1.0}, r"Muon: momentum .*1\.0"),
        ({"weight_decay": -1.0}, r"Muon: weight_decay .*-1\.0"),
        ({"scale": "big"}, "Muon: scale .*'spectral'.*'big'"),
        ({"ns_steps": 0}, r"steps .*\b1\b.*\b0\b"),
        ({"coefficients": "cubic"}, "coefficients .*'quintic'.*'cubic'"),
        ({"coefficients": [(1.0, 2.0)]}, r"newton_schulz: .*\bcoefficients \(a, b, c\)"),
        ({"lr": torch.ones(2)}, r"Muon: .*\blr .*\b2\b"),
    ],
)
def test_errors_name_the_value(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Muon(make(), **options)  # type: ignore[arg-type]


def test_vectors_are_refused() -> None:
    optimizer = Muon(make())
    with pytest.raises(ValueError, match=r"Muon: .*matrices.*\(4,\).*FusedAdamW"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))]})
    assert len(optimizer.param_groups) == 1
