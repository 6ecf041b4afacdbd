"""What a checkpoint holds is what a run can go on from, or is refused in a line (R31, R25)."""

import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttrain import generate, hf
from fasttrain.checkpoint import CheckpointError, CheckpointWriter, load, resolve, verify
from fasttrain.checkpoint.__main__ import main as checkpoint_main
from fasttrain.train import main
from tests.support.toy import OPTIMIZERS, write_config
from tests.support.toy_checkpoints import CONFIG, groups, reseal, save

Capture = pytest.CaptureFixture[str]
STEP = Path("runs/a/checkpoints/step-00000002")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped at step 2."""
    folder = tmp_path_factory.mktemp("stopped")
    config = write_config(folder, "model.n_layers=1")
    command = [str(config), "run.name=a", "model.n_layers=1", f"run.out_dir={folder / 'runs'}"]
    assert main([*command, "--stop-at-step", "2"]) == 75
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a copy of that run, in the current folder."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return STEP


def resume() -> int:
    arguments = ["toy.toml", "model.n_layers=1", "run.name=a", "--stop-at-step", "3"]
    return main([*arguments, f"data.path={Path('data').resolve()}", "--resume", "auto"])


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a checkpoint, as an attacker would."""
    value = json.loads(file.read_text())
    file.write_text(json.dumps(change(value) or value))
    reseal(file.parent)


def refused(status: int, capsys: Capture, *words: str) -> None:
    """Expect one line that matches these expressions, and status 2."""
    err = capsys.readouterr().err
    assert (status, err.count("\n"), "Traceback" in err) == (2, 1, False), err
    assert all(re.search(word, err) for word in words), err


# ---- R31: a sealed checkpoint can be resumed -----------------------------------------------------


def test_R31_a_variable_named_like_a_secret_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENS", "10000000")
    monkeypatch.setenv("MUON_TOKEN", "adamw8bit-0")
    command = [str(write_config(tmp_path)), "run.name=a", "train.steps=none"]
    command += ["train.tokens=10000000", "model.n_layers=1"]
    assert main([*command, "--stop-at-step", "1"]) == 75
    assert load(resolve(Path("runs/a"))).config.train.tokens == 10_000_000
    monkeypatch.delenv("TOKENS")
    assert main([*command, "--stop-at-step", "2", "--resume", "auto"]) == 75


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "no TOML": ("[train]\nsteps = ***\n", {}, "TOML"),
    "another key": ("[train]\nstep = 1\n", {}, r"train\.step .*train\.steps"),
    "a value out of range": ("[train]\nsteps = 0\n", {}, r"train\.steps .*\b0\b"),
    "deep TOML": (f"{CONFIG}x = {'[' * 5000}{']' * 5000}\n", {}, "recursion depth"),
    "long names": (f"{CONFIG}{'a.' * 100_000}a = 1\n", {}, "100,000 "),
    "much TOML": (f"{CONFIG}#{' ' * 300_000}\n", {}, r"\b300,\d{3} "),
    "another step": (CONFIG, {"step": 7}, r"\bstep .*\b7\b"),
    "a run without its faults": (CONFIG, {"step": 2, "position": 8}, "best_val_loss .*missing"),
    "deep JSON": (CONFIG, {"x": json.loads("[" * 500 + "]" * 500)}, "nested"),
}


