"""Resuming: only from a checkpoint that fits (R24), past damaged ones (R14), provably exact."""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain import checkpoint, verify_resume
from fasttrain.checkpoint.__main__ import main as checkpoint_main
from fasttrain.config import UserError, load_config
from fasttrain.data.format import write_dataset_json
from fasttrain.data.tokenizer import byte_tokenizer, end_of_text_id
from fasttrain.prepare.writer import ShardWriter
from fasttrain.run import run as session
from fasttrain.run.folder import newest_run_dir
from fasttrain.run.resume import check_resumable, made_otherwise
from fasttrain.train import main
from tests.support.faults import flip_bit
from tests.support.toy import write_config
from tests.support.toy_checkpoints import save
from tests.support.toy_trainer import rows

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped at step 2; tests that go on from it copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    config = write_config(folder)
    command = [str(config), "run.name=a", f"run.out_dir={folder / 'runs'}"]
    assert main([*command, "--stop-at-step", "2"]) == 75
    return folder


REFUSED = {
    "length": (["data.seq_len=8"], "data.seq_len: 16 → 8"),
    "horizon": (["train.steps=13"], "train.steps: 12 → 13"),
    "seed": (["run.seed=8"], "run.seed: 7 → 8"),
    "model": (["model.n_layers=1"], "model.n_layers: 2 → 1"),
    "optimizer": (["optim.name=muon"], "optim.name: adamw → muon"),
    "learning rate": (["optim.lr=1e-4"], "optim.lr: 0.003 → 0.0001"),
    "schedule": (["schedule.name=linear"], "schedule.name: cosine → linear"),
    "batch": (["train.micro_batch=2"], "train.micro_batch: 4 → 2"),
    "accumulation": (["train.tokens_per_step=128"], "train.tokens_per_step: none → 128"),
    "precision": (["run.dtype=bf16"], "run.dtype: fp32 → bf16"),
}


