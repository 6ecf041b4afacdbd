"""What is told before a run: sizes, memory, warnings; the automatic micro-batch; the commands."""

import math
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.config import ConfigError, TrainConfig, UserError, load_config
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.engine.run_size import RunSize, warnings_at_start
from fasttrain.engine.step import TrainStep
from fasttrain.log.console import format_count
from fasttrain.model.transformer import Transformer
from fasttrain.preflight import memory
from fasttrain.preflight import plan as preflight_plan
from fasttrain.preflight.__main__ import main
from fasttrain.preflight.memory import Probe, best_micro_batch, probe_step
from fasttrain.preflight.plan import diagnose_run, preflight, warnings_of
from fasttrain.run.ending import describe
from fasttrain.run.setup import open_splits
from fasttrain.train import main as train_main
from tests.support.toy import start, write_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    return write_config(tmp_path)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What preflight prints."""
    printed: list[str] = []
    monkeypatch.setattr(preflight_plan, "say", printed.append)
    return printed


def test_it_tells_sizes_memory_and_time(lines: list[str], config_path: Path) -> None:
    assert preflight(load_config(config_path))
    text = "\n".join(lines)
    told = {line.split()[0]: line for line in lines}
    # 2 layers: 4·32² in attention, 3·32·128 in SwiGLU; the head of 320·32.
    n_matmul = 2 * (4 * 32**2 + 3 * 32 * 128) + 320 * 32
    assert f" {n_matmul:,} " in told["model"]
    assert re.search(r"\b4,001 training.*\b501 .*\b320\b", told["data"])
    assert re.search(r"\b64 tokens.* 1 micro-batch × 4 sequences × 16\b", told["step"])
    assert re.search(r"\b12 steps.*\b768 tokens.*\b0\.19 epochs", told["run"])
    for category in ("parameters", "gradients", "optimizer", "activations", "logits", "buffers"):
        assert f"    {category}" in text
    assert "measured" in told
    assert re.search("MFU n/a.*compile off", told["speed"])
    assert re.search(r"\d.*evaluation", told["time"])


def test_parameters_and_flops_are_those_of_the_model(config_path: Path) -> None:
    config, *splits = open_splits(load_config(config_path), print)
    model = Transformer(config.model, seq_len=16)
    rows = describe(RunSize(config, model, *splits, 1))
    assert rows["model"].startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    assert f"{format_count(model.flops_per_token())} FLOPs" in rows["model"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batching": "sliding"},
        {"batching": "sliding", "stride_tokens": 2},
        {"batching": "padded"},
    ],
    ids=str,
)
def test_epochs_are_counted_as_the_loader_counts_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    overrides = ["train.steps=none", "train.epochs=2.5"]
    overrides += [f"data.{key}={value}" for key, value in options.items()]
    config, train, _ = open_splits(load_config(write_config(tmp_path), overrides), print)
    plan = RunSize(config, Transformer(config.model, seq_len=16), train, None, 1)
    with Loader(train, LoaderOptions(seq_len=16, **options), device=CPU) as loader:
        assert plan.steps == math.ceil(math.ceil(2.5 * loader.samples_per_epoch) / 4)
        assert plan.epochs == 4 * plan.steps / loader.samples_per_epoch


def test_without_a_probe_nothing_is_run(
    lines: list[str], config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_plan, "probe_step", lambda *_, **__: pytest.fail("it ran"))
    assert preflight(load_config(config_path), probe=False)
    assert not any(line.startswith(("speed", "time")) for line in lines)


def test_a_step_of_minutes_is_not_measured_on_a_cpu(
    lines: list[str], config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_plan, "probe_step", lambda *_, **__: pytest.fail("it ran"))
    monkeypatch.setattr(preflight_plan, "CPU_FLOPS", 1e3)
    assert preflight(load_config(config_path, ["run.device=cpu"]))
    (line,) = (line for line in lines if line.startswith("speed"))
    assert re.search("FLOPs.*CPU", line)
    assert not any(line.startswith("time") for line in lines)


def test_what_does_not_fit_is_not_tried(
    lines: list[str], config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.preflight.plan.device_memory", lambda device: 2**20)
    assert not preflight(load_config(config_path))
    assert re.match(r"error .*MiB.* 1\.0 MiB.*train\.micro_batch", lines[-1])


def dataset(**facts: Any) -> Any:
    given = {"n_tokens": 10**9, "n_documents": 10**5, "max_token": 99, "shards": ()}
    return SimpleNamespace(**(given | facts))


def plan_of(
    config: TrainConfig, train: Any, val: Any = None, steps: int = 1000, epochs: float = 0.1
) -> RunSize:
    """Return a plan of a model that has ten parameters for each token of a step."""
    model: Any = SimpleNamespace(num_matmul_parameters=lambda: 10 * plan.shape.tokens)
    plan = RunSize(config, model, None, val, 1)
    plan.train, plan.steps, plan.epochs = train, steps, epochs
    return plan


@pytest.fixture
def sound(config_path: Path) -> TrainConfig:
    config = load_config(config_path)
    return replace(config, model=replace(config.model, vocab_size=320))


def found(config: TrainConfig, data: Any = None, **options: Any) -> list[str]:
    size = {k: options.pop(k) for k in ("steps", "epochs") if k in options}
    options = {"device": CPU, "dtype": "fp32"} | options
    return list(warnings_of(plan_of(config, data or dataset(), **size), **options))


def test_a_sound_run_has_no_warning(sound: TrainConfig) -> None:
    assert found(sound) == []


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("model", {"vocab_size": 50257}, r"model\.vocab_size .*50257.*50304"),
        (
            "model",
            {"sliding_window_tokens": 16},
            r"model\.sliding_window_tokens .*\b16\b.*data\.seq_len",
        ),
        ("schedule", {"warmup_steps": 300}, r"schedule\.warmup_steps .*\b300\b.*\b1,?000 steps"),
        ("schedule", {"warmup_steps": 5000}, r"schedule\.warmup_steps .*\b5000\b.*peak.*"),
        ("eval", {"every_steps": 1001}, r"eval\.every_steps .*\b1001\b"),
        ("checkpoint", {"every_steps": 1001}, r"checkpoint\.every_steps .*\b1001\b"),
    ],
)
def test_settings_that_hurt(
    sound: TrainConfig, section: str, change: dict[str, Any], expected: str
) -> None:
    config = replace(sound, train=replace(sound.train, steps=10_000))
    config = replace(config, **{section: replace(getattr(config, section), **change)})
    assert len(lines := found(config)) == 1
    assert re.search(expected, lines[0])


def test_data_and_length_that_hurt(sound: TrainConfig) -> None:
    assert "tokens per matrix parameter" in found(sound, steps=24)[0]
    assert found(sound, steps=26) == []
    assert "7.0 epochs" in found(sound, epochs=7.0)[0]
    short = found(sound, data=dataset(n_documents=10**9 // 7))[0]
    assert re.search(r"data\.seq_len .*\b7 tokens.*data\.attention_across_documents", short)
    assert "checkpoint.every_steps" in found(sound, seconds=4000.0)[0]
    assert found(sound, seconds=3000.0) == []
    on_cuda = found(sound, device=CUDA, dtype="fp32")
    assert any(re.search(r"run\.dtype .*fp32.*bf16", line) for line in on_cuda)
    assert any(re.search(r"model\.dim .*\b32\b.*\b64\b", line) for line in on_cuda)


# ---- data that are missing, or of another vocabulary ---------------------------------------------


CONFIGS = Path(__file__).parents[2] / "configs"
LLM_C = "llm.c's dev/data/fineweb.py"
REMEDIES = {
    "gpt2-124m": ("data/fineweb10B", "GPT-2's", f"{LLM_C} or modded-nanogpt's data/cached_finew"),
    "llama-350m": ("data/fineweb-llama2", "Llama 2's", "--tokenizer PATH"),
    "llama-1b": ("data/fineweb-llama3", "Llama 3's", f"{LLM_C} --model_desc llama-3"),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_without_its_data_a_config_is_told_but_for_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fasttrain.preflight.plan.device_memory", lambda device: 2**37)
    path, whose, where = REMEDIES[name]
    command = [str(CONFIGS / f"{name}.toml"), "run.dtype=fp32"]
    small = ["model.n_layers=1", "data.seq_len=64", "train.micro_batch=1"]  # for speed
    assert main([*command, *small, "--no-probe"]) == 0
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "FLOPs" in told["model"]
    assert "× 1 sequence × " in told["step"]
    assert told["run"].endswith("FLOPs")
    assert {"parameters", "activations", "total"} <= told.keys()
    for line in (told["data"], refused(command, capsys)):
        assert all(part in line for part in (path, whose, where))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def refused(command: list[str], capsys: Any) -> str:
    assert train_main(command) == 2
    line: str = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_what_cannot_be_told_without_data_is_an_error_or_left_open(
    config_path: Path, capsys: Any
) -> None:
    nowhere = [str(config_path), "--no-probe", "data.path=nowhere"]
    assert main(nowhere) == 2  # nor is there a vocabulary
    assert "python -m fasttrain.prepare nowhere --input TEXT\n" in capsys.readouterr().err
    epochs = ["train.steps=none", "train.epochs=2", "model.vocab_size=500"]
    assert main([*nowhere, *epochs]) == 0
    shown = capsys.readouterr().out
    assert "2 epochs" in shown
    assert "prepare nowhere --input TEXT --tokenizer bpe:500\n" in shown
    assert main([str(config_path), "data.path=nowhere", "model.vocab_size=500", "--diagnose"]) == 2


def test_both_vocabularies_are_shown_where_they_differ(lines: list[str], config_path: Path) -> None:
    config = load_config(config_path, ["model.vocab_size=50304"])
    assert preflight(config, probe=False)
    (data,) = (line for line in lines if line.startswith("data "))
    assert re.search(r"\b50,304 .*model.*\b257 .*data", data)
    told = re.compile(r"\b50,047\b.*\b50,304\b.*\b256\b.*model\.vocab_size")
    assert sum(bool(told.search(line)) for line in lines) == 1


def test_few_tokens_to_validate_on_are_told_before_a_run_and_in_it(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    told = r"\b501 validation tokens.*--val-fraction"
    assert main([str(config_path), "--no-probe"]) == 0
    assert re.search(told, capsys.readouterr().out)
    assert train_main([str(config_path), "train.steps=3"]) == 0
    assert re.search(told, capsys.readouterr().out)
    enough = SimpleNamespace(n_tokens=5_000, shards=())
    settled = load_config(config_path, ["model.vocab_size=320"])
    assert list(warnings_at_start(plan_of(settled, dataset(max_token=256), enough))) == []


def test_several_processes_where_there_is_one_are_told(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [str(config_path), "distributed.mode=fsdp", "train.steps=3"]
    told = r"warning\b.*distributed\.mode .*fsdp.*torchrun"
    assert train_main(command) == 0
    assert re.search(told, capsys.readouterr().out)
    assert main([*command, "--no-probe"]) == 0
    assert re.search(told, capsys.readouterr().out)
    assert main([*command, "--no-probe", "--world-size", "2"]) == 0
    assert not re.search(told, capsys.readouterr().out)


def test_what_holds_nothing_at_the_peak_is_not_told_as_0_MiB(
    lines: list[str], config_path: Path
) -> None:
    overrides = ["model.vocab_size=100000", "model.n_layers=1", "train.micro_batch=64"]
    preflight(load_config(config_path, overrides), probe=False)
    (gradients,) = (line for line in lines if line.startswith("    gradients "))
    assert gradients.split() == ["gradients", "0", "(freed", "before", "the", "peak)"]
    assert not any(" 0.0 MiB" in line for line in lines)


# ---- the automatic micro-batch -------------------------------------------------------------------


@pytest.fixture
def auto(config_path: Path) -> TrainConfig:
    overrides = ["train.micro_batch=auto", "train.tokens_per_step=384", "model.vocab_size=320"]
    return load_config(config_path, overrides)  # 24 rows of 16


def settle(config: TrainConfig, device: torch.device = CPU) -> int:
    return best_micro_batch(config, 1, device, print)


def speeds(monkeypatch: pytest.MonkeyPatch, rows_per_s: dict[int, float]) -> list[int]:
    """Replace the probe by one of these speeds; return the list of the sizes that it is asked."""
    tried = []

    def probe(config: TrainConfig, **_: Any) -> Probe:
        rows = config.train.micro_batch
        tried.append(rows)
        if rows not in rows_per_s:
            raise torch.OutOfMemoryError
        return Probe(rows / rows_per_s[rows], 0, 0.0)

    monkeypatch.setattr(memory, "probe_step", probe)
    return tried


def test_a_cpu_takes_rows_until_more_do_not_pay(
    auto: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = speeds(monkeypatch, {1: 10, 2: 18, 4: 25, 8: 26, 24: 40})
    assert settle(auto) == 4
    assert tried == [1, 2, 4, 8]  # 3 is too near 2, 24 is never reached


def test_a_gpu_takes_the_largest_that_runs(
    auto: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 2**40)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_, **__: SimpleNamespace(total=1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tried = speeds(monkeypatch, {8: 1.0, 6: 1.0})
    assert settle(auto, CUDA) == 8
    assert tried == [24, 12, 8]
    a_quarter = replace(auto, train=replace(auto.train, tokens_per_step=96))
    assert settle(a_quarter, CUDA) == 6  # 6 rows for each of 4 ranks


def test_a_probe_that_ran_out_of_memory_leaves_nothing_behind(
    auto: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref[Transformer]] = []
    alive: list[int] = []

    def probe(config: TrainConfig, **options: Any) -> Probe:
        alive.append(sum(model() is not None for model in left))
        if config.train.micro_batch > 6:
            monkeypatch.setattr(TrainStep, "_measure", fail)
        else:
            monkeypatch.undo()
        return probe_step(config, **options | {"device": CPU})

    def fail(self: TrainStep, *_: Any) -> None:
        left.append(weakref.ref(self.model))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "device_memory", lambda device: 2**40)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_, **__: SimpleNamespace(total=1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(memory, "probe_step", probe)
    assert settle(auto, CUDA) == 6
    assert len(left) == 3
    assert alive == [0, 0, 0, 0]


def test_only_what_is_estimated_to_fit_is_tried(
    auto: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = speeds(monkeypatch, dict.fromkeys(range(1, 25), 0.0) | {1: 1.0, 2: 2.0, 4: 4.0})
    fitting = SimpleNamespace(total=100), SimpleNamespace(total=10**9)
    monkeypatch.setattr(memory, "device_memory", lambda device: 10**6)
    monkeypatch.setattr(memory, "estimate_memory", lambda c, **_: fitting[c.train.micro_batch > 2])
    assert settle(auto) == 2
    assert tried == [1, 2]
    monkeypatch.setattr(memory, "device_memory", lambda device: 10)
    with pytest.raises(UserError, match=r"train\.micro_batch .*data\.seq_len .*MiB"):
        settle(auto)


def test_it_needs_a_step_of_known_size(config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch .*train\.tokens_per_step"):
        load_config(config_path, ["train.micro_batch=auto"])


def test_a_run_settles_it_once_and_keeps_it_when_resumed(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    speeds(monkeypatch, {1: 10, 2: 18, 4: 25, 8: 26})
    arguments = [str(config_path), "train.micro_batch=auto", "train.tokens_per_step=128"]
    assert train_main([*arguments, "--stop-at-step", "2"]) == 75
    written = load_config(tmp_path / "runs/toy/config.toml")
    assert (written.train.micro_batch, written.train.tokens_per_step) == (4, 128)
    speeds(monkeypatch, {})  # not asked again
    assert train_main([*arguments, "--resume", "auto"]) == 0


# ---- commands ------------------------------------------------------------------------------------


def test_the_checklist_passes_on_a_sound_run(lines: list[str], config_path: Path) -> None:
    assert diagnose_run(load_config(config_path, ["schedule.warmup_steps=10"]))
    assert "pass  causality" in lines[-1]
    assert re.search(r"pass  learning rate: .*0\.003", lines[-1])


def test_the_commands_and_their_exit_status(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(config_path), "--no-probe"]) == 0
    assert train_main([str(config_path), "--dry-run", "optim.lr=1e-3"]) == 0
    assert not (tmp_path / "runs").exists()
    assert main([str(config_path), "data.seq_len=9"]) == 0
    assert main([str(tmp_path / "missing.toml")]) == 2
    assert "missing.toml: " in capsys.readouterr().err
    assert main([str(config_path), "--diagnose", "optim.lr=1e-30"]) == 1  # changes nothing


def test_as_a_process(config_path: Path, tmp_path: Path) -> None:
    process = start("fasttrain.preflight", config_path, "--no-probe", cwd=tmp_path)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "memory" in out
    assert err == ""
