"""The configurations that come with the project, and choices that are declared and no more."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import hf
from fasttrain import resolve as settings
from fasttrain.config import (
    SECTIONS,
    ConfigError,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    config_from_dict,
    load_config,
)
from fasttrain.config.keys import check_value, counted
from fasttrain.data.loader import evaluation_batches
from fasttrain.data.order import LoaderOptions, SampleOrder
from fasttrain.device import resolve_precision
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.schedule import lr_at
from fasttrain.generate import load_model
from fasttrain.model.runtime import prepare_blocks
from fasttrain.model.transformer import Transformer
from fasttrain.train import main as train
from tests.support.toy import MLPS, OPTIMIZERS, ROOT, SCHEDULES, write_dataset
from tests.support.toy_data import write_tokens

BASE = ROOT / "configs" / "base.toml"
CONFIGS = sorted(BASE.parent.glob("*.toml"))


def n_parameters(name: str, vocab_size: int) -> int:
    config = load_config(BASE.with_name(f"{name}.toml"))
    model = replace(config.model, vocab_size=vocab_size)
    with torch.device("meta"):
        return Transformer(model, seq_len=config.data.seq_len).num_parameters()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_says_what_it_is_and_makes_a_model(path: Path) -> None:
    config = load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    with torch.device("meta"):
        vocab_size = config.model.vocab_size or 256
        model = Transformer(replace(config.model, vocab_size=vocab_size), seq_len=32)
    trained = [
        p
        for optimizer in build_optimizers(model, config.optim)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(trained) == len(list(model.parameters()))


@pytest.mark.parametrize(("vocab_size", "tolerance"), [(64, 0.08), (128, 0.05), (256, 0.05)])
def test_chars_has_as_many_parameters_as_it_says(vocab_size: int, tolerance: float) -> None:
    # nanoGPT says 0.80M of its own at 65 characters; the comparison allows 5 % either way.
    assert n_parameters("chars", vocab_size) == pytest.approx(800_000, rel=tolerance)


# ---- a choice that is declared but not implemented -----------------------------------------------


def declared(config: Any, key: str) -> Any:
    """Return a section with a value that the choices might name and no code knows."""
    object.__setattr__(config, key, "new")
    return config


def model(**keys: Any) -> ModelConfig:
    return ModelConfig(vocab_size=64, dim=16, n_layers=1, n_heads=1, **keys)


def forward(key: str) -> None:
    Transformer(declared(model(), key), seq_len=8)(torch.zeros(1, 8, dtype=torch.int64))


CPU = torch.device("cpu")
UNKNOWN: dict[str, Callable[[], object]] = {
    "model.mlp": lambda: forward("mlp"),
    "model.norm": lambda: forward("norm"),
    "model.positions": lambda: forward("positions"),
    "schedule.name": lambda: lr_at(3, 9, declared(ScheduleConfig(), "name"), 1.0),
    "optim.name": lambda: build_optimizers(
        Transformer(model(), seq_len=8), declared(OptimConfig(), "name")
    ),
    "run.dtype": lambda: resolve_precision("new", CPU),
    "train.activation_checkpointing": lambda: prepare_blocks(
        Transformer(model(), seq_len=8), activation_checkpointing="new", mode="off", sharded=False
    ),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_a_choice_that_no_code_knows_is_an_error_and_no_other_choice(key: str) -> None:
    with pytest.raises(ConfigError, match=f'^{key} = "?new"? .*implemented'):
        UNKNOWN[key]()


def test_nor_is_a_way_of_batching_another_one(tmp_path: Path) -> None:
    dataset = write_tokens(tmp_path / "data", list(range(1, 30)), [29])
    options = LoaderOptions(batching="new", seq_len=4, micro_batch=2)
    with pytest.raises(ConfigError, match=r"data\.batching = .*new.* implemented"):
        SampleOrder(dataset, options)
    with pytest.raises(ConfigError, match=r"data\.batching = .*new.* implemented"):
        evaluation_batches(dataset, options, CPU)


def test_the_blocks_in_cpp_leave_an_activation_that_they_do_not_know_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "is_supported", lambda: True)
    monkeypatch.setattr(settings, "computes_in", lambda _: True)
    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 2}
    config = config_from_dict({"model": sizes, "data": {"path": "unused"}, "train": {"steps": 1}})
    assert settings.why_unfit(config) is None
    declared(config.model, "mlp")
    assert settings.why_unfit(config)


def test_one_of_a_kind_is_not_told_as_many() -> None:
    told = [counted(n, "thread") for n in (0, 1, 2)]
    assert told == ["0 threads", "1 thread", "2 threads"]
    assert (counted(1, "batch"), counted(1600, "batch")) == ("1 batch", "1,600 batches")


# ---- any one key of base.toml can be changed alone -----------------------------------------------

VALUES: tuple[Any, ...] = (True, False, None, 1, 4, 512, 0.25, 3.0, "other", "cuda:1")
VALUES += ([], [0.5], [0.5, 0.25], [7, 9], ["a", "b"])


def others() -> dict[str, list[str]]:
    """Return for every key what it may be set to by its declaration, as overrides."""
    base = json.loads(json.dumps(asdict(load_config(BASE))))
    found = {}
    for section, cls in SECTIONS.items():
        for f in fields(cls):
            name, legal = f"{section}.{f.name}", []
            for value in (*f.metadata["choices"], *VALUES):
                try:
                    check_value(name, value, f)
                except ConfigError:
                    continue
                if value != base[section][f.name] and value not in legal:
                    legal.append(value)
            found[name] = [f"{name}={'none' if v is None else json.dumps(v)}" for v in legal]
    return found


OTHERS = others()


@pytest.mark.parametrize("name", OTHERS)
def test_any_one_key_of_base_toml_can_be_changed_alone_or_names_what_it_needs(name: str) -> None:
    accepted: list[str] = []
    refusals: list[str] = []
    for override in OTHERS[name]:
        try:
            load_config(BASE, [override])
            accepted.append(override)
        except ConfigError as error:
            message = str(error)
            assert name in message
            assert "; " in message, "it names no remedy"
            refusals.append(message)
    needed = [key for text in refusals for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", text)]
    assert accepted or set(needed) - {name}


def test_a_learning_rate_is_that_of_the_optimizer_of_base_toml() -> None:
    assert load_config(BASE, ["optim.lr=1e-4"]).optim.peak_lr == 1e-4
    assert load_config(BASE).optim.peak_lr == 8e-3
    assert load_config(BASE, ["optim.name=adamw"]).optim.peak_lr == 1e-3
    given = ["optim.name=adamw", "optim.lr=1e-4"]
    assert load_config(BASE, given).optim.peak_lr == 1e-4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """base.toml with a width of 32 on a small text, as arguments."""
    data = write_dataset(tmp_path_factory.mktemp("text") / "data", 20_000, 1_000)
    overrides = [f"data.path={data}", "model.dim=32", "model.n_layers=1"]
    overrides += ["run.device=cpu", "run.dtype=fp32", "run.compile=off", "eval.sample_tokens=4"]
    return [str(BASE), *overrides]


@pytest.mark.parametrize(
    "override",
    [
        *(f"data.seq_len={n}" for n in (64, 96, 97, 100, 250, 512)),
        *(f"data.batching={kind}" for kind in ("sliding", "padded", "bucketed")),
        *("data.attention_across_documents=false", "train.epochs=0.1", "train.tokens=5000"),
        *(f"train.steps={n}" for n in (1, 2)),
        *(f"train.micro_batch={n}" for n in (1, 3, 5, 100, "auto")),
        *(f"train.tokens_per_step={n}" for n in ("none", 1, 1000, 3000)),
        *(f"optim.name={name}" for name in OPTIMIZERS if name != "muon"),
        *(f"schedule.name={name}" for name in SCHEDULES),
        *("schedule.warmup_steps=2", "schedule.context_fractions=[0.25, 0.5]"),
        *("model.dim=48", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=1"),
        *(f"model.mlp={kind}" for kind in MLPS),
        *("model.norm=layer", "model.positions=learned"),
        *("model.bias=true", "model.qk_norm=false", "model.tied_embeddings=true"),
        *("model.dropout=0.1", "model.value_embeddings=true", "model.bigram_vocab_size=64"),
        *("eval.stride_fraction=0.3", "eval.stride_fraction=none", "eval.batch_size=3"),
        *("train.on_spike=rollback", "train.ema_decay=0.9", "log.every_steps=1"),
    ],
)
def test_a_run_of_base_toml_with_one_key_changed_trains(
    small: list[str], tmp_path: Path, override: str
) -> None:
    horizon = [] if override.startswith(("train.epochs", "train.tokens=")) else ["train.steps=3"]
    arguments = [*small, *horizon, override, f"run.out_dir={tmp_path}", "run.name=run"]
    assert train(arguments) == 0
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row for row in rows if row["kind"] == "train"] * 2
    assert last["loss"] < first["loss"] or last["step"] == 1
    assert rows[-1]["val_loss"] < 6.0


def test_every_config_says_how_many_tokens_make_a_step() -> None:
    assert all(load_config(path).train.tokens_per_step for path in CONFIGS)


def test_a_run_of_base_toml_exports_as_qwen3(small: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    assert train([*small, "train.steps=3", f"run.out_dir={tmp_path}", "run.name=run"]) == 0
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert theirs.config.model_type == "qwen3"
    ours = load_model(tmp_path / "run")
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
