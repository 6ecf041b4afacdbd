"""FusedAdamW and Muon behave as torch's optimizers where others touch them.

Their groups, state and parameters are edited between steps, exchanged with torch's, copied, loaded
and compiled.
"""

import contextlib
import copy
import importlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fasttrain_kernels import FusedAdamW, Muon, grad_norm, grad_norm_reference
from fasttrain_kernels.newton_schulz import newton_schulz_reference
from torch import Tensor, nn

from tests.support.kernel_ops import SMALL_NAMES, op_named, results

JORDAN = (3.4445, -4.7750, 2.0315)


class PlainMuon(torch.optim.Optimizer):
    """torch.optim.Muon with exact products."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        defaults = torch.optim.Muon([nn.Parameter(torch.ones(1, 1))]).defaults
        super().__init__(params, {**defaults, "lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                lr, mu, of = float(group["lr"]), group["momentum"], self.state[p]
                buffer = of.setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - mu)
                update = p.grad.lerp(buffer, mu) if group["nesterov"] else buffer
                triples = [group["ns_coefficients"]]
                update = newton_schulz_reference(update, group["ns_steps"], triples).to(p)
                rows, cols = p.shape
                scale = max(1, rows / cols) ** 0.5
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    scale = 0.2 * max(rows, cols) ** 0.5
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * scale * update)


def muon_as_torch_has_it(params: Any, **options: Any) -> Muon:
    defaults = {"ns_coefficients": JORDAN, "adjust_lr_fn": "original", "ns_dtype": torch.float32}
    return Muon(params, **{**defaults, **options})


def torchs_muon(params: Any, **options: Any) -> torch.optim.Muon:
    return torch.optim.Muon(params, **{"weight_decay": 0.0, **options})


Kinds = tuple[Callable[..., Any], Callable[..., Any]]


@pytest.fixture(params=["cpu", "cpp", "triton"])
def path(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs in torch and in C++ on the CPU, and on the Triton path."""
    if request.param != "cpu":
        return request.getfixturevalue(f"{request.param}_device")
    return torch.device("cpu")


def make(device: torch.device, n: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(8, 6, generator=generator) for _ in range(n)]
    return [nn.Parameter(t.to(device, dtype)) for t in tensors]


def set_grads(params: list[Tensor], step: int) -> None:
    for i, p in enumerate(params):
        wave = torch.arange(p.numel(), dtype=torch.float32).view(p.shape) * (i + 1) + step
        p.grad = wave.sin().to(p.device, p.dtype)


def replace(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.0


def replace_one(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.3, "weight_decay": 0.5}


def edit(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0].update(lr=0.3, weight_decay=0.5)


def edit_decay_rates(optimizer: Any, params: list[Tensor]) -> None:
    group = optimizer.param_groups[1]
    if "betas" in group:
        group.update(betas=(0.5, 0.7), eps=0.1, maximize=True)
    else:
        group.update(momentum=0.3, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw")


def move(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[1]["lr"] = 0.0
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())  # the order of all parameters stays


def exchange(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 0.2


def swap(optimizer: Any, params: list[Tensor]) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]
    optimizer.param_groups[0]["lr"] = 0.2


def remove(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"].remove(params[0])


def add(optimizer: Any, params: list[Tensor]) -> None:
    params.append(nn.Parameter(torch.ones_like(params[0])))
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.2})


def make_lr_a_tensor(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)


def forget(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state.clear()


def exchange_memory(optimizer: Any, params: list[Tensor]) -> None:
    for p in params:
        p.data = p.detach().t().contiguous().t().clone(memory_format=torch.preserve_format) + 1


EDITS = [
    replace, replace_one, edit, edit_decay_rates, move, exchange, swap, remove, add,
    make_lr_a_tensor, forget, exchange_memory,
]  # fmt: skip


@pytest.mark.parametrize(
    "pair", [(FusedAdamW, torch.optim.AdamW), (muon_as_torch_has_it, PlainMuon)]
)
@pytest.mark.parametrize("change", EDITS, ids=lambda edit: edit.__name__)
def test_what_the_groups_say_at_a_step_holds(
    pair: Kinds, path: torch.device, change: Callable[..., None]
) -> None:
    final = []
    for kind in pair:
        params = make(path)
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
        optimizer = kind(groups, lr=0.05)
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            if step == 1:
                change(optimizer, params)
        final.append([p.detach() for p in params])
    for ours, theirs in zip(*final, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"scale": "none"}, {"coefficients": "classic"}, {"ns_steps": 2}],
    ids=str,
)
def test_muons_own_settings_are_read_at_each_step(
    path: torch.device, options: dict[str, Any]
) -> None:
    edited, made = make(path), make(path)
    first, second = Muon(edited, lr=0.1), Muon(made, lr=0.1, **options)
    for optimizer, params in ((first, edited), (second, made)):
        set_grads(params, 0)
        saved = optimizer.param_groups[0]
        optimizer.param_groups[0] = {**saved, "lr": 0.0}
        optimizer.step()
        optimizer.param_groups[0] = saved
    first.param_groups[0].update(options)
    for optimizer, params in ((first, edited), (second, made)):
        set_grads(params, 1)
        optimizer.step()
    assert all(map(torch.equal, edited, made))


