"""Blocks in C++ against the same in plain torch, and when it is used."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import cpu as _cpu
from fasttrain_kernels._torch import fake_tensors
from fasttrain_kernels.cpu import blocks as block_cpu
from fasttrain_kernels.cpu.blocks import run_blocks_on_cpu
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fasttrain import resolve as settings
from fasttrain.config import ModelConfig, TrainConfig, UserError, config_from_dict
from fasttrain.data.loader import Batch
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.model import runtime
from fasttrain.model.runtime import prepare_blocks
from fasttrain.model.transformer import Transformer, run_blocks
from fasttrain.resolve import resolve, resolve_compile, why_unfit

CPU = torch.device("cpu")
BASE = {"mlp": "relu2", "qk_norm": True, "value_embeddings": True}
needs_it = pytest.mark.skipif(not _cpu.is_supported(), reason="needs a known CPU and a compiler")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def blocks_of(rows: int, t: int, **kw: Any) -> tuple[Any, list[Any], dict[str, Tensor]]:
    """Return blocks, the other arguments of a call, and what has a gradient."""
    torch.manual_seed(0)
    options = {"vocab_size": 64, "dim": 64, "n_layers": 1, "n_heads": 4} | kw
    model = Transformer(ModelConfig(**options), seq_len=t)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    x = torch.randn(rows, t, model.config.dim, requires_grad=True)
    given = {"x": x, **dict(model.blocks.named_parameters())}
    given |= {f"last {name}": p for name, p in model.norm.named_parameters()}
    values = None
    if model.config.value_embeddings:
        width = (model.config.n_kv_heads or model.config.n_heads) * model.head_dim
        values = [torch.randn(rows, t, width, requires_grad=True) for _ in model.blocks]
        given |= {f"value of {i}": value for i, value in enumerate(values)}
    rope = None if model.rope_cos is None else (model.rope_cos, model.rope_sin)
    return model.blocks, [model.norm, x, rope, None, None, 0, values], given


def outcome(run: Any, blocks: Any, arguments: list[Any], given: dict[str, Tensor]) -> list[Tensor]:
    y = run(blocks, *arguments)
    dy = torch.linspace(-3, 3, y.numel()).view_as(y).sin()
    return [y.detach(), *torch.autograd.grad(y, list(given.values()), dy)]


@needs_it
@pytest.mark.parametrize(
    ("rows", "t", "options"),
    [
        (3, 64, {"mlp": "gelu", "norm": "layer", "positions": "learned"}),
        (2, 64, {}),
        (2, 48, BASE),
        (2, 40, BASE | {"n_layers": 3}),
        (2, 50, {"n_kv_heads": 2, "qk_norm": True, "dim": 128, "hidden_dim": 208}),
        (1, 300, {"n_kv_heads": 1, "value_embeddings": True, "head_dim": 32}),
        (5, 7, {"dim": 16, "n_heads": 1, "mlp": "gelu"}),
        (1, 1, {"hidden_dim": 16, "positions": "learned"}),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else None,
)
def test_it_is_the_blocks(rows: int, t: int, options: dict[str, Any]) -> None:
    """Widths that end in the middle of a tile, of a task, of a depth of products among them."""
    blocks, arguments, given = blocks_of(rows, t, **options)
    expected = outcome(run_blocks, blocks, arguments, given)
    found = outcome(run_blocks_on_cpu, blocks, arguments, given)
    for name, want, got in zip(["y", *given], expected, found, strict=True):
        assert got.shape == want.shape
        # fp32 sums in another order: relative to the largest of a tensor.
        scale = max(float(want.abs().max()), 1e-3)
        assert float((got - want).abs().max()) < 4e-6 * scale, name


def in_bf16(run: Any) -> Any:
    def run_under_autocast(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = run(*arguments)
        return y.bfloat16().to(arguments[2].dtype)  # as the head takes it

    return run_under_autocast


@needs_it
@pytest.mark.parametrize(
    ("rows", "t", "options"),
    [
        (3, 64, {"mlp": "gelu", "norm": "layer", "positions": "learned"}),
        (2, 40, BASE | {"n_layers": 3}),
        (2, 50, {"n_kv_heads": 2, "qk_norm": True, "dim": 128, "hidden_dim": 208}),
        (1, 131, {"n_kv_heads": 1, "head_dim": 32}),
        (5, 7, {"dim": 16, "n_heads": 1, "mlp": "gelu"}),
    ],
    ids=str,
)
def test_bf16_is_as_exact_as_torchs(rows: int, t: int, options: dict[str, Any]) -> None:
    """On a CPU without bf16 by conversion. An odd number of tokens among them."""
    blocks, arguments, given = blocks_of(rows, t, **options)
    ours = outcome(in_bf16(run_blocks_on_cpu), blocks, arguments, given)
    theirs = outcome(in_bf16(run_blocks), blocks, arguments, given)
    for module in (blocks, arguments[0]):
        module.double()
    wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    norm, _, rope, *rest, values = arguments
    rope = None if rope is None else tuple(table.double() for table in rope)
    values = None if values is None else [wide[f"value of {i}"] for i in range(len(values))]
    wide |= dict(blocks.named_parameters())
    wide |= {f"last {name}": p for name, p in norm.named_parameters()}
    exact = outcome(run_blocks, blocks, [norm, wide["x"], rope, *rest, values], wide)
    few = []
    for name, own, other, true in zip(["y", *given], ours, theirs, exact, strict=True):
        assert own.dtype == torch.float32
        errors = [float((x - true).norm() / true.norm()) for x in (own, other)]
        if own.numel() > 64:
            assert errors[0] <= 1.05 * errors[1], name
        else:  # each a sum over all tokens: the error of one is a matter of chance
            few.append(errors)
    own_error, other_error = torch.tensor(few or [[0, 0]]).square().mean(dim=0).sqrt()
    assert own_error <= 1.5 * other_error


@needs_it
def test_torchs_own_products_take_turns_with_it() -> None:
    """A thread has one configuration of AMX's tiles, which both set: here, for parts of tiles."""
    blocks, arguments, given = blocks_of(2, 40, **BASE, head_dim=16)
    a, b = torch.randn(100, 72).bfloat16(), torch.randn(72, 40).bfloat16()
    query = torch.randn(1, 4, 50, 24).bfloat16()

    def both() -> list[Tensor]:
        made = outcome(in_bf16(run_blocks_on_cpu), blocks, arguments, given)
        attended = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        return [*made, a @ b, attended]

    first = both()
    torch.testing.assert_close(first[-2].float(), a.float() @ b.float(), rtol=2e-2, atol=2e-2)
    for again in (both(), both()):
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@needs_it
@pytest.mark.parametrize("wrap", [lambda run: run, in_bf16], ids=["fp32", "bf16"])
def test_no_bit_depends_on_the_number_of_threads(wrap: Any) -> None:
    blocks, arguments, given = blocks_of(3, 70, **BASE)
    results = []
    for n in (1, 3, 1):
        torch.set_num_threads(n)
        results.append(outcome(wrap(run_blocks_on_cpu), blocks, arguments, given))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@needs_it
