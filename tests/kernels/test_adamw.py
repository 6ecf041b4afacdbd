"""FusedAdamW against its fp64 reference, torch.optim.AdamW, and what broke other optimizers."""

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fasttrain_kernels
import pytest
import torch
from fasttrain_kernels import _multi_tensor, cpu
from fasttrain_kernels.adamw import FusedAdamW, adamw_reference
from fasttrain_kernels.grad_norm import grad_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

SHAPES = [(33, 20), (0,), (8192 + 255,), (7,), (), (3, 1, 5)]


@pytest.fixture(params=["cpu", "cpp", "triton"])
def path(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs in torch and in C++ on the CPU, and on the Triton path."""
    if request.param != "cpu":
        return request.getfixturevalue(f"{request.param}_device")
    return torch.device("cpu")


def make(shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(t.to(device, dtype)) for t in tensors]


def set_grads(params: list[Tensor], seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def assert_close_to_reference(
    dtype: torch.dtype, device: torch.device, steps: int = 3, **options: Any
) -> None:
    """The error against fp64 is at most twice the rounding of the stored result, plus 1e-5."""
    params = make(SHAPES, device, dtype)
    optimizer = FusedAdamW(params, **options)
    hyper = {"lr": 1e-3, **options}
    unit = torch.finfo(dtype).eps
    for step in range(1, steps + 1):
        set_grads(params, step)
        expected = []
        for p in params:
            state = optimizer.state.get(p) or {}
            m, v = (state.get(k, torch.zeros_like(p)).detach() for k in ("exp_avg", "exp_avg_sq"))
            expected.append(adamw_reference(p.detach(), p.grad, m, v, step, scale=0.5, **hyper))
        optimizer.step(clip_coefficient=torch.tensor(0.5, device=device))
        for p, reference in zip(params, expected, strict=True):
            state = optimizer.state[p]
            stored = (p.detach(), state["exp_avg"], state["exp_avg_sq"])
            for actual, wanted in zip(stored, reference, strict=True):
                error = (actual.double() - wanted).abs()
                assert (error <= unit * wanted.abs() + 1e-5 * hyper["lr"] + 1e-7).all()
            assert state["step"].item() == step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matches_reference(path: torch.device, dtype: torch.dtype) -> None:
    assert_close_to_reference(dtype, path)


def test_bf16_matches_reference() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # see the interpreter
    assert_close_to_reference(torch.bfloat16, device)


@settings(max_examples=12)
@given(
    lr=st.floats(1e-5, 1e-1),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.95, 0.9999])),
    weight_decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    triton=st.booleans(),
)
def test_matches_reference_for_any_hyperparameters(
    lr: float, betas: tuple[float, float], weight_decay: float, maximize: bool, triton: bool
) -> None:
    options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
    if torch.cuda.is_available():
        assert_close_to_reference(torch.float32, torch.device("cuda"), 2, **options)
    elif triton:
        with fasttrain_kernels.triton_on_cpu():
            assert_close_to_reference(torch.float32, torch.device("cpu"), 2, **options)
    else:
        assert_close_to_reference(torch.float32, torch.device("cpu"), 2, **options)


def run_torch(
    params: list[Tensor], optimizer: Any, steps: range, clip: float | None = None
) -> None:
    for step in steps:
        set_grads(params, step)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def assert_params_close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, None])
def test_state_dict_interchanges_with_torch(path: torch.device, fused: bool | None) -> None:
    ours, theirs = make(SHAPES, path, torch.float32), make(SHAPES, path, torch.float32)
    groups = lambda params: [{"params": params[:2], "lr": 3e-3}, {"params": params[2:]}]  # noqa: E731
    a = FusedAdamW(groups(ours), lr=1e-2)
    b = torch.optim.AdamW(groups(theirs), lr=1e-2, fused=fused)
    run_torch(ours, a, range(3))
    run_torch(theirs, b, range(3))
    assert_params_close(ours, theirs)
    saved_a, saved_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    a, b = FusedAdamW(groups(ours)), torch.optim.AdamW(groups(theirs), fused=fused)
    a.load_state_dict(saved_b)  # each continues the other's run
    b.load_state_dict(saved_a)
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] == 3e-3
    run_torch(ours, a, range(3, 6))
    run_torch(theirs, b, range(3, 6))
    assert_params_close(ours, theirs)
    assert a.state[ours[0]]["step"].item() == 6
    assert a.state[ours[0]]["step"].dtype == torch.float32


def test_load_replaces_tensors_behind_the_cached_table(path: torch.device) -> None:
    params = make(SHAPES, path, torch.float32)
    optimizer = FusedAdamW(params)
    run_torch(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in params]
    run_torch(params, optimizer, range(2, 4))
    after = [p.detach().clone() for p in params]
    for p, value in zip(params, before, strict=True):
        p.data = value.clone()  # a new address too
    optimizer.load_state_dict(saved)
    run_torch(params, optimizer, range(2, 4))
    assert all(map(torch.equal, params, after))
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.state_dict()["state"][2]["step"].item() == 4


def test_found_inf_leaves_every_bit(path: torch.device) -> None:
    params = make(SHAPES, path, torch.float32) + make([(40, 3)], path, torch.float16)
    optimizer = FusedAdamW(params, master_weights=True)
    run_torch(params, optimizer, range(2))
    snapshot = copy.deepcopy([[p.detach(), optimizer.state[p]] for p in params])
    set_grads(params, 5)
    params[0].grad[1, 2] = float("inf")
    params[2].grad[3] = float("nan")
    result = grad_norm([p.grad for p in params], 1.0)
    assert result.found_inf.item() == 1
    optimizer.step(clip_coefficient=result.clip_coefficient, found_inf=result.found_inf)
    for p, (value, state) in zip(params, snapshot, strict=True):
        assert torch.equal(p, value)
        for key, tensor in state.items():
            assert torch.equal(optimizer.state[p][key], tensor), key
    set_grads(params, 6)
    optimizer.step(found_inf=torch.zeros((), device=path))
    assert optimizer.state[params[0]]["step"].item() == 3
    assert not torch.equal(params[0], snapshot[0][0])


def test_grad_scale_divides_and_clip_multiplies(path: torch.device) -> None:
    a, b = make(SHAPES, path, torch.float32), make(SHAPES, path, torch.float32)
    set_grads(a, 1, size=1024.0)
    set_grads(b, 1, size=0.25)
    scale, clip = torch.tensor(1024.0, device=path), torch.tensor(0.25, device=path)
    FusedAdamW(a).step(grad_scale=scale, clip_coefficient=clip)
    FusedAdamW(b).step()
    assert_params_close(a, b)


def test_clipping_matches_torch(path: torch.device) -> None:
    a, b = make(SHAPES, path, torch.float32), make(SHAPES, path, torch.float32)
    x, y = FusedAdamW(a), torch.optim.AdamW(b)
    for step in range(3):
        set_grads(a, step)
        result = grad_norm([p.grad for p in a], 1.0)
        x.step(clip_coefficient=result.clip_coefficient, found_inf=result.found_inf)
    run_torch(b, y, range(3), clip=1.0)
    assert_params_close(a, b)


@pytest.mark.parametrize("kernel", ["cpp", "triton"])
def test_gradients_are_only_read_by_the_kernel(kernel: str, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue(f"{kernel}_device")
    params = make(SHAPES, device, torch.float32)
    set_grads(params, 1)
    grads = [p.grad.clone() for p in params]
    FusedAdamW(params).step(clip_coefficient=torch.tensor(0.5, device=device))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


def test_no_bit_depends_on_the_number_of_threads(cpp_device: torch.device) -> None:
    def after_three_steps(n_threads: int, optimizer: type = FusedAdamW) -> list[Tensor]:
        params = make([*SHAPES, (3 << 14,)], cpp_device, torch.float32)
        torch.set_num_threads(n_threads)
        run_torch(params, optimizer(params, lr=1e-2, betas=(0.3, 0.6)), range(3))
        return params

    before = torch.get_num_threads()
    try:
        one, *others = map(after_three_steps, (1, 2, 3))
        assert_params_close(one, after_three_steps(1, torch.optim.AdamW))
    finally:
        torch.set_num_threads(before)
    for params in others:
        assert all(map(torch.equal, params, one))


def test_a_first_beta_of_zero_forgets_large_gradients(cpp_device: torch.device) -> None:
    (param,) = make([(100,)], cpp_device, torch.float32)
    optimizer = FusedAdamW([param], betas=(0.0, 0.0), lr=0.1, weight_decay=0.0)
    for gradient in (1e8, 1.0):
        before = param.detach().clone()
        param.grad = torch.full_like(param, gradient)
        optimizer.step()
    torch.testing.assert_close(before - param, torch.full_like(param, 0.1), rtol=1e-5, atol=1e-6)


def test_a_backward_pass_through_updated_parameters_is_refused(cpp_device: torch.device) -> None:
    (param,) = make([(100,)], cpp_device, torch.float32)
    set_grads([param], 1)
    loss = param.square().sum()
    FusedAdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_moments_that_cpp_cannot_take_are_not_taken(cpp_device: torch.device) -> None:
    (param,) = make([(100,)], cpp_device, torch.float32)
    optimizer = FusedAdamW([param])
    run_torch([param], optimizer, range(1))
    state = optimizer.state[param]
    state["exp_avg"] = state["exp_avg"].bfloat16()
    before = [t.detach().clone() for t in (param, state["exp_avg"], state["exp_avg_sq"])]
    run_torch([param], optimizer, range(1, 2))
    expected = adamw_reference(before[0], param.grad, *before[1:], 2, lr=1e-3)
    for ours, exact in zip((param, state["exp_avg"], state["exp_avg_sq"]), expected, strict=True):
        tolerance = {"rtol": 1e-2, "atol": 0} if ours.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(ours.detach(), exact.to(ours.dtype), **tolerance)


def test_where_it_cannot_be_built_torch_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpp_device: torch.device
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "under"))
    monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)
    monkeypatch.setattr(cpu.optimizer, "load_or_warn", cache(cpu.load_or_warn.__wrapped__))
    a, b = make(SHAPES, cpp_device, torch.float32), make(SHAPES, cpp_device, torch.float32)
    with pytest.warns(UserWarning, match=r"optimizer\.cpp .*Not a directory"):
        run_torch(a, FusedAdamW(a), range(3))
    run_torch(b, torch.optim.AdamW(b), range(3))
    assert_params_close(a, b)


def test_params_without_gradient_come_and_go(path: torch.device) -> None:
    a, b = make(SHAPES, path, torch.float32), make(SHAPES, path, torch.float32)
    x, y = FusedAdamW(a), torch.optim.AdamW(b)
    for step, absent in enumerate([(0, 2), (), (3,), (0, 1, 2, 3, 4, 5), (1,)]):
        for params, optimizer in ((a, x), (b, y)):
            set_grads(params, step)
            for i in absent:
                params[i].grad = None
            optimizer.step()
    assert_params_close(a, b)
    assert x.state[a[0]]["step"].item() == 3


def strided(kind: str, device: torch.device) -> Tensor:
    base = torch.linspace(-1, 1, 60, device=device)
    if kind == "transposed":
        return base.view(10, 6).t()
    if kind == "gaps":
        return base.view(10, 6)[:, 1:4]
    return base[1:]  # not aligned to 16 bytes


@pytest.mark.parametrize("kind", ["transposed", "gaps", "unaligned"])
def test_strided_parameters(path: torch.device, kind: str) -> None:
    p = nn.Parameter(strided(kind, path).detach())
    base = p.detach().clone() if kind != "gaps" else None
    q = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    x, y = FusedAdamW([p]), torch.optim.AdamW([q])
    for step in range(3):
        set_grads([p], step)  # contiguous, whatever the parameter's strides
        q.grad = p.grad.clone()
        x.step()
        y.step()
    assert_params_close([p], [q])
    if base is None:  # the elements between must not have been touched
        whole = torch.as_strided(p.detach(), (10, 6), (6, 1), 0)
        untouched = torch.linspace(-1, 1, 60, device=path).view(10, 6)
        assert torch.equal(whole[:, [0, 4, 5]], untouched[:, [0, 4, 5]])


def test_expanded_and_new_gradients(path: torch.device) -> None:
    a, b = make([(6, 4)], path, torch.float32), make([(6, 4)], path, torch.float32)
    x, y = FusedAdamW(a), torch.optim.AdamW(b)
    for step in range(4):
        row = torch.arange(4.0, device=path) - step
        a[0].grad = row.expand(6, 4) if step % 2 else row.repeat(6, 1)
        b[0].grad = row.repeat(6, 1)
        x.step()
        y.step()
    assert_params_close(a, b)


def test_tensor_lr_and_group_hyperparameters_change(path: torch.device) -> None:
    a, b = make(SHAPES, path, torch.float32), make(SHAPES, path, torch.float32)
    lr = torch.tensor(1e-2, device=path)
    x = FusedAdamW([{"params": a[:3]}, {"params": a[3:], "weight_decay": 0.5, "lr": 1e-3}], lr=lr)
    y = torch.optim.AdamW([{"params": b[:3]}, {"params": b[3:], "weight_decay": 0.5, "lr": 1e-3}])
    for step in range(3):
        lr.fill_(1e-2 / (step + 1))
        y.param_groups[0]["lr"] = 1e-2 / (step + 1)
        x.param_groups[1]["lr"] = y.param_groups[1]["lr"] = 1e-3 * (step + 1)
        run_torch(a, x, range(step, step + 1))
        run_torch(b, y, range(step, step + 1))
    assert_params_close(a, b)


def test_mixed_dtypes_in_one_group(path: torch.device) -> None:
    params = make([(30, 5)], path, torch.float32) + make([(30, 5)], path, torch.float16)
    optimizer = FusedAdamW(params, lr=1e-2)
    for step in range(3):
        set_grads(params[:1], step)
        params[1].grad = params[0].grad.half()
        optimizer.step()
    assert params[1].dtype == torch.float16
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(params[1].float(), params[0].detach(), rtol=2e-2, atol=2e-2)


def test_the_second_moment_of_small_fp16_gradients_does_not_underflow(
    path: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = (1e-3 * torch.randn(20, 64, generator=generator)).half().to(path)
    final = {}
    for dtype in (torch.float16, torch.float32):
        p = nn.Parameter(torch.zeros(64, device=path, dtype=dtype))
        optimizer = FusedAdamW([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        for grad in grads:
            p.grad = grad.to(dtype)
            optimizer.step()
        final[dtype] = p.detach().float()
    # With v rounded to fp16, whose least number is 6e-8, most updates divide by ε alone.
    torch.testing.assert_close(final[torch.float16], final[torch.float32], rtol=2e-2, atol=1e-3)


def test_master_weights_keep_small_updates(path: torch.device) -> None:
    def final(**options: Any) -> tuple[Tensor, FusedAdamW]:
        p = nn.Parameter(torch.ones(9, device=path, dtype=torch.float16))
        optimizer = FusedAdamW([p], lr=1e-4, weight_decay=0.0, **options)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p, optimizer

    lost, _ = final()
    kept, optimizer = final(master_weights=True, state_dtype=torch.float32)
    assert (lost == 1).all()  # each update is below half a unit in the last place
    torch.testing.assert_close(
        kept.float(), torch.full_like(kept, 0.999).float(), rtol=0, atol=6e-4
    )
    state = optimizer.state[kept]
    assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
    saved = copy.deepcopy(optimizer.state_dict())
    other = nn.Parameter(kept.detach().clone())
    resumed = FusedAdamW([other], master_weights=True, state_dtype=torch.float32)
    resumed.load_state_dict(saved)
    for key in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(resumed.state[other][key], state[key]), key  # no detour through fp16


def test_bf16_states_with_fp32_parameters() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = make(SHAPES, device, torch.float32), make(SHAPES, device, torch.float32)
    x, y = FusedAdamW(a, state_dtype=torch.bfloat16), torch.optim.AdamW(b)
    run_torch(a, x, range(3))
    run_torch(b, y, range(3))
    assert x.state[a[0]]["exp_avg"].dtype == torch.bfloat16
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-4)
    saved = copy.deepcopy(x.state_dict())
    x.load_state_dict(saved)
    assert torch.equal(x.state[a[0]]["exp_avg"], saved["state"][0]["exp_avg"])


def test_a_gradient_that_is_not_aligned_narrows_no_other_operand(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 of 28 bytes are still read and written 16 at a time; DDP's buckets have such gradients."""
    launches: list[tuple[bool, bool]] = []
    module = importlib.import_module("fasttrain_kernels.adamw")
    kernel = module.adamw_kernel

    class Seen:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **flags: Any) -> Any:
                launches.append((flags["ALIGNED"], flags["GRAD_ALIGNED"]))
                return kernel[grid](*args, **flags)

            return launch

    monkeypatch.setattr(module, "adamw_kernel", Seen())
    shapes = [(2,), (64, 64), (33,)]
    a, b = make(shapes, triton_device, torch.float32), make(shapes, triton_device, torch.float32)
    x, y = FusedAdamW(a), torch.optim.AdamW(b)
    bucket = torch.empty(2 + 64 * 64 + 33, device=triton_device)
    for step in range(2):
        set_grads(b, step)
        views = bucket.split([2, 64 * 64, 33])
        for p, q, view in zip(a, b, views, strict=True):
            p.grad = view.view(q.shape).copy_(q.grad)
        x.step()
        y.step()
    assert_params_close(a, b)
    assert sorted(launches[:2]) == [(True, False), (True, True)]