@pytest.mark.parametrize(("config", "state", "reason"), UNFIT.values(), ids=UNFIT)
def test_R31_what_cannot_be_parsed_back_is_not_committed(
    config: str, state: dict[str, Any], reason: str, tmp_path: Path, capsys: Capture
) -> None:
    older = save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.save(2, groups(2), state, config)
    with pytest.raises(CheckpointError, match=rf"step-00000002\b.*{reason}"):
        writer.wait()
    assert sorted(os.listdir(tmp_path)) == ["latest", older.name]
    assert (tmp_path / "latest").read_text() == f"{older.name}\n"
    # Sealed all the same, by another program: it is found out, and the one before is taken.
    shutil.copytree(older, newer := tmp_path / "step-00000002")
    (newer / "config.toml").write_text(config)
    (newer / "state.json").write_text(json.dumps(state))
    reseal(newer, step=2, commit=2)
    with pytest.raises(CheckpointError, match=reason):
        verify(newer)
    assert checkpoint_main([str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("verified") == shown.count("DAMAGED") == 1
    passed_over: list[str] = []
    assert resolve(tmp_path, report=passed_over.append) == older
    assert len(passed_over) == 1


# ---- R25: what it asks for is held against what it has -------------------------------------------

HUGE = {
    "hidden_dim": (
        "n_heads = 2",
        "n_heads = 2\nhidden_dim = 16000000",
        r"blocks\.0\.mlp\.down\.weight",
    ),
    "n_layers": ("n_layers = 1", "n_layers = 100000000", r"model\.n_layers .*100000000"),
    "n_heads": ("n_heads = 2", "n_heads = 2\nn_kv_heads = 1", r"blocks\.0\.attention"),
    "vocab_size": ("vocab_size = 320", f"vocab_size = {2**32}", r"\[model\].*data\.seq_len"),
    "dim": ("\ndim = 32", f"\ndim = {2**70}", rf"model\.dim .*{2**70}"),
    "seq_len": ("seq_len = 16", "seq_len = 16000000", r"data\.seq_len .*16000000"),
    "seq_len of 2**62": ("seq_len = 16", f"seq_len = {2**62}", rf"data\.seq_len .*{2**62}"),
    "no numbers": ("n_layers = 1", "n_layers = *", r"config\.toml: .*TOML"),
}


@pytest.mark.parametrize(("old", "new", "reason"), HUGE.values(), ids=HUGE)
def test_R25_a_config_that_asks_for_more_than_the_file_has(
    old: str, new: str, reason: str, copy: Path, capsys: Capture
) -> None:
    text = (copy / "config.toml").read_text()
    assert text.count(old) == 1
    (copy / "config.toml").write_text(text.replace(old, new))
    reseal(copy)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(generate.main(["runs/a", "--prompt", "a"]), capsys, reason)
    refused(hf.main(["export", "runs/a", "out"]), capsys, reason)
    refused(main(["--resume", str(copy)]), capsys, reason)
    assert time.monotonic() - started < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert not Path("out").exists()


def test_R25_a_model_that_is_not_finite(copy: Path, capsys: Capture) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["norm.weight"][3] = torch.nan
    save_file(tensors, copy / "model.safetensors")
    reseal(copy)
    refused(generate.main(["runs/a", "--prompt", "a"]), capsys, r"norm\.weight .*finite")
    tensors["norm.weight"][:] = 3e38  # finite, and its logits are not
    save_file(tensors, copy / "model.safetensors")
    reseal(copy)
    refused(generate.main(["runs/a", "--prompt", "a"]), capsys, "logits .*finite")


# ---- R24: a checkpoint of another run, or of none, is refused ------------------------------------


def without(*path: str) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    **{
        f"no {key}": (without(key), rf"state\.json: .*\b{key} .*missing")
        for key in ("step", "total_steps", "eval_due", "trained_s", "best_val_loss", "loss_ema")
    },
    "no position": (without("position"), r"model\.init_from=.*--resume"),
    "no data": (without("data"), r"model\.init_from=.*--resume"),
    "no facts": (lambda s: {**s, "data": {}}, r"data\.train\.vocab_size: none"),
    "odd facts": (lambda s: s["data"]["train"].update(shards=[3]), r"data\.train\.shards: \[3\]"),
    "no faults": (without("faults"), r"\bfaults .*missing"),
    "no rollbacks": (without("faults", "rollbacks"), r"faults\.rollbacks .*missing"),
    "odd faults": (lambda s: s["faults"].update(row=[[1, 2]]), r"faults\.row\[0\] .*\[1, 2\]"),
    "a fault of no kind": (
        lambda s: s["faults"].update(row=[[1, 2, "x", 1.0, 1.0]]),
        r"faults\.row\[0\]\[2\] .*'x'.*overflow.*nonfinite.*spike",
    ),
    "a loss of text": (
        lambda s: s["faults"].update(row=[[1, 2, "spike", "abc", 1.0]]),
        r"faults\.row\[0\]\[3\] .*'abc'",
    ),
    "a list": (lambda s: [s], r"state\.json.* JSON object"),
    "a negative step": (lambda s: {**s, "step": -2}, r"\bstep .*-2\b"),
    "a true step": (lambda s: {**s, "step": True}, r"\bstep .*True\b"),
    "a step of text": (lambda s: {**s, "step": "2"}, r"\bstep .*'2'"),
    "nan": (lambda s: {**s, "best_val_loss": float("nan")}, "best_val_loss .*nan"),
    "huge": (lambda s: {**s, "trained_s": 10**400}, "trained_s .*1000"),
    "odd losses": (lambda s: {**s, "val_losses": [1.0, {}]}, r"val_losses\[1\] .*\{\}"),
    "odd history": (lambda s: {**s, "history": [{"key": "a"}]}, r"history\[0\]\.new .*missing"),
    "deep": (lambda s: {**s, "x": json.loads("[" * 300 + "]" * 300)}, "nested"),
    "another step": (lambda s: {**s, "step": 3}, r"\bstep .*\b3\b.*step 2\b"),
    "another position": (
        lambda s: {**s, "position": 9},
        r"position .*\b9\b.*\b2 steps\b.*\b4 samples\b",
    ),
    "other tokens": (
        lambda s: {**s, "tokens": 999},
        r"tokens .*\b999\b.*\b8 samples\b.*\b16\b.*\b128\b",
    ),
    "far away": (lambda s: {**s, "regular": False, "position": 2**62}, "position .*4611"),
    "no steps": (lambda s: {**s, "total_steps": 0}, "total_steps"),
    "no tokens": (lambda s: {**s, "tokens": 0}, r"\btokens .*\b0\b"),
}


@pytest.mark.parametrize(("change", "reason"), STATES.values(), ids=STATES)
def test_R24_a_state_that_is_none(
    change: Callable[[Any], Any], reason: str, copy: Path, capsys: Capture
) -> None:
    edit(copy / "state.json", change)
    refused(resume(), capsys, reason)


def test_R24_a_deep_manifest(copy: Path, capsys: Capture) -> None:
    for depth in (100, 5_000, 100_000):
        text = (copy / "manifest.json").read_text().rstrip("}\n ")
        (copy / "manifest.json").write_text(f'{text}, "x": {"[" * depth}{"]" * depth}}}')
        refused(resume(), capsys, r"manifest\.json: ")


Tensors = dict[str, torch.Tensor]
OTHERS: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "a moment of another shape": (
        "optimizer",
        lambda t: t.update({"norm.weight/exp_avg": torch.zeros(31)}),
        r"norm\.weight/exp_avg .*\(31,\) torch\.float32.*\(32,\)",
    ),
    "a moment of one element": (
        "optimizer",
        lambda t: t.update({"norm.weight/exp_avg_sq": torch.zeros(1)}),
        r"norm\.weight/exp_avg_sq .*\(1,\).*\(32,\)",
    ),
    "a moment of another type": (
        "optimizer",
        lambda t: t.update({"norm.weight/exp_avg": torch.zeros(32, dtype=torch.float16)}),
        r"norm\.weight/exp_avg .*\(32,\) torch\.float16.*torch\.float32",
    ),
    "no second moment": (
        "optimizer",
        lambda t: t.pop("norm.weight/exp_avg_sq"),
        r"norm\.weight/exp_avg_sq .*missing",
    ),
    "no state of a parameter": (
        "optimizer",
        lambda t: [t.pop(name) for name in list(t) if name.startswith("norm.weight/")],
        r"norm\.weight/exp_avg .*missing",
    ),
    "no state at all": ("optimizer", lambda t: t.clear(), "/exp_avg .*missing"),
    "state of nothing": ("optimizer", lambda t: t.update({"x/y": torch.zeros(1)}), "'x'"),
    "no random state": ("trainer", lambda t: t.pop("cpu"), r"trainer\.cpu .*missing"),
    "a short random state": (
        "trainer",
        lambda t: t.update(cpu=t["cpu"][:100].clone()),
        r"trainer\.cpu .*\(100,\) torch\.uint8",
    ),
    "an odd random state": ("trainer", lambda t: t["cpu"].fill_(255), "mt19937"),
    "no scale": ("trainer", lambda t: t.pop("grad_scale"), r"trainer\.grad_scale .*missing"),
    "a parameter of another shape": (
        "model",
        lambda t: t.update({"norm.weight": torch.zeros(31)}),
        r"norm\.weight .*\(31,\).*\(32,\)",
    ),
    "no parameter": ("model", lambda t: t.pop("norm.weight"), r"norm\.weight .*missing"),
}