@pytest.mark.parametrize("mlp", ["gelu", "relu2", "swiglu"])
def test_a_hidden_feature_that_is_nan_is_not_activated_to_zero(mlp: str) -> None:
    blocks, arguments, _ = blocks_of(1, 32, mlp=mlp)
    matrix = next(p for name, p in blocks.named_parameters() if ".mlp." in name and p.ndim == 2)
    with torch.no_grad():
        matrix[3] = torch.nan  # a row of the first product: a feature
    for run in (run_blocks, run_blocks_on_cpu):
        assert run(blocks, *arguments).isnan().all()


@needs_it
@pytest.mark.parametrize("mlp", ["gelu", "relu2", "swiglu"])
def test_what_is_not_finite_is_not_hidden(mlp: str) -> None:
    """In the second row alone, which the first does not see."""
    blocks, arguments, _ = blocks_of(2, 32, mlp=mlp)
    for bad in (float("nan"), float("inf")):
        x = arguments[1].detach().clone()
        x[1, 5, 3] = bad
        y = run_blocks_on_cpu(blocks, None, x, *arguments[2:])
        assert y[0].isfinite().all()
        assert y[1, 5:].isnan().any(-1).all()


def config_of(**sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {
        "run": {"device": "cpu"},
        "model": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2},
        "data": {"path": "unused", "seq_len": 32},
        "train": {"steps": 10, "micro_batch": 4},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return config_from_dict(values)


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"dtype": "fp16"}},
        {"model": {"bias": True}},
        {"run": {"dtype": "bf16"}, "model": {"residual_in_fp32": False}},
        {"model": {"dropout": 0.1}},
        {"model": {"dim": 40}},
        {"model": {"hidden_dim": 100}},
        {"model": {"head_dim": 8}},
        {"model": {"sliding_window_tokens": 16}},
        {"data": {"attention_across_documents": False}},
        {"train": {"activation_checkpointing": "full"}},
    ],
    ids=str,
)
def test_what_it_cannot_do_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, dict[str, Any]]
) -> None:
    monkeypatch.setattr(settings, "is_supported", lambda: True)
    monkeypatch.setattr(settings, "computes_in", lambda dtype: dtype != torch.float16)
    assert why_unfit(config_of()) is None
    assert resolve_compile(config_of(run={"compile": "c++"}), CPU) == "c++"
    assert "C++ blocks" in str(why_unfit(config_of(**sections)))
    monkeypatch.setattr(settings, "is_supported", lambda: False)
    assert why_unfit(config_of())