def test_launches_of_equal_size_round_with_noise_of_their_own(path: torch.device) -> None:
    """An aligned and an unaligned parameter are updated by two launches."""
    storage = torch.ones(2, 4104, device=path, dtype=torch.bfloat16)
    params = [nn.Parameter(storage[0, :4096]), nn.Parameter(storage[1, 1:4097])]
    optimizer = FusedAdamW(params, lr=1e-4, weight_decay=0.0, stochastic_rounding=True, seed=3)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    alike = (params[0] == params[1]).float().mean().item()
    assert alike < 0.99  # 0.13 · 0.13 + 0.87 · 0.87 = 0.77 of them where the noise is independent


def test_stochastic_rounding_is_unbiased_and_reproducible(path: torch.device) -> None:
    def final() -> Tensor:
        p = nn.Parameter(torch.ones(4096, device=path, dtype=torch.bfloat16))
        optimizer = FusedAdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=True, seed=3)
        for _ in range(5):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    p = final()
    assert torch.equal(p, final())
    assert set(p.unique().tolist()) <= {1 - k * 2**-8 for k in range(6)}
    # Five steps of 1e-4 move the mean by 5e-4; a bf16 below 1 is 2**-8 away, so the standard error
    # of the mean is below 2**-8 · √(0.13 · 0.87 / 4096) = 2e-5. Nearest rounding would not move.
    # The moments are rounded too, which changes a step by at most one part in 2**7.
    assert abs(p.double().mean().item() - (1 - 5e-4)) < 8e-5


