"""What a checkpoint holds is what a run can go on from, or is refused in a line (R31, R25)."""

import json
import os
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
    """Expect one line that holds these words, and status 2."""
    err = capsys.readouterr().err
    assert (status, err.count("\n"), "Traceback" in err) == (2, 1, False), err
    assert all(word in err for word in words), err


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
    "no TOML": ("[train]\nsteps = ***\n", {}, "not valid TOML"),
    "another key": ("[train]\nstep = 1\n", {}, "train.step is not a config key"),
    "a value out of range": ("[train]\nsteps = 0\n", {}, "out of range"),
    "deep TOML": (f"{CONFIG}x = {'[' * 5000}{']' * 5000}\n", {}, "recursion depth"),
    "long names": (f"{CONFIG}{'a.' * 100_000}a = 1\n", {}, "100,000 dots"),
    "much TOML": (f"{CONFIG}#{' ' * 300_000}\n", {}, "are credible"),
    "another step": (CONFIG, {"step": 7}, "step is 7"),
    "a run without its faults": (CONFIG, {"step": 2, "position": 8}, "best_val_loss is missing"),
    "deep JSON": (CONFIG, {"x": json.loads("[" * 500 + "]" * 500)}, "nested too deep"),
}


@pytest.mark.parametrize(("config", "state", "reason"), UNFIT.values(), ids=UNFIT)
def test_R31_what_cannot_be_parsed_back_is_not_committed(
    config: str, state: dict[str, Any], reason: str, tmp_path: Path, capsys: Capture
) -> None:
    older = save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.save(2, groups(2), state, config)
    with pytest.raises(CheckpointError, match=rf"step-00000002 was not saved.*{reason}"):
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
    "hidden_dim": ("n_heads = 2", "n_heads = 2\nhidden_dim = 16000000", "blocks.0.mlp.down.weight"),
    "n_layers": ("n_layers = 1", "n_layers = 100000000", "model.n_layers = 100000000"),
    "n_heads": ("n_heads = 2", "n_heads = 2\nn_kv_heads = 1", "blocks.0.attention"),
    "vocab_size": ("vocab_size = 320", f"vocab_size = {2**32}", "fit [model]"),
    "dim": ("\ndim = 32", f"\ndim = {2**70}", "is out of range"),
    "seq_len": ("seq_len = 16", "seq_len = 16000000", "data.seq_len = 16000000"),
    "seq_len of 2**62": ("seq_len = 16", f"seq_len = {2**62}", "is out of range"),
    "no numbers": ("n_layers = 1", "n_layers = *", "config.toml: is not valid TOML"),
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
    refused(generate.main(["runs/a", "--prompt", "a"]), capsys, "norm.weight is not finite")
    tensors["norm.weight"][:] = 3e38  # finite, and its logits are not
    save_file(tensors, copy / "model.safetensors")
    reseal(copy)
    refused(generate.main(["runs/a", "--prompt", "a"]), capsys, "logits are not finite")


# ---- R24: a checkpoint of another run, or of none, is refused ------------------------------------