def test_a_parameter_listed_twice_is_updated_twice_as_in_torch(path: torch.device) -> None:
    final = []
    for kind in (FusedAdamW, lambda p, **o: torch.optim.AdamW(p, foreach=False, **o)):
        first, second = make(path, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            optimizer = kind([first, second, first], lr=0.05)
        for step in range(3):
            set_grads([first, second], step)
            optimizer.step()
        assert optimizer.state[first]["step"] == 6
        final.append((first.detach(), second.detach()))
    torch.testing.assert_close(*final, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="more than one parameter group"):
        FusedAdamW([{"params": [first]}, {"params": [first]}])


@pytest.mark.parametrize("kind", [FusedAdamW, Muon])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_parameters_without_elements_are_stepped_over(
    path: torch.device, kind: Any, shape: tuple[int, int]
) -> None:
    params = [nn.Parameter(torch.ones(s, device=path)) for s in (shape, (4, 4))]
    options = {"scale": "spectral"} if kind is Muon else {}
    optimizer = kind(params, lr=0.1, **options)
    set_grads(params, 0)
    optimizer.step()
    assert not torch.equal(params[1], torch.ones_like(params[1]))


@pytest.mark.parametrize("kind", [FusedAdamW, Muon])
def test_gradients_and_state_that_a_step_cannot_take_are_refused(
    path: torch.device, kind: Any
) -> None:
    (param,) = make(path, 1)
    optimizer = kind([param], lr=0.1)
    before = param.detach().clone()
    param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}: .*torch\.sparse_coo.*SparseAdam"):
        optimizer.step()
    set_grads([param], 0)
    param.data = torch.ones(3, 3, device=path)
    with pytest.raises(RuntimeError, match=r"gradient .*\(8, 6\) .*\(3, 3\)"):
        optimizer.step()
    param.data = before
    optimizer.step()
    state = optimizer.state[param]
    key = next(key for key in state if key != "step")
    state[key] = state[key].to("meta")
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}: {key} .*\bmeta\b"):
        optimizer.step()
    if kind is FusedAdamW:
        del state[key]
        with pytest.raises(RuntimeError, match=rf"FusedAdamW: .*\b{key}\b"):
            optimizer.step()


CASTS = {
    "fp32 to bf16": (torch.float32, torch.bfloat16),
    "bf16 to fp32": (torch.bfloat16, torch.float32),
    "fp32 to fp16": (torch.float32, torch.float16),
    "fp32 to fp64": (torch.float32, torch.float64),
}


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", [FusedAdamW, Muon])
def test_a_model_that_is_cast_trains_on(
    path: torch.device, kind: Any, cast: str, after: int
) -> None:
    first, second = CASTS[cast]
    if path.type == "cuda" and second == torch.float64:
        pytest.skip("fp64 is for CPUs")
    final = []
    for casts in (True, False):
        (param,) = make(path, 1, first if casts else torch.float32)
        optimizer = kind([param], lr=0.05)
        for step in range(6):
            if casts and step == after:
                param.data = param.detach().to(second)
            set_grads([param], step)
            optimizer.step()
        final.append(param.detach().float())
    torch.testing.assert_close(*final, rtol=0.1, atol=0.08)


def test_masters_come_and_go_with_half_precision(path: torch.device) -> None:
    (param,) = make(path, 1)
    optimizer = FusedAdamW([param], master_weights=True)
    for dtype, has_master in (
        (torch.float32, False), (torch.float16, True), (torch.float32, False)
    ):  # fmt: skip
        param.data = param.detach().to(dtype)
        set_grads([param], 0)
        optimizer.step()
        assert ("master" in optimizer.state[param]) == has_master


