"""The Transformer: options, initialisation, cache, first loss, what a position may see."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.config import ConfigError, ModelConfig, load_config
from fasttrain.model.attention import _Biased
from fasttrain.model.transformer import LayerNorm, Transformer, gelu_tanh, hidden_dim

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

GPT2 = ModelConfig(
    vocab_size=128,
    dim=32,
    n_layers=2,
    n_heads=4,
    mlp="gelu",
    norm="layer",
    positions="learned",
    bias=True,
    tied_embeddings=True,
)
QWEN3 = ModelConfig(
    vocab_size=128, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, qk_norm=True
)
WINDOW = ModelConfig(
    vocab_size=128,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=1,
    sliding_window_tokens=4,
    mlp="relu2",
)
CAPPED = ModelConfig(vocab_size=128, dim=32, n_layers=2, n_heads=2, logit_softcap=5.0)
EXTRAS = ModelConfig(
    vocab_size=128,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    embedding_norm=True,
    bigram_vocab_size=50,
    value_embeddings=True,
)
BF16 = {"residual_in_fp32": False}
STYLES = {"gpt2": GPT2, "qwen3": QWEN3, "window": WINDOW, "capped": CAPPED, "extras": EXTRAS}


def build(config: ModelConfig, seq_len: int = 24) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, seq_len=seq_len)
    if model.bigram_embedding is not None:  # zero at the start, which would hide its effect
        torch.nn.init.normal_(model.bigram_embedding.weight)
    return model


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> ModelConfig:
    return STYLES[request.param]


def test_hidden_states_and_logits_have_the_promised_shapes(style: ModelConfig) -> None:
    model = build(style)
    tokens = torch.randint(0, 128, (3, 24))
    hidden = model.hidden(tokens)
    assert hidden.shape == (3, 24, 32)
    logits = model(tokens)
    assert torch.equal(logits, model.logits(hidden))
    assert logits.shape == (3, 24, 128)
    assert logits.dtype == torch.float32
    if style.logit_softcap is not None:
        assert logits.abs().max() <= style.logit_softcap


def test_no_position_sees_a_later_token(style: ModelConfig) -> None:
    model = build(style)
    tokens = torch.randint(0, 128, (1, 24))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 128
    before, after = model.hidden(tokens), model.hidden(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_a_sliding_window_forgets_what_lies_outside_it() -> None:
    one_layer = ModelConfig(vocab_size=128, dim=32, n_layers=1, n_heads=4, sliding_window_tokens=4)
    model = build(one_layer)
    tokens = torch.randint(0, 128, (1, 24))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 128
    differs = (model.hidden(tokens) != model.hidden(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_cached_hidden_states_equal_uncached_ones(style: ModelConfig) -> None:
    model = build(style).eval()
    tokens = torch.randint(0, 128, (2, 24))
    with torch.no_grad():
        whole = model.hidden(tokens)
        cache = model.new_cache(2, 24)
        pieces = [model.hidden(piece, cache) for piece in tokens.split([7, 1, 5, 1, 10], dim=1)]
    assert cache.length == 24
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_grouped_queries_equal_repeated_keys_and_values() -> None:
    torch.manual_seed(0)
    grouped = build(QWEN3)
    full = build(
        ModelConfig(vocab_size=128, dim=32, n_layers=2, n_heads=4, head_dim=16, qk_norm=True)
    )
    state = grouped.state_dict()
    for i in range(2):
        q, k, v = state[f"blocks.{i}.attention.qkv.weight"].split([64, 32, 32])
        k, v = (w.view(2, 16, 32).repeat_interleave(2, 0).reshape(64, 32) for w in (k, v))
        state[f"blocks.{i}.attention.qkv.weight"] = torch.cat([q, k, v])
    full.load_state_dict(state)
    tokens = torch.randint(0, 128, (2, 24))
    torch.testing.assert_close(grouped.hidden(tokens), full.hidden(tokens), rtol=1e-4, atol=1e-5)


def test_rotary_attention_depends_on_distance_alone() -> None:
    model = build(ModelConfig(vocab_size=128, dim=32, n_layers=1, n_heads=2), seq_len=64).eval()
    attention = model.blocks[0].attention
    x = torch.randn(1, 8, 32)
    near, far = ((model.rope_cos[s : s + 8], model.rope_sin[s : s + 8]) for s in (0, 40))
    torch.testing.assert_close(
        attention(x, near, None), attention(x, far, None), rtol=1e-4, atol=1e-5
    )


def test_a_tied_head_is_the_embedding() -> None:
    model = build(GPT2)
    assert model.head_weight is model.embedding.weight
    assert "head.weight" not in model.state_dict()
    assert build(QWEN3).head_weight is not build(QWEN3).embedding.weight


def test_zero_initialised_projections_leave_the_residual_stream_alone() -> None:
    config = ModelConfig(vocab_size=128, dim=32, n_layers=2, n_heads=2, zero_init_projections=True)
    model = build(config)
    tokens = torch.randint(0, 128, (1, 24))
    torch.testing.assert_close(model.hidden(tokens), model.norm(model.embedding(tokens)))


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "extras"])
@pytest.mark.parametrize(
    ("options", "autocast", "expected"),
    [
        (BF16, torch.bfloat16, torch.bfloat16),
        (BF16, torch.float16, torch.float32),
        (BF16, None, torch.float32),
        ({}, torch.bfloat16, torch.float32),
    ],
)
def test_the_residual_stream_is_in_bf16_where_asked_for_and_products_are(
    name: str, options: dict[str, bool], autocast: torch.dtype | None, expected: torch.dtype
) -> None:
    """Forward and backward, before and behind each block."""
    model = build(replace(STYLES[name], **options))
    streams: list[Tensor] = []
    gradients: list[torch.dtype] = []

    def look(_: object, given: tuple[Tensor, ...], result: Tensor) -> None:
        for x in (given[0], result):
            streams.append(x)
            x.register_hook(lambda grad: gradients.append(grad.dtype))

    for block in model.blocks:
        block.register_forward_hook(look)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model.hidden(torch.randint(0, 128, (3, 24))).float().square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert [x.dtype for x in streams] == gradients == [expected] * 4
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_initialisation_is_a_function_of_the_seed() -> None:
    a, b = build(QWEN3), build(QWEN3)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    generator = torch.Generator().manual_seed(1)
    b.init_weights(generator)
    assert not torch.equal(a.embedding.weight, b.embedding.weight)


def test_dropout_acts_in_training_only() -> None:
    config = ModelConfig(vocab_size=128, dim=32, n_layers=1, n_heads=2, dropout=0.5)
    model = build(config)
    tokens = torch.randint(0, 128, (1, 24))
    assert not torch.equal(model.hidden(tokens), model.hidden(tokens))
    model.eval()
    assert torch.equal(model.hidden(tokens), model.hidden(tokens))


def test_too_long_an_input_is_refused_with_the_remedy() -> None:
    model = build(QWEN3)
    with pytest.raises(ValueError, match=r"Transformer: 0 .*\b25\b.*\b24\b.*seq_len"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Transformer: 0 .*\b9\b.*\b8\b.*seq_len"):
        model(torch.zeros(1, 9, dtype=torch.int64), model.new_cache(1, 8))


def test_an_unset_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size .*dataset"):
        Transformer(ModelConfig(), seq_len=8)


# What the papers, or the published checkpoints, count; base is whatever its own shape gives.
PUBLISHED = {"gpt2-124m": 124_439_808, "llama-350m": None, "llama-1b": 1_235_814_400}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_on_the_meta_device_and_counts_its_parameters(path: Path) -> None:
    config = load_config(path)
    model_config = config.model
    if model_config.vocab_size is None:
        vocab = -(-config.data.corpus_vocab_size // 64) * 64
        model_config = load_config(path, [f"model.vocab_size={vocab}"]).model
    with torch.device("meta"):
        model = Transformer(model_config, seq_len=config.data.seq_len)
    count = model.num_parameters()
    print(f"{path.stem}: {count:,} parameters")
    m, f, v = model_config, hidden_dim(model_config), model_config.vocab_size
    assert v is not None
    head_dim = m.head_dim or m.dim // m.n_heads
    per_block = m.dim * head_dim * (2 * m.n_heads + 2 * (m.n_kv_heads or m.n_heads))
    per_block += (3 if m.mlp == "swiglu" else 2) * m.dim * f
    matrices = m.n_layers * per_block + (1 if m.tied_embeddings else 2) * v * m.dim
    if m.positions == "learned":
        matrices += config.data.seq_len * m.dim
    matrices += (m.bigram_vocab_size or 0) * m.dim
    if m.value_embeddings:
        matrices += m.n_layers * v * head_dim * (m.n_kv_heads or m.n_heads)
    vectors = count - matrices
    assert 0 < vectors < 0.002 * count
    if PUBLISHED.get(path.stem):
        assert count == pytest.approx(PUBLISHED[path.stem], rel=0.002)
    assert model.num_matmul_parameters() <= count


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_first_loss_is_near_the_logarithm_of_the_vocabulary(path: Path) -> None:
    # One block of the config's own width and vocabulary: depth only adds terms that the final norm
    # scales away, and a billion parameters do not fit a test.
    config = load_config(path)
    overrides = [f"model.n_layers={min(config.model.n_layers, 2)}"]
    if config.model.vocab_size is None:
        overrides.append("model.vocab_size=4096")
    model_config = load_config(path, overrides).model
    torch.manual_seed(0)
    model = Transformer(model_config, seq_len=config.data.seq_len).eval()
    assert model_config.vocab_size is not None
    tokens = torch.randint(0, model_config.vocab_size, (1, 65))
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits[0], tokens[0, 1:]).item()
    assert loss == pytest.approx(math.log(model_config.vocab_size), abs=0.3)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_the_layer_norm_that_is_compiled_on_a_gpu_is_torchs(
    mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error against fp64 is at most twice that of torch's, forward and backward."""
    monkeypatch.setattr("fasttrain.model.transformer.in_gpu_graph", lambda x: True)
    torch.manual_seed(0)
    x, dy = mean + torch.randn(64, 48), torch.randn(64, 48)
    inputs = (x, torch.randn(48), torch.randn(48))

    def run(norm: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        y = norm(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (48,), weight, bias, 1e-5)

    def composed(x: Tensor, *parameters: Tensor) -> Tensor:
        norm = LayerNorm(48, eps=1e-5, bias=len(parameters) == 2)
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        y: Tensor = torch.func.functional_call(norm, named, x)
        return y

    truth = run(theirs, torch.float64)
    for ours, torchs, exact in zip(
        run(composed, torch.float32), run(theirs, torch.float32), truth, strict=True
    ):
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, torchs))
        assert error <= 2 * allowed + 1e-6 * exact.abs().max()
    assert torch.equal(composed(*inputs[:2]) + inputs[2], composed(*inputs))