def test_the_noise_of_neighbours_is_independent_and_no_business_of_the_grid(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight neighbours share a call of Philox; parameter and moments do not share their noise."""
    size, found = 5 * 8192, []
    for n_programs in (1, 4):
        monkeypatch.setattr(_multi_tensor, "_CPU_PROGRAMS", n_programs)
        p = nn.Parameter(torch.zeros(size, device=triton_device, dtype=torch.bfloat16))
        # Every result lies half way between two bf16 numbers.
        half = 2.0**-8 + 2.0**-16
        options = {"lr": half, "betas": (1 - half, 1 - half), "eps": 0.0, "weight_decay": 0.0}
        optimizer = FusedAdamW([p], stochastic_rounding=True, seed=5, **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        state = optimizer.state[p]
        found.append(torch.stack([p.detach().neg(), state["exp_avg"], state["exp_avg_sq"]]))
    assert torch.equal(*found)
    up = (found[0] > found[0].amin(1, keepdim=True)).double()
    assert ((up.mean(1) - 0.5).abs() < 0.02).all()
    groups = up.view(3, -1, 8).transpose(1, 2).reshape(24, -1)  # a row for each place of 16 bits
    correlation = torch.corrcoef(groups) - torch.eye(24, device=groups.device)
    assert correlation.abs().max() < 5 * (size / 8) ** -0.5


@pytest.mark.parametrize(("registers", "n_programs"), [(32, 6), (64, 4), (65, 3), (168, 1)])
def test_as_many_programs_are_launched_as_the_device_holds(
    registers: int, n_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65,536 registers and, of this device, 1,536 threads a multiprocessor; 256 a program."""
    properties = SimpleNamespace(multi_processor_count=10, max_threads_per_multi_processor=1536)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(_multi_tensor, "n_multiprocessors", lambda _: 10)
    grid = partial(_multi_tensor.launch_grid, device=torch.device("cuda", 0))
    assert grid(10**6, registers=registers) == 10 * n_programs
    assert grid(7, registers=registers) == 7


def test_the_next_launch_knows_the_registers_of_the_last(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    returned = iter([None, SimpleNamespace(n_regs=120), None])
    module = importlib.import_module("fasttrain_kernels.adamw")
    monkeypatch.setattr(module, "adamw_kernel", {(1,): lambda *_, **__: next(returned)})
    monkeypatch.setattr(_multi_tensor, "launch_grid", lambda _, __, used: asked.append(used) or 1)
    params = make(SHAPES, triton_device, torch.float32)
    run_torch(params, FusedAdamW(params), range(3))
    assert asked == [64, 64, 120]


def test_runs_are_bit_identical(path: torch.device) -> None:
    a, b = make(SHAPES, path, torch.float32), make(SHAPES, path, torch.float32)
    for params in (a, b):
        run_torch(params, FusedAdamW(params), range(3))
    assert all(map(torch.equal, a, b))


def test_torch_optimizer_inputs(path: torch.device) -> None:
    torchs = pytest.importorskip("torch.testing._internal.common_optimizers")
    for case in torchs.optim_inputs_func_adamw(path.type):
        options = {k: v for k, v in case.kwargs.items() if k not in ("foreach", "fused")}
        if options.pop("amsgrad", False):
            with pytest.raises(ValueError, match="amsgrad"):
                FusedAdamW([nn.Parameter(torch.ones(2))], amsgrad=True)
            continue
        a, b = make(SHAPES, path, torch.float32), make(SHAPES, path, torch.float32)
        run_torch(a, FusedAdamW(a, **options), range(3))
        options.pop("capturable", None)
        options["lr"] = float(options.get("lr", 1e-3))
        run_torch(b, torch.optim.AdamW(b, **options), range(3))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=1e-6, msg=case.desc)


def test_closure_hooks_schedulers_and_groups() -> None:
    params = make(SHAPES, torch.device("cpu"), torch.float32)
    optimizer = FusedAdamW(params[:2])
    optimizer.add_param_group({"params": params[2:], "lr": 0.1})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    calls: list[str] = []
    of_all = register_optimizer_step_pre_hook(lambda *_: calls.append("pre"))
    before = params[2].detach().clone()
    assert optimizer.step(lambda: set_grads(params, 1) or 2.5) == 2.5
    of_all.remove()
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]
    optimizer.param_groups[0]["lr"] = 1.0
    scheduler.step()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert profile.key_averages()[0].key == "Optimizer.step#FusedAdamW.step"
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 0.05]
    assert not torch.equal(params[2], before)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda p: FusedAdamW([p], lr=-1.0), ValueError, r"FusedAdamW: lr .*-1\.0"),
        (lambda p: FusedAdamW([p], betas=(1.0, 0.9)), ValueError, "beta1"),
        (lambda p: FusedAdamW([p], eps=-1e-8), ValueError, "eps"),
        (lambda p: FusedAdamW([p], weight_decay=-1), ValueError, "weight_decay"),
        (lambda p: FusedAdamW([p], lr=torch.ones(2)), ValueError, r"FusedAdamW: .*\blr .*\b2\b"),
        (lambda p: FusedAdamW([p], state_dtype=torch.float16), ValueError, "state_dtype"),
        (lambda p: FusedAdamW([p.to(torch.complex64)]), (TypeError, ValueError), "complex|leaf"),
    ],
)
def test_errors_name_the_value(
    build: Callable[[Tensor], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        build(nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("repeated", ["gradient", "parameter"])
def test_a_clip_coefficient_scales_what_is_used_twice_once(repeated: str) -> None:
    results = []
    for scale in (0.5, None):
        p = torch.nn.Parameter(torch.ones(5))
        q = p if repeated == "parameter" else torch.nn.Parameter(torch.ones(5))
        p.grad = q.grad = torch.full((5,), 1.0 if scale else 0.5)
        groups = [p, q] if repeated == "parameter" else [{"params": [p]}, {"params": [q]}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a parameter that is listed twice
            optimizer = FusedAdamW(groups, lr=0.1, eps=1.0, weight_decay=0.0)
        optimizer.step(clip_coefficient=torch.tensor(scale) if scale else None)
        results.append(torch.cat([p.detach(), q.detach()]))
    torch.testing.assert_close(*results)