@pytest.mark.parametrize(("group", "change", "reason"), OTHERS.values(), ids=OTHERS)
def test_R24_tensors_of_another_run(
    group: str, change: Callable[[Tensors], Any], reason: str, copy: Path, capsys: Capture
) -> None:
    tensors = load_file(copy / f"{group}.safetensors")
    change(tensors)
    save_file(tensors, copy / f"{group}.safetensors")
    reseal(copy)
    refused(resume(), capsys, reason)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_R24_moments_of_every_optimizer_are_checked(
    name: str, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [str(stopped / "toy.toml"), "run.name=a", "model.n_layers=1", f"optim.name={name}"]
    command += ["optim.lr=1e-3", "model.positions=learned", "model.norm=layer", "model.bias=true"]
    assert main([*command, "--stop-at-step", "2"]) == 75
    file = STEP / "optimizer.safetensors"
    whole = load_file(file)
    for key in sorted({full.partition("/")[2] for full in whole}):
        full = next(full for full in sorted(whole) if full.endswith(f"/{key}"))
        save_file({n: t for n, t in whole.items() if n != full}, file)
        reseal(STEP)
        capsys.readouterr()
        refused(main([*command, "--resume", "auto"]), capsys, rf"{re.escape(full)} .*missing")
    save_file(whole, file)
    reseal(STEP)
    assert main([*command, "--resume", "auto", "--stop-at-step", "3"]) == 75