def test_with_products_in_fp32_they_need_not_keep_the_residual_stream_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "is_supported", lambda: True)
    monkeypatch.setattr("fasttrain.device.native_bf16", lambda _: False)
    assert why_unfit(config_of(model={"residual_in_fp32": False})) is None


@pytest.mark.parametrize("compiler", [None, "g++"])
def test_the_reason_names_what_this_machine_has(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    monkeypatch.setattr(settings, "is_supported", lambda: False)
    monkeypatch.setattr(settings, "compiler", lambda: compiler)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ZVECTOR")
    lacks = r"\bZVECTOR\b" if compiler else r"g\+\+ .*clang\+\+ .*OpenMP\b.*\bPATH\b"
    reason = why_unfit(config_of())
    assert reason
    assert re.search(rf"AVX2, AVX-512 .*\bARM\b.*\bcompiler\b.*{lacks}", reason)
    assert ("ZVECTOR" in reason) == bool(compiler)


def train(compile: str, model_options: dict[str, Any]) -> tuple[list[float], list[Tensor]]:
    config = config_of(run={"compile": compile, "dtype": "fp32"}, model=model_options)
    torch.manual_seed(0)
    model = Transformer(config.model, seq_len=32)
    optimizers = build_optimizers(model, config.optim)
    step = TrainStep(model, optimizers, resolve(config, CPU))
    assert step.compile_mode == ("off" if compile == "off" else "c++")
    ids = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1))
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    losses = []
    for _ in range(10):
        step([Batch(tokens, targets, None, 0)], 1e-2)
        losses.append(float(step.loss))
    return losses, [p.detach() for p in model.parameters()]


@needs_it
def test_a_model_learns_with_it_as_without() -> None:
    options = BASE | {"embedding_norm": True, "zero_init_projections": True}
    (losses, weights), (expected, expected_weights) = train("auto", options), train("off", options)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 0.5
    for got, want in zip(weights, expected_weights, strict=True):
        # Adam's first steps are ±lr whatever the size of a gradient, also of one that is noise.
        assert float((got - want).abs().mean()) < 1e-3


@needs_it
def test_a_library_that_is_not_built_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "bad.cpp").write_text("this is not C++", "utf-8")
    with pytest.raises(RuntimeError, match=r"g\+\+.*error"):
        _cpu.load(tmp_path / "bad.cpp")
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setattr(block_cpu, "load", lambda *_, **__: _cpu.load(tmp_path / "bad.cpp"))
    monkeypatch.setattr(runtime, "build", block_cpu.build)
    model = Transformer(config_of().model, seq_len=32)
    with pytest.raises(UserError, match=r"run\.compile=off"):  # before the first step
        prepare_blocks(model, activation_checkpointing="none", mode="c++", sharded=False)


