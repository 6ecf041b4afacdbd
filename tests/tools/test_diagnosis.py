"""The checklist: a sound model passes every line, and each planted fault is found by its line."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fasttrain.config import ModelConfig, OptimConfig, UserError
from fasttrain.device import resolve_precision
from fasttrain.engine.optim import build_optimizers
from fasttrain.model.transformer import Transformer
from fasttrain.preflight.diagnosis import Diagnosis, diagnose

V, T = 64, 16


class Plain(nn.Module):
    """Somebody's own model: logits (B, T, V) from torch's parts, its mask optional."""

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(V, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        logits: Tensor = self.head(x + self.mlp(x))
        return logits


def ours(**options: object) -> Transformer:
    shape = {"vocab_size": V, "dim": 32, "n_layers": 2, "n_heads": 2}
    config = ModelConfig(**shape | options)
    return Transformer(config, seq_len=T)


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, V, (4, T + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def statuses(report: Diagnosis) -> dict[str, str]:
    return {f.check: f.status for f in report.findings}


def detail(report: Diagnosis, check: str) -> str:
    (found,) = (f.detail for f in report.findings if f.check == check)
    return found


def faults(report: Diagnosis) -> set[str]:
    return {f.check for f in report.findings if f.status != "pass"}


BASE = {"qk_norm": True, "zero_init_projections": True, "value_embeddings": True}
BASE |= {"bigram_vocab_size": 128, "embedding_norm": True, "mlp": "relu2"}
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
GPT2 |= {"tied_embeddings": True, "dropout": 0.1, "init_std": 0.02}


@pytest.mark.parametrize(
    "make",
    [plain, ours, lambda: ours(**BASE), lambda: ours(**GPT2)],
    ids=["own", "llama", "base", "gpt2"],
)
def test_a_sound_model_passes_every_line(
    make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    report = diagnose(model, batch, optimizer=optimizer)
    assert not faults(report), str(report)
    assert set(statuses(report)) == {
        *("shape", "range", "labels", "finite", "activations", "first loss", "causality"),
        *("gradient norm", "gradients", "learning", "learning rate", "update"),
    }


def test_model_optimizer_and_random_state_stay_as_they_were(batch: tuple[Tensor, Tensor]) -> None:
    model = ours(dropout=0.1)
    optimizers = build_optimizers(model, OptimConfig(name="muon"))
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert not diagnose(model, batch, optimizer=optimizers).failed
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(o.state for o in optimizers)


def test_batches_come_in_several_forms(batch: tuple[Tensor, Tensor]) -> None:
    tokens, targets = batch
    for form in (
        batch,
        {"input_ids": tokens, "target_ids": targets},
        {"input_ids": tokens, "labels": targets},
    ):
        assert not diagnose(plain(), form).failed
    to_be_shifted = {"input_ids": tokens, "labels": tokens, "attention_mask": tokens >= 0}
    report = diagnose(plain(), to_be_shifted)
    assert [f.status for f in report.findings if f.check == "labels"] == ["warn", "pass"]
    assert not report.failed


def test_the_batches_that_trainers_take_or_an_error(batch: tuple[Tensor, Tensor]) -> None:
    tokens, targets = batch
    for form in (tokens, [tokens], {"input_ids": tokens, "labels": None}, [t.int() for t in batch]):
        assert not diagnose(plain(), form).failed
    for wrong, message in (
        ({"x": tokens}, "'x'.*input_ids"),
        ((tokens, targets, targets), r"\btuple\b.*\b3\b.*\(input_ids, target_ids\)"),
        ((tokens.tolist(), targets.tolist()), r"input_ids .*\blist\b.*\(B, T\)"),
        (None, r"NoneType\b.*\(input_ids, target_ids\)"),
    ):
        with pytest.raises(UserError, match=message):
            diagnose(plain(), wrong)


@pytest.mark.parametrize("form", ["nothing", "flat"])
def test_a_model_that_returns_no_logits_is_a_line_too(
    batch: tuple[Tensor, Tensor], form: str
) -> None:
    model = plain()
    model.register_forward_hook(lambda *a: None if form == "nothing" else a[2].flatten())
    if form == "nothing":
        model.forward = lambda tokens: None  # type: ignore[assignment,method-assign]
    report = diagnose(model, batch)
    assert faults(report) == {"logits"}
    assert "logits (B, T, V)" in str(report)


def test_a_learning_rate_of_zero(batch: tuple[Tensor, Tensor]) -> None:
    report = diagnose(
        model := plain(), batch, optimizer=torch.optim.AdamW(model.parameters(), lr=0.0)
    )
    assert statuses(report)["learning rate"] == "fail"
    assert faults(report) == {"learning rate"}


def test_a_frozen_layer_is_named(batch: tuple[Tensor, Tensor]) -> None:
    model = plain()
    model.qkv.requires_grad_(False)
    report = diagnose(model, batch, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert faults(report) == {"frozen"}
    assert "qkv.weight" in str(report)


def test_a_layer_that_no_gradient_reaches_is_named(batch: tuple[Tensor, Tensor]) -> None:
    model = plain()
    model.unused = nn.Linear(4, 4)
    report = diagnose(model, batch, optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0))
    assert faults(report) == {"gradients", "update"}
    assert re.search(r"\b2\b.*: unused\.weight, unused\.bias", str(report))


def test_a_parameter_outside_the_optimizer_is_named(batch: tuple[Tensor, Tensor]) -> None:
    model = plain()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "head" not in n], lr=0.1)
    report = diagnose(model, batch, optimizer=optimizer)
    assert faults(report) == {"optimizer"}
    assert "head.weight, head.bias" in str(report)


def test_labels_that_are_not_shifted(batch: tuple[Tensor, Tensor]) -> None:
    tokens, targets = batch
    report = diagnose(plain(), (tokens, tokens))
    assert statuses(report)["labels"] == "fail"
    assert "ids[:, 1:]" in str(report)
    assert statuses(diagnose(plain(), (tokens, targets.roll(1, 1).roll(1, 0))))["labels"] == "fail"
    padded = targets.clone()
    padded[:, 5:] = -100
    assert statuses(diagnose(plain(), (tokens, padded)))["labels"] == "pass"


@pytest.mark.parametrize("wrong", [V, -1])
@pytest.mark.parametrize("which", ["tokens", "targets"])
def test_ids_out_of_range(batch: tuple[Tensor, Tensor], wrong: int, which: str) -> None:
    (batch[0] if which == "tokens" else batch[1])[1, 3] = wrong
    report = diagnose(plain(), batch)
    assert statuses(report)["range"] == "fail"
    assert re.search(rf"\b1 {which} .*\[0, {V}\).*[ =]{wrong}\b", str(report))


def test_data_of_the_wrong_shape_or_kind(batch: tuple[Tensor, Tensor]) -> None:
    tokens, targets = batch
    assert diagnose(plain(), (tokens, targets[:, 1:])).failed
    assert diagnose(plain(), (tokens.float(), targets)).failed
    assert diagnose(plain(), (tokens, torch.full_like(targets, -100))).failed


def test_a_model_that_raises_is_a_line_too(batch: tuple[Tensor, Tensor]) -> None:
    report = diagnose(nn.Sequential(nn.Embedding(V, 4), nn.Linear(5, V)), batch)
    assert faults(report) == {"forward"}
    assert re.search(r"RuntimeError: .*64x4 and 5x64", str(report))


def test_an_exploding_initialisation(batch: tuple[Tensor, Tensor]) -> None:
    model = plain()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(30)
    report = statuses(diagnose(model, batch))
    assert report["first loss"] == "fail"
    assert report["activations"] == "fail"
    assert report["gradient norm"] in ("warn", "fail")


def test_the_first_layer_that_makes_nan_is_named(batch: tuple[Tensor, Tensor]) -> None:
    model = ours()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = float("nan")
    report = diagnose(model, batch)
    assert statuses(report)["finite"] == "fail"
    told = detail(report, "finite")
    assert re.search(r" blocks\.1\.mlp\.up(?!\.)", told)
    assert re.search(r" blocks\.1\.mlp\.up\.weight\b", told)

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()  # of negative numbers

    broken = plain()
    broken.mlp[1] = Root()
    assert re.search(r" mlp\.1$", detail(diagnose(broken, batch), "finite"))


def test_a_gradient_that_is_not_finite_is_named(batch: tuple[Tensor, Tensor]) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32))

        def forward(self, x: Tensor) -> Tensor:
            return x + (x * self.weight).norm(dim=-1, keepdim=True).sqrt()  # √0 has slope ∞

    model = plain()
    model.norm = Norm()
    report = diagnose(model, batch)
    assert statuses(report)["gradient norm"] == "fail"
    assert re.search(r" norm\.weight\b", detail(report, "gradient norm"))


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_leak_through_a_missing_causal_mask(batch: tuple[Tensor, Tensor], zeroed: bool) -> None:
    """Also where the attention's weights start at zero, and so show nothing yet."""
    torch.manual_seed(0)
    model = Plain(causal=False)
    if zeroed:
        nn.init.zeros_(model.qkv.weight)
    report = diagnose(model, batch)
    assert statuses(report)["causality"] == "fail"
    assert faults(report) == {"causality"}


def test_under_autocast_as_a_run_computes(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = ours()
    with resolve_precision("bf16", torch.device("cpu")).autocast():
        report = diagnose(model, batch, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
        leaking = diagnose(Plain(causal=False), batch)
    assert not faults(report), str(report)
    assert statuses(leaking)["causality"] == "fail"