def without(*path: str) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    **{
        f"no {key}": (without(key), f"{key} is missing")
        for key in ("step", "total_steps", "eval_due", "trained_s", "best_val_loss", "loss_ema")
    },
    "no position": (without("position"), "holds a model, and no run"),
    "no data": (without("data"), "holds a model, and no run"),
    "no facts": (lambda s: {**s, "data": {}}, "data.train.vocab_size: none"),
    "odd facts": (lambda s: s["data"]["train"].update(shards=[3]), "data.train.shards: [3]"),
    "no faults": (without("faults"), "faults is missing"),
    "no rollbacks": (without("faults", "rollbacks"), "faults.rollbacks is missing"),
    "odd faults": (lambda s: s["faults"].update(row=[[1, 2]]), "faults.row[0] is [1, 2]"),
    "a fault of no kind": (
        lambda s: s["faults"].update(row=[[1, 2, "x", 1.0, 1.0]]),
        "faults.row[0][2] is 'x', which is no overflow or nonfinite or spike",
    ),
    "a loss of text": (
        lambda s: s["faults"].update(row=[[1, 2, "spike", "abc", 1.0]]),
        "faults.row[0][3] is 'abc'",
    ),
    "a list": (lambda s: [s], "not a JSON object"),
    "a negative step": (lambda s: {**s, "step": -2}, "step is -2"),
    "a true step": (lambda s: {**s, "step": True}, "step is True"),
    "a step of text": (lambda s: {**s, "step": "2"}, "step is '2'"),
    "nan": (lambda s: {**s, "best_val_loss": float("nan")}, "best_val_loss is nan"),
    "huge": (lambda s: {**s, "trained_s": 10**400}, "trained_s is 1000"),
    "odd losses": (lambda s: {**s, "val_losses": [1.0, {}]}, "val_losses[1] is {}"),
    "odd history": (lambda s: {**s, "history": [{"key": "a"}]}, "history[0].new is missing"),
    "deep": (lambda s: {**s, "x": json.loads("[" * 300 + "]" * 300)}, "nested too deep"),
    "another step": (lambda s: {**s, "step": 3}, "step is 3, and the manifest is of step 2"),
    "another position": (lambda s: {**s, "position": 9}, "2 steps of 4 samples"),
    "other tokens": (lambda s: {**s, "tokens": 999}, "8 samples of 16 hold 128"),
    "far away": (lambda s: {**s, "regular": False, "position": 2**62}, "position is 4611"),
    "no steps": (lambda s: {**s, "total_steps": 0}, "total_steps"),
    "no tokens": (lambda s: {**s, "tokens": 0}, "tokens is 0"),
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
        refused(resume(), capsys, "manifest.json: damaged")


Tensors = dict[str, torch.Tensor]
OTHERS: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "a moment of another shape": (
        "optimizer",
        lambda t: t.update({"norm.weight/exp_avg": torch.zeros(31)}),
        "norm.weight/exp_avg is (31,) torch.float32 there and (32,)",
    ),
    "a moment of one element": (
        "optimizer",
        lambda t: t.update({"norm.weight/exp_avg_sq": torch.zeros(1)}),
        "norm.weight/exp_avg_sq is (1,)",
    ),
    "a moment of another type": (
        "optimizer",
        lambda t: t.update({"norm.weight/exp_avg": torch.zeros(32, dtype=torch.float16)}),
        "norm.weight/exp_avg is (32,) torch.float16 there",
    ),
    "no second moment": (
        "optimizer",
        lambda t: t.pop("norm.weight/exp_avg_sq"),
        "norm.weight/exp_avg_sq is missing there",
    ),
    "no state of a parameter": (
        "optimizer",
        lambda t: [t.pop(name) for name in list(t) if name.startswith("norm.weight/")],
        "norm.weight/exp_avg is missing there",
    ),
    "no state at all": ("optimizer", lambda t: t.clear(), "/exp_avg is missing there"),
    "state of nothing": ("optimizer", lambda t: t.update({"x/y": torch.zeros(1)}), "x"),
    "no random state": ("trainer", lambda t: t.pop("cpu"), "trainer.cpu is missing"),
    "a short random state": (
        "trainer",
        lambda t: t.update(cpu=t["cpu"][:100].clone()),
        "trainer.cpu is (100,) torch.uint8",
    ),
    "an odd random state": ("trainer", lambda t: t["cpu"].fill_(255), "random generator"),
    "no scale": ("trainer", lambda t: t.pop("grad_scale"), "trainer.grad_scale is missing"),
    "a parameter of another shape": (
        "model",
        lambda t: t.update({"norm.weight": torch.zeros(31)}),
        "norm.weight is (31,) there and (32,) here",
    ),
    "no parameter": ("model", lambda t: t.pop("norm.weight"), "norm.weight is missing there"),
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
        refused(main([*command, "--resume", "auto"]), capsys, f"{full} is missing there")
    save_file(whole, file)
    reseal(STEP)
    assert main([*command, "--resume", "auto", "--stop-at-step", "3"]) == 75