@needs_it
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    blocks, (norm, x, rope, *rest), _ = blocks_of(1, 70)
    x = x.detach().index_fill(1, torch.tensor([69]), bad)
    ours, plain = (f(blocks, norm, x, rope, *rest) for f in (run_blocks_on_cpu, run_blocks))
    assert ours[0, 69].isnan().all()
    assert plain[ours.isnan()].isnan().all()  # torch's attention spreads it over more tokens


@needs_it
def test_plain_causal_attention_in_fp32_is_all_it_knows() -> None:
    blocks, (norm, x, rope, *_), _ = blocks_of(1, 16)
    mask = torch.ones(16, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="causal"):
        run_blocks_on_cpu(blocks, norm, x, rope, mask, None, 0, None)
    with pytest.raises(ValueError, match=r"run_blocks_on_cpu: x \(0, 16, 64\) "):
        run_blocks_on_cpu(blocks, norm, x[:0], rope, None, None, 0, None)
    for part in (norm, blocks[0].mlp):  # a part alone: none of it would be read as it is
        part.double()
        with pytest.raises(ValueError, match=r"run_blocks_on_cpu: .*torch\.float64\b.*blocks_fn"):
            run_blocks_on_cpu(blocks, norm, x, rope, None, None, 0, None)
        part.float()
    weight = blocks[0].attention.out.weight
    y = run_blocks_on_cpu(blocks, norm, x, rope, None, None, 0, None)
    weight.data = weight.t().contiguous().t()
    assert torch.equal(run_blocks_on_cpu(blocks, norm, x, rope, None, None, 0, None), y)


@needs_it
@pytest.mark.parametrize("options", [BASE, {"mlp": "gelu", "norm": "layer"}, {"n_kv_heads": 2}])
def test_its_products_are_counted(options: dict[str, Any]) -> None:
    """As the blocks' own, and on top those of attention, which torch does not count on a CPU."""
    blocks, arguments, _ = blocks_of(2, 64, **options)
    n_flops = []
    for run in (run_blocks, run_blocks_on_cpu):
        with FlopCounterMode(display=False) as counter:
            run(blocks, *arguments).sum().backward()
        n_flops.append(counter.get_total_flops())
    attention = blocks[0].attention
    product = 2 * 2 * 64 * 64 * attention.n_heads * attention.head_dim * len(blocks)
    assert n_flops[1] == pytest.approx(n_flops[0] + 7 * product, rel=2e-3)  # torch counts RMSNorm's


@needs_it
def test_watched_and_plain_it_has_the_same_bits() -> None:
    blocks, arguments, given = blocks_of(2, 40, **BASE)
    plain = outcome(run_blocks_on_cpu, blocks, arguments, given)
    with FlopCounterMode(display=False):
        watched = outcome(run_blocks_on_cpu, blocks, arguments, given)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


@needs_it
def test_fake_tensors_give_shapes_and_transforms_are_refused() -> None:
    with fake_tensors():
        blocks, arguments, given = blocks_of(1, 16)
        y, *grads = outcome(run_blocks_on_cpu, blocks, arguments, given)
        assert y.shape == arguments[1].shape
        assert [g.shape for g in grads] == [x.shape for x in given.values()]
    blocks, (norm, x, *rest), _ = blocks_of(1, 16)

    def run(x: Tensor) -> Tensor:
        return run_blocks_on_cpu(blocks, norm, x, *rest)

    with pytest.raises(ValueError, match=r"torch\.func.*blocks_fn = fasttrain\.model\.run_blocks"):
        torch.func.vjp(run, x)
    y = run(x)
    batch = torch.ones(2, *y.shape)
    with pytest.raises(RuntimeError, match=r"run_blocks_on_cpu: .*\bgradients\b.*blocks_fn"):
        torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"run_blocks_on_cpu .*\bonce\b.*fasttrain\.model\.run_blocks"
    ):
        grad.sum().backward()