@pytest.mark.parametrize("options", [None, {}, BF16], ids=["fp32", "bf16", "bf16 residual"])
@pytest.mark.parametrize("style", STYLES)
def test_what_a_gpu_compiles_computes_as_is_run_otherwise(
    style: str, options: dict[str, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residual stream in rows, biases summed in two stages: as exact, and in bf16 more so."""
    bf16 = options is not None
    model = build(replace(STYLES[style], **(options or {})))
    for name, p in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(0, 128, (3, 24))

    def run(model: Transformer, *, autocast: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.hidden(tokens).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        return grads | {"loss": loss.double()}

    plain = run(model, autocast=bf16)
    seen: list[Tensor] = []
    for module in ("attention", "transformer"):
        monkeypatch.setattr(f"fasttrain.model.{module}.in_gpu_graph", lambda x: not seen.append(x))
    ours = run(model, autocast=bf16)
    monkeypatch.undo()
    assert seen
    truth = run(model.double(), autocast=False)
    for name, exact in truth.items():
        error, theirs = ((grads[name] - exact).norm() for grads in (ours, plain))
        assert error <= 1.5 * theirs + 1e-5 * exact.norm(), name


def test_a_bias_is_summed_in_fp32_over_all_rows() -> None:
    y = torch.zeros(4, 4096, 3, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    _Biased.apply(y, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32
    assert bias.grad.tolist() == [4 * 4096.0] * 3  # bf16 ends at 256, adding ones one by one
    assert torch.equal(torch.autograd.grad(_Biased.apply(y, bias).sum(), y)[0], torch.ones_like(y))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_gelu_is_the_eager_one() -> None:
    x = torch.linspace(-12, 12, 4001, requires_grad=True)
    compiled = torch.compile(gelu_tanh, fullgraph=True, backend="aot_eager")
    for fn in (gelu_tanh, compiled):
        y = fn(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        wide = x.detach().double().requires_grad_()
        expected = F.gelu(wide, approximate="tanh")
        (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-5)


def packed(generator_seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of three documents, of 7, 1 and 16 tokens and of 3, 20 and 1; no token twice."""
    generator = torch.Generator().manual_seed(generator_seed)
    tokens = torch.randperm(128, generator=generator)[:48].view(2, 24)
    doc_starts = torch.zeros(2, 24, dtype=torch.bool)
    for row, starts in enumerate(([0, 7, 8], [0, 3, 23])):
        doc_starts[row, starts] = True
    return tokens, doc_starts


def spans(doc_starts: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return (row, first, end) of every document."""
    found = []
    for row, flags in enumerate(doc_starts):
        starts = flags.nonzero().flatten().tolist()
        found += [(row, a, b) for a, b in itertools.pairwise([*starts, doc_starts.shape[1]])]
    return found


def test_R27_editing_a_document_leaves_the_others_logits_bit_identical(style: ModelConfig) -> None:
    model = build(style).eval()
    tokens, doc_starts = packed()
    with torch.no_grad():
        before = model(tokens, doc_starts=doc_starts)
        for row, first, end in spans(doc_starts):
            edited = tokens.clone()
            edited[row, first:end] = (tokens[row, first:end] + 50) % 128
            after = model(edited, doc_starts=doc_starts)
            same = (before == after).all(-1)
            inside = torch.zeros_like(same)
            inside[row, first:end] = True
            assert torch.equal(same, ~inside)


def test_R27_a_packed_document_computes_what_it_computes_alone(style: ModelConfig) -> None:
    model = build(style).eval()
    tokens, doc_starts = packed()
    with torch.no_grad():
        hidden = model.hidden(tokens, doc_starts=doc_starts)
        for row, first, end in spans(doc_starts):
            alone = model.hidden(tokens[row : row + 1, first:end])[0]
            torch.testing.assert_close(hidden[row, first:end], alone, rtol=1e-4, atol=1e-5)


def test_R27_the_boundarys_loss_is_that_of_the_document_before_it(style: ModelConfig) -> None:
    """The last token of a document predicts the first of the next, from its own document alone."""
    model = build(style).eval()
    tokens, doc_starts = packed()
    targets = torch.roll(tokens, -1, dims=1)
    with torch.no_grad():
        logits = model(tokens, doc_starts=doc_starts)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        for row, first, end in spans(doc_starts):
            alone = model(tokens[row : row + 1, first:end])[0]
            expected = F.cross_entropy(alone, targets[row, first:end], reduction="none")
            torch.testing.assert_close(losses[row, first:end], expected, rtol=1e-4, atol=1e-4)


def test_R27_no_gradient_crosses_a_document() -> None:
    model = build(EXTRAS)
    tokens, doc_starts = packed()
    hidden = model.hidden(tokens, doc_starts=doc_starts)
    hidden[0, 8:].square().sum().backward()
    for table in (model.embedding, *model.value_embeddings):
        touched = table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert set(touched) <= set(tokens[0, 8:].tolist())
        assert len(touched) > 10


def test_one_document_a_row_is_what_no_documents_are(style: ModelConfig) -> None:
    model = build(style).eval()
    tokens, doc_starts = packed()
    doc_starts[:, 1:] = False
    with torch.no_grad():
        torch.testing.assert_close(
            model.hidden(tokens, doc_starts=doc_starts), model.hidden(tokens), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"Transformer: doc_starts .*\bcache\b"):
        model(tokens, model.new_cache(2, 24), doc_starts)


def test_documents_compile_into_one_graph_that_serves_all_batches() -> None:
    model = build(EXTRAS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for seed in (0, 1):
        tokens, doc_starts = packed(seed)
        doc_starts = doc_starts.roll(seed, 0)  # other documents, the same shapes
        torch.testing.assert_close(
            compiled(tokens, doc_starts=doc_starts),
            model(tokens, doc_starts=doc_starts),
            rtol=1e-4,
            atol=1e-5,
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_flops_of_gpt2_small() -> None:
    """The matrices of GPT-2 124M with its tied head, counted by hand."""
    dim, layers, heads, seq_len, vocab = 768, 12, 12, 1024, 50257
    n = layers * 12 * dim * dim + vocab * dim
    assert n == 123_532_032
    sizes = {"dim": dim, "n_layers": layers, "n_heads": heads, "vocab_size": vocab}
    with torch.device("meta"):
        model = Transformer(replace(GPT2, **sizes), seq_len=seq_len)
    assert model.num_matmul_parameters() == n
    attention = 12 * layers * dim * seq_len
    assert model.flops_per_token() == 6 * n + attention == 854438400


def test_flops_agree_with_torchs_counter() -> None:
    """Torch counts the products of one block: projections, attention without its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    dim, heads, seq_len = 32, 4, 16
    qkv, out = torch.nn.Linear(dim, 3 * dim, bias=False), torch.nn.Linear(dim, dim, bias=False)
    x = torch.randn(1, seq_len, dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        q, k, v = (t.view(1, seq_len, heads, -1).transpose(1, 2) for t in qkv(x).chunk(3, dim=-1))
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        out((scores @ v).transpose(1, 2).reshape(1, seq_len, dim)).sum().backward()
    sizes = {"dim": dim, "n_layers": 1, "n_heads": heads, "vocab_size": 64}
    model = Transformer(ModelConfig(**sizes), seq_len=seq_len)
    others = 6 * (model.num_matmul_parameters() - 4 * dim * dim)
    assert counter.get_total_flops() == (model.flops_per_token() - others) * seq_len