def reset(p: Tensor) -> None:
    p.copy_(torch.full_like(p, 3.0))


def clamp(p: Tensor) -> None:
    p.clamp_(-0.5, 0.5)


def prune_behind_autograds_back(p: Tensor) -> None:
    p.data[:2] = 0  # counts no version


def exchange_data(p: Tensor) -> None:
    p.data = p.detach() * 2


@pytest.mark.parametrize("change", [reset, clamp, prune_behind_autograds_back, exchange_data])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_take_over_what_others_changed(
    path: torch.device, change: Callable[[Tensor], None], rounding: bool, dtype: torch.dtype
) -> None:
    """And keep their digits where nothing was changed."""
    (param,) = make(path, 1, dtype)
    options = {"lr": 1e-4, "master_weights": True, "stochastic_rounding": rounding}
    optimizer = FusedAdamW([param], state_dtype=torch.float32, **options)
    for step in range(3):
        set_grads([param], step)
        optimizer.step()
    before = param.detach().clone()
    with torch.no_grad():
        change(param)
    expected = optimizer.state[param]["master"].clone()
    changed = param.detach() != before
    assert changed.any()
    expected[changed] = param.detach().float()[changed]
    state = copy.deepcopy(optimizer.state[param])
    twin = nn.Parameter(expected)
    other = FusedAdamW([twin], lr=1e-4)
    other.state[twin] = {k: v for k, v in state.items() if k != "master"}
    set_grads([param], 3)
    twin.grad = param.grad.float()
    optimizer.step()
    other.step()
    master = optimizer.state[param]["master"]
    torch.testing.assert_close(master, twin.detach(), rtol=1e-6, atol=1e-8)
    assert (param.float() - master).abs().max() <= torch.finfo(dtype).eps * master.abs().max()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter
def test_master_weights_that_overflow_or_are_nan_recover(path: torch.device) -> None:
    param = nn.Parameter(torch.ones(64, device=path, dtype=torch.float16))
    optimizer = FusedAdamW([param], lr=0.01, weight_decay=0.0, master_weights=True)
    for value in (float("nan"), 1e30):
        set_grads([param], 0)
        optimizer.step()
        optimizer.state[param]["master"].fill_(value)
        with torch.no_grad():
            param.copy_(optimizer.state[param]["master"])
        set_grads([param], 1)
        optimizer.step()
        assert not param.isfinite().any()
        with torch.no_grad():
            param.fill_(0.0)
        set_grads([param], 2)
        optimizer.step()
        assert (optimizer.state[param]["master"].abs() < 0.1).all()


@pytest.mark.parametrize("kind", [FusedAdamW, Muon])
def test_a_backward_pass_through_updated_parameters_is_refused(
    path: torch.device, kind: Any
) -> None:
    (param,) = make(path, 1)
    set_grads([param], 0)
    loss = param.square().sum()
    kind([param], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", SMALL_NAMES)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_no_result_depends_on_the_default_dtype_or_device(
    path: torch.device, name: str, default: Any
) -> None:
    op = op_named(name)
    expected = results(op.ours, op)
    importlib.import_module("fasttrain_kernels.newton_schulz")._polar_express.cache_clear()
    context = torch.device("meta") if default == "meta" else default_dtype(default)
    with context:
        found = results(op.ours, op)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [grad_norm, grad_norm_reference])
def test_the_norm_of_nothing_is_fp32_on_the_cpu(norm: Callable[..., Any]) -> None:
    with default_dtype(torch.float64), torch.device("meta"):
        result = norm([], 1.0)
    assert [(t.dtype, t.device.type) for t in result] == [(torch.float32, "cpu")] * 3