@pytest.mark.parametrize(("changes", "expected"), REFUSED.values(), ids=REFUSED)
def test_R24_a_changed_setting_is_refused_and_named(
    changes: list[str], expected: str, stopped: Path, capsys: Capture
) -> None:
    before = sorted(stopped.rglob("*"))
    command = [str(stopped / "toy.toml"), "run.name=a", f"run.out_dir={stopped / 'runs'}"]
    assert main([*command, *changes, "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "--allow-change" in error
    assert sorted(stopped.rglob("*")) == before


def test_R24_every_difference_is_named_at_once(stopped: Path, capsys: Capture) -> None:
    command = [str(stopped / "toy.toml"), "run.name=a", f"run.out_dir={stopped / 'runs'}"]
    changes = ["optim.lr=1e-4", "model.dim=64", "run.seed=1"]
    assert main([*command, *changes, "--resume", "auto", "--allow-change", "run.seed"]) == 2
    error = capsys.readouterr().err
    assert "optim.lr: 0.003 → 0.0001; " in error or "; optim.lr: 0.003 → 0.0001" in error
    assert "model.dim: 32 → 64" in error
    assert "run.seed" not in error


def write_two_shards(folder: Path, texts: tuple[bytes, bytes], n_special: int = 0) -> None:
    """Write a dataset whose training split is two files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([f"<{n}>" for n in range(n_special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = end_of_text_id(tokenizer)
    splits = {}
    for split, parts in (("train", texts), ("val", (b"alpha beta " * 9,))):
        writer = ShardWriter(
            folder, split, vocab_size=tokenizer.get_vocab_size(), shard_tokens=len(texts[0]) + 1
        )
        for part in parts:
            ids = np.array([*tokenizer.encode(part.decode()).ids, end])
            writer.write(ids, [len(ids)])
        splits[split] = (writer.close(), sum(map(len, parts)))
    write_dataset_json(
        folder,
        vocab_size=tokenizer.get_vocab_size(),
        end_of_text=end,
        splits=splits,
        source={"made by": "tests"},
    )


A, B, C = b"alpha beta " * 40, b"gamma delta" * 40, b"gamma Delta" * 40


@pytest.mark.parametrize(
    ("texts", "n_special", "expected"),
    [
        ((B, A), 0, r"data\.train\.shards: .*\border\b"),
        ((A, C), 0, r"data\.train\.shards: .*\b2 of 2: .* → "),
        ((A, B + B), 0, r"data\.train\.shards: 2 .* → 3\b"),
        ((A, B), 1, r"data\.train\.tokenizer: "),
    ],
    ids=["order", "contents", "number", "tokenizer"],
)
def test_R24_changed_data_are_refused_and_named(
    texts: tuple[bytes, bytes], n_special: int, expected: str, toy: Path, capsys: Capture
) -> None:
    data = toy.parent / "data"
    command = [str(toy), "run.name=a", "model.vocab_size=384", "train.steps=3"]
    write_two_shards(data, (A, B))
    assert main([*command, "--stop-at-step", "1"]) == 75
    write_two_shards(data, texts, n_special)
    assert main([*command, "--resume", "auto"]) == 2
    assert re.search(expected, capsys.readouterr().err)
    write_two_shards(data, (A, B))
    moved = data.rename(toy.parent / "elsewhere")  # the same data at another place are the same
    assert main([*command, f"data.path={moved}", "--resume", "auto"]) == 0


def test_R24_an_allowed_change_is_recorded_and_shown(toy: Path, capsys: Capture) -> None:
    assert main([str(toy), "--stop-at-step", "2"]) == 75
    allowed = ["--resume", "auto", "--allow-change", "train.steps"]
    assert main([str(toy), "train.steps=14", "--stop-at-step", "3", *allowed]) == 75
    lower = ["optim.lr=1e-4", "train.steps=14", "--resume", "auto", "--allow-change", "optim.lr"]
    assert main([str(toy), *lower]) == 0
    path = checkpoint.resolve(toy.parent / "runs/toy", "latest")
    history = json.loads((path / "state.json").read_text())["history"]
    assert [(c["step"], c["key"], c["old"], c["new"]) for c in history] == [
        (2, "train.steps", "12", "14"),
        (3, "optim.lr", "0.003", "0.0001"),
    ]
    capsys.readouterr()
    assert checkpoint_main([str(toy.parent / "runs/toy")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\b2: train\.steps: 12 → 14\b", shown)
    assert re.search(r"\b3: optim\.lr: 0\.003 → 0\.0001\b", shown)


@pytest.mark.parametrize(
    ("deciding", "changed"),
    [
        (["eval.patience=50"], "eval.every_steps=2"),
        (["schedule.name=plateau"], "eval.batch_size=2"),
        (["eval.patience=50"], "eval.patience=51"),
    ],
)
def test_R24_evaluations_that_decide_may_not_change(
    toy: Path, deciding: list[str], changed: str, capsys: Capture
) -> None:
    command = [str(toy), "eval.every_steps=1", *deciding]
    assert main([*command, "run.name=a", "--stop-at-step", "1"]) == 75
    assert main([*command, "run.name=a", changed, "--resume", "auto"]) == 2
    assert changed.partition("=")[0] in capsys.readouterr().err
    plain = [str(toy), "eval.every_steps=1", "run.name=b"]
    assert main([*plain, "--stop-at-step", "1"]) == 75
    assert main([*plain, "eval.every_steps=2", "--stop-at-step", "2", "--resume", "auto"]) == 75


def test_R24_a_key_that_is_none_is_refused(stopped: Path, capsys: Capture) -> None:
    command = [str(stopped / "toy.toml"), "run.name=a", f"run.out_dir={stopped / 'runs'}"]
    assert main([*command, "--resume", "auto", "--allow-change", "optim.learning"]) == 2
    assert "--allow-change optim.learning" in capsys.readouterr().err


def test_R14_resuming_passes_over_damage_loudly_and_a_named_checkpoint_errors(
    toy: Path, capsys: Capture
) -> None:
    whole = [str(toy), "checkpoint.every_steps=2", "train.steps=8", "checkpoint.keep_last=4"]
    assert main([*whole, "run.name=whole"]) == 0
    assert main([*whole, "run.name=a", "--stop-at-step", "6"]) == 75
    checkpoints = toy.parent / "runs/a/checkpoints"
    flip_bit(checkpoints / "step-00000006/optimizer.safetensors", 9999)
    (checkpoints / "step-00000004/state.json").unlink()
    named = str(checkpoints / "step-00000006")
    capsys.readouterr()
    assert main([*whole, "run.name=a", "--resume", named]) == 2
    assert "optimizer.safetensors: damaged" in capsys.readouterr().err
    assert main([*whole, "run.name=a", "--resume", "auto"]) == 0
    shown = capsys.readouterr().out
    passed = re.findall(r"(?i)warning: .*?(step-\d+/[\w.]+)", shown)
    assert passed == ["step-00000006/optimizer.safetensors", "step-00000004/state.json"]
    assert re.search(r"step-00000002 .*\b2\b", shown)
    pair = (toy.parent / "runs" / name for name in ("whole", "a"))
    assert verify_resume.first_difference(*pair)[0] is None


def test_a_horizon_that_makes_the_learning_rate_jump_is_told(toy: Path, capsys: Capture) -> None:
    wsd = [str(toy), "schedule.name=wsd", "train.steps=6"]
    assert main(wsd) == 0
    capsys.readouterr()
    longer = [*wsd[:2], "train.steps=12", "--resume", "auto", "--allow-change", "train.steps"]
    assert main([*longer, "--stop-at-step", "7"]) == 75
    shown = capsys.readouterr().out
    jump = r"step 7\b.*\b{}\b.*\b0\b.*--decay-from CHECKPOINT\b.*schedule\.name=constant optim\.lr="
    assert re.search(jump.format(r"0\.003"), shown)
    assert rows(toy.parent / "runs/toy")[-1]["lr"] == 0.003
    muon = [*wsd, "run.name=muon", "optim.name=muon", "optim.lr=0.02"]
    assert main(muon) == 0
    capsys.readouterr()
    assert main([*muon, *longer[2:]]) == 0
    assert re.search(jump.format(r"0\.02"), capsys.readouterr().out)
    # There is no warning if nothing jumps, or if the rate itself was changed by name.
    small = ["train.steps=13", "--resume", "auto", "--allow-change", "train.steps"]
    assert main([*wsd[:2], *small, "--stop-at-step", "8"]) == 75
    constant = ["schedule.name=constant", "optim.lr=1e-4", "--allow-change", "schedule.name"]
    assert main([str(toy), *small, *constant, "--allow-change", "optim.lr"]) == 0
    assert "--decay-from" not in capsys.readouterr().out


# ---- --resume auto in a job script ---------------------------------------------------------------


def killed_before_its_first_checkpoint(run_dir: Path) -> None:
    """Leave what such a run leaves."""
    (run_dir / "checkpoints/.tmp-step-00000004-77").mkdir(parents=True)
    (run_dir / "config.toml").write_text("[train]\nsteps = 99\n")
    lines = '{"kind": "train", "step": 1, "loss": 9.0}\n{"kind": "train", "step": 2, "loss": 8.0}\n'
    (run_dir / "metrics.jsonl").write_text(lines)
    (run_dir / "train.csv").write_text("step,loss\n1,9.0\n2,8.0\n")


def test_resume_auto_starts_a_run_where_there_is_none_and_then_goes_on_with_it(
    toy: Path, capsys: Capture
) -> None:
    command = [str(toy), "run.name=a", "--resume", "auto"]
    assert main([*command, "data.path=nowhere"]) == 2
    assert not list((toy.parent / "runs").iterdir())  # a run that never began leaves nothing
    assert main([*command, "--stop-at-step", "4"]) == 75
    unsaved = r"resume\b.*runs/a .*checkpoint"
    assert re.search(rf"{unsaved}.*\bnew\b", capsys.readouterr().out)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert not re.search(unsaved, shown)
    assert re.search(r"step-00000004 .*\b4\b", shown)
    assert [row["step"] for row in rows(toy.parent / "runs/a")] == list(range(1, 13))


def test_a_run_killed_before_its_first_checkpoint_starts_over_in_its_folder(
    toy: Path, capsys: Capture
) -> None:
    run_dir = toy.parent / "runs/toy"
    killed_before_its_first_checkpoint(run_dir)
    before = sorted(run_dir.rglob("*"))
    assert main([str(toy), "--resume", "auto", "data.path=nowhere"]) == 2
    assert [p for p in sorted(run_dir.rglob("*")) if p.name not in (".lock", "train.log")] == before
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert main([str(toy), "log.csv=true", "train.steps=3", "--resume", "auto"]) == 0
    told = r"resume\b.*runs/toy .*checkpoint.*\bfolder\b"
    assert re.search(told, capsys.readouterr().out)
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3]
    table = (run_dir / "train.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in table] == ["step", "1", "2", "3"]
    assert "steps = 3" in (run_dir / "config.toml").read_text()
    assert [p.name for p in (toy.parent / "runs").iterdir()] == ["toy"]


@pytest.mark.parametrize("lost", ["manifests", "checkpoints", "folder"])
def test_R15_where_there_were_checkpoints_and_none_is_sound_it_refuses(
    toy: Path, capsys: Capture, lost: str
) -> None:
    assert main([str(toy), "--stop-at-step", "2"]) == 75
    checkpoints = toy.parent / "runs/toy/checkpoints"
    if lost == "manifests":
        (checkpoints / "step-00000002/manifest.json").write_text("")
    else:
        shutil.rmtree(checkpoints / "step-00000002" if lost == "checkpoints" else checkpoints)
    log = (toy.parent / "runs/toy/metrics.jsonl").read_text()
    capsys.readouterr()
    assert main([str(toy), "--resume", "auto"]) == 2
    told = r"manifest\.json" if lost == "manifests" else "no checkpoint"
    assert re.search(rf"runs/toy\S*: .*{told}", capsys.readouterr().err)
    assert (toy.parent / "runs/toy/metrics.jsonl").read_text() == log
    assert [p.name for p in (toy.parent / "runs").iterdir()] == ["toy"]


def test_of_several_folders_the_last_that_was_saved_is_meant(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = toy.parent / "runs"

    def meant(name: str | None = None) -> str:
        overrides = [] if name is None else [f"run.name={name}"]
        return newest_run_dir(load_config(toy, overrides), "toy").name

    assert (meant(), meant("b")) == ("toy", "b")
    for name in ("toy", "toy-2", "toy-3"):
        killed_before_its_first_checkpoint(runs / name)
    assert meant() == "toy-3"
    (runs / "toy/checkpoints/step-00000004").mkdir()
    assert meant() == "toy"
    (runs / "toy-2/checkpoints/latest").write_text("step-00000004")
    assert (meant(), meant("toy-3")) == ("toy-2", "toy-3")


def test_the_summary_of_a_resumed_run_counts_its_own_steps(toy: Path, capsys: Capture) -> None:
    assert main([str(toy), "--stop-at-step", "4"]) == 75
    shown = capsys.readouterr().out
    assert re.search(r"tokens/s .*\b4 steps\b", shown)
    in_all = r"  time .*\(.* steps\)"
    assert not re.search(in_all, shown)
    assert main([str(toy), "--resume", "auto"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"tokens/s .*\b8 steps\b", shown)
    assert re.search(in_all, shown)


# ---- --verify-resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [[], ["run.dtype=bf16", "model.residual_in_fp32=false"]])
def test_verify_resume_proves_it_and_leaves_nothing(
    toy: Path, capfd: Capture, changes: list[str]
) -> None:
    assert main([str(toy), "model.dropout=0.1", *changes, "--verify-resume", "5"]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"\bexact\b.*\b5 losses\b", shown)
    assert not (toy.parent / "runs").exists()


def test_verify_resume_tells_the_first_difference(
    toy: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, determinism: None
) -> None:
    def trained_here(arguments: list[str]) -> tuple[int, str]:
        assert "run.deterministic=true" in arguments  # without it, no GPU could pass
        if {"run.name=two", "--stop-at-step=4"} <= {*arguments}:
            arguments = [*arguments, "optim.lr=1e-4", "--allow-change", "optim.lr"]
        return main(arguments), ""

    monkeypatch.setattr(verify_resume, "_train", trained_here)
    short = [str(toy), "train.steps=none", "train.tokens=192", "--verify-resume", "8"]
    assert main(short) == 2
    assert re.search(r"--verify-resume 8: .*step-00000003\b", capfd.readouterr().err)
    assert not (toy.parent / "runs").exists()
    assert main([str(toy), "--verify-resume", "4"]) == 1
    shown = capfd.readouterr().out
    assert re.search(r"NOT EXACT\b.*\bloss\b.*\bstep 4: 0x1\.", shown)
    (kept,) = (toy.parent / "runs").iterdir()
    assert str(kept.relative_to(toy.parent)) in shown
    one, two = kept / "one", kept / "two"
    for run_dir in (one, two):
        log = (run_dir / "metrics.jsonl").read_text()
        (run_dir / "metrics.jsonl").write_text("".join(log.splitlines(keepends=True)[:3]))
    difference = verify_resume.first_difference(one, two)[0]
    assert difference is not None
    assert difference.startswith("model.")
    assert "SHA-256" in difference


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--verify-resume", "1"], r"--verify-resume 1: .*\b2 steps\b"),
        (["--verify-resume", "13"], r"--verify-resume 13: .*\b12 steps\b"),
        (["train.steps=none", "train.hours=1", "--verify-resume", "4"], r"train\.hours"),
    ],
)
def test_verify_resume_refuses_what_it_cannot_do(
    toy: Path, arguments: list[str], expected: str, capfd: Capture
) -> None:
    assert main([str(toy), *arguments]) == 2
    assert re.search(expected, capfd.readouterr().err)
    assert not (toy.parent / "runs").exists()


def test_a_deterministic_run_says_so_to_torch_before_cuda_starts(
    toy: Path, monkeypatch: pytest.MonkeyPatch, determinism: None
) -> None:
    seen = []

    def resolve_device(name: str) -> torch.device:
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        seen.append((torch.are_deterministic_algorithms_enabled(), workspace))
        raise UserError("no more of it")

    monkeypatch.setattr(session, "resolve_device", resolve_device)
    assert main([str(toy)]) == main([str(toy), "run.deterministic=true"]) == 2
    assert seen == [(False, None), (True, ":4096:8")]
    with pytest.raises(UserError, match=r"run\.deterministic.*run\.compile=auto"):
        load_config(toy, ["run.deterministic=true", "run.compile=max-autotune"])


def test_verify_resume_as_a_command_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fasttrain.verify_resume")
    usage = r"usage: python -m fasttrain\.train CONFIG --verify-resume N"
    with pytest.raises(SystemExit, match=usage):
        runpy.run_module("fasttrain.verify_resume", run_name="__main__")


def test_verify_resume_is_of_one_process(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(toy), "--verify-resume", "4"]) == 2
    assert re.search(r"--verify-resume .*\b2 processes\b.*torchrun", capfd.readouterr().err)
    assert not (toy.parent / "runs").exists()


def test_R1_what_changes_the_bits_of_a_run_is_told() -> None:
    now = {"torch": "2.13", "commit": "b" * 40, "uncommitted_changes": True, "command": "x"}
    now |= {"run.compile": "off", "threads": 1}
    state = {"torch": "2.13", "threads": 1}
    # Of a checkpoint from before the rest was noted.
    assert made_otherwise(state, now, exact=True) is None
    assert made_otherwise({**state, "provenance": 3}, now, exact=True) is None
    assert made_otherwise({**state, "provenance": {**now, "command": "y"}}, now, exact=True) is None
    assert made_otherwise({**state, "threads": None, "run.compile": "off"}, now, exact=True) is None
    told = made_otherwise({"torch": "2.0", "threads": 99, "run.compile": "c++"}, now, exact=False)
    assert told is not None
    assert "torch 2.0 → 2.13; run.compile c++ → off; threads 99 → 1" in told
    assert told.count("→") == 3
    told = made_otherwise(state, now, exact=False)  # as on a GPU
    assert told is not None
    assert "run.deterministic=true" in told
    before = {"provenance": {"commit": "a" * 40, "uncommitted_changes": False}}
    told = made_otherwise(before, now, exact=True)
    assert told is not None
    assert f"commit {'a' * 12}… → {'b' * 12}…; uncommitted_changes False → True" in told
    assert told.count("→") == 2


def test_R24_a_checkpoint_that_holds_no_run_is_named_as_such(tmp_path: Path) -> None:
    source = checkpoint.parse(save(tmp_path, 1))
    path = re.escape(str(source.path))
    with pytest.raises(UserError, match=rf"{path} .*model\.init_from={path}"):
        check_resumable(source, source.config, {}, (), 4)


def test_R24_a_batch_that_another_number_of_ranks_would_change_is_refused(stopped: Path) -> None:
    source = checkpoint.parse(checkpoint.resolve(stopped / "runs/a"))
    config, data = source.config, source.state["data"]
    assert check_resumable(source, config, data, (), 4) == []
    with pytest.raises(UserError, match=r"train\.tokens_per_step: .*\b4 samples\b.* 8\b"):
        check_resumable(source, config, data, (), 8)
    [change] = check_resumable(source, config, data, ("train.tokens_per_step",), 8)
    assert (change["key"], change["old"], change["new"]) == ("train.tokens_per_step", "4", "8")