@pytest.mark.parametrize(
    "pair", [(FusedAdamW, torch.optim.AdamW), (muon_as_torch_has_it, torchs_muon)]
)
@pytest.mark.parametrize("start", ["ours", "torch's", "ours and back"])
def test_a_run_goes_on_in_torchs_optimizer_and_back(
    pair: Kinds, path: torch.device, start: str
) -> None:
    """With the very settings of its groups, of a live state that is then shared with nobody."""
    order = {"ours": (0, 1, 1), "torch's": (1, 0, 0), "ours and back": (0, 1, 0)}[start]
    params, reference = make(path), make(path)
    options = {"lr": 0.05, "weight_decay": 0.2}
    optimizer, whole = pair[order[0]](params, **options), pair[1](reference, **options)
    for number, which in enumerate(order):
        if number:
            source = optimizer
            optimizer = pair[which](params, lr=1.0)
            optimizer.load_state_dict(source.state_dict())
            if which == 0:
                assert not shared(source, optimizer)
        for step in range(2):
            for one, of in ((optimizer, params), (whole, reference)):
                set_grads(of, 2 * number + step)
                one.step()
    # torch's Muon has products in bf16, and starts from a looser bound of the singular values.
    near = 1e-5 if pair[0] is FusedAdamW else 0.3
    for p, q, start in zip(params, reference, make(path), strict=True):
        assert (p - q).norm() <= near * (q - start).norm()


def shared(first: Any, second: Any) -> set[int]:
    """Return the addresses of memory that the states of two optimizers have in common."""
    return set.intersection(
        *(
            {
                t.untyped_storage().data_ptr()
                for state in optimizer.state.values()
                for t in state.values()
                if isinstance(t, Tensor)
            }
            for optimizer in (first, second)
        )
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FusedAdamW, {}),
        (FusedAdamW, {"master_weights": True}),
        (Muon, {}),
        (Muon, {"scale": "none"}),
    ],
)
def test_loaded_copied_and_pickled_optimizers_own_their_state(
    kind: Any, options: dict[str, Any]
) -> None:
    def twin(optimizer: Any, params: list[Tensor], way: str) -> tuple[Any, list[Tensor]]:
        if way == "load":
            copies = [nn.Parameter(p.detach().clone()) for p in params]
            loaded = kind(copies, **options)
            loaded.load_state_dict(optimizer.state_dict())
            return loaded, copies
        copied = (
            copy.deepcopy(optimizer) if way == "copy" else pickle.loads(pickle.dumps(optimizer))
        )
        return copied, copied.param_groups[0]["params"]

    params = make(torch.device("cpu"), dtype=torch.bfloat16)
    optimizer = kind(params, lr=0.05, **options)
    set_grads(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["own"] = torch.ones(3)
    twins = [twin(optimizer, params, way) for way in ("load", "copy", "pickle")]
    for other, _ in twins:
        assert not shared(optimizer, other)
        other.param_groups[0]["lr"] = other.param_groups[0]["lr"]
    for step in range(1, 3):  # the first goes ahead, the others follow
        set_grads(params, step)
        optimizer.step()
    for other, copies in twins:
        assert other.state[copies[0]]["own"].tolist() == [1, 1, 1]
        for step in range(1, 3):
            set_grads(copies, step)
            other.step()
        assert all(map(torch.equal, copies, params))


def test_hooks_of_loading_see_what_is_loaded() -> None:
    params = make(torch.device("cpu"), dtype=torch.bfloat16)
    optimizer = FusedAdamW(params, state_dtype=torch.float32)
    set_grads(params, 0)
    optimizer.step()
    seen = []
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.append(loaded.state[params[0]]["exp_avg"].dtype)
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.5}]}
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32]
    assert optimizer.param_groups[0]["lr"] == 0.5


def state_of(kind: Any, **options: Any) -> dict[str, Any]:
    params = make(torch.device("cpu"))
    optimizer = kind(params, **options)
    set_grads(params, 0)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("kind", "source", "options", "match"),
    [
        (FusedAdamW, torch.optim.SGD, {"lr": 0.1}, "group 0 .*betas, eps"),
        (FusedAdamW, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "group 0 .*betas, eps"),
        (FusedAdamW, torch.optim.Adamax, {}, " exp_avg_sq .*step, exp_avg, exp_inf"),
        (FusedAdamW, torch.optim.AdamW, {"amsgrad": True}, r"amsgrad=True .*torch\.optim\.AdamW"),
        (FusedAdamW, Muon, {}, "group 0 .*betas"),
        (Muon, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "group 0 .*ns_steps"),
        (Muon, torch.optim.AdamW, {}, "group 0 .*momentum, nesterov, ns_steps"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(
    kind: Any, source: Any, options: dict[str, Any], match: str
) -> None:
    params = make(torch.device("cpu"))
    optimizer = kind(params, lr=0.05)
    set_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state_of(source, **options))
    wrong = copy.deepcopy(before)
    key = next(key for key in wrong["state"][1] if key != "step")
    wrong["state"][1][key] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=rf"load_state_dict: {key} .*parameter 1 .*\(2, 2\)"):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(after["state"][index][key], state[key]) for key in state)


def test_a_state_of_adam_loads_also_from_before_it_had_todays_settings() -> None:
    saved = copy.deepcopy(state_of(torch.optim.Adam, weight_decay=0.0))
    for state in saved["state"].values():
        state["step"] = 1  # a number, once
    group = saved["param_groups"][0]
    saved["param_groups"][0] = {
        key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    }
    params = make(torch.device("cpu"))
    optimizer = FusedAdamW(params)
    optimizer.load_state_dict(saved)
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(optimizer.state_dict())
    theirs.step()


def test_what_torchs_muon_changes_in_our_state_is_kept() -> None:
    params = make(torch.device("cpu"))
    saved = Muon(params, coefficients="polar_express").state_dict()
    for changes, scale, coefficients in (
        ({}, "match_adamw", "polar_express"),
        ({"adjust_lr_fn": None}, "spectral", "polar_express"),
        ({"ns_coefficients": (2.0, -1.5, 0.5)}, "match_adamw", [(2.0, -1.5, 0.5)]),
    ):
        theirs = torch.optim.Muon(params)
        theirs.load_state_dict(saved)
        theirs.param_groups[0].update(changes)
        ours = Muon(params)
        ours.load_state_dict(theirs.state_dict())
        group = ours.param_groups[0]
        assert (group["scale"], group["coefficients"]) == (scale, coefficients)


def test_torchs_spellings_are_taken_or_told_apart() -> None:
    params = make(torch.device("cpu"))
    adamw = FusedAdamW(
        params, 1e-3, (torch.tensor(0.9), torch.tensor(0.99)), 1e-8, 0.01, False,
        foreach=True, capturable=True, differentiable=False, fused=True,
    )  # fmt: skip
    assert adamw.param_groups[0]["betas"] == pytest.approx((0.9, 0.99))
    muon = Muon([{"params": params, "adjust_lr_fn": "original"}], ns_coefficients=JORDAN, eps=1e-7)
    assert muon.param_groups[0]["scale"] == "spectral"
    assert muon.param_groups[0]["coefficients"] == [JORDAN]
    refusals: list[tuple[Any, dict[str, Any], str]] = [
        (FusedAdamW, {"amsgrad": True}, r"amsgrad=True .*torch\.optim\.AdamW"),
        (FusedAdamW, {"differentiable": True}, r"differentiable=True .*torch\.optim\.AdamW"),
        (Muon, {"adjust_lr_fn": "rms"}, "Muon: adjust_lr_fn .*'original'.*'rms'"),
        (Muon, {"adjust_lr_fn": "original", "scale": "none"}, "Muon: .*scale .*adjust_lr_fn"),
        (
            Muon,
            {"ns_coefficients": JORDAN, "coefficients": "classic"},
            "Muon: .*coefficients .*ns_coefficients",
        ),
        (Muon, {"nesterov": 0.95}, r"Muon: nesterov .*0\.95"),
    ]
    for kind, options, match in refusals:
        with pytest.raises(ValueError, match=match):
            kind(params, **options)
    with pytest.raises(ValueError, match=r"FusedAdamW: .*torch\.optim\.Adam\b"):
        FusedAdamW([{"params": params, "decoupled_weight_decay": False}])


@pytest.mark.parametrize("kind", [FusedAdamW, Muon])
def test_a_compiled_step_is_the_step(path: torch.device, kind: Any) -> None:
    def run(compiled: bool) -> list[Tensor]:
        params = make(path, 2) + make(path, 1, torch.bfloat16)
        optimizer = kind(params, lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))

        def train(step: int) -> None:
            for p in params:
                p.grad = (p.detach() * step + 1).sin()
            optimizer.step()

        train = torch.compile(train, backend="aot_eager") if compiled else train
        for step in range(3):
            train(step)
            scheduler.step()
        assert len(calls) == 3
        return params

    with warnings.catch_warnings():  # of the compiler
        warnings.simplefilter("ignore")
        assert all(map(torch.equal, run(True), run(False)))
        (param,) = make(path, 1)
        set_grads([param], 0)
        whole = torch.compile(kind([param]).step, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"optimizer.*compile.*model"):
            whole()
    torch.compiler.reset()
