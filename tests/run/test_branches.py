"""Runs that branch off others (R35), and which run ``--resume auto`` means."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from fasttrain import checkpoint
from fasttrain.checkpoint.__main__ import main as checkpoint_main
from fasttrain.config import load_config
from fasttrain.run import run as train_run
from fasttrain.run.record import config_name, read_record
from fasttrain.train import main
from tests.support.faults import flip_bit
from tests.support.toy_trainer import rows

Capture = pytest.CaptureFixture[str]
KEYS = ["checkpoint.every_steps=4", "train.steps=8", "model.dropout=0.1"]
OLDER = "runs/parent/checkpoints/step-00000004"


def contents(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a run, by its path."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def names() -> list[str]:
    return sorted(path.name for path in Path("runs").iterdir())


@pytest.fixture
def parent(toy: Path) -> Path:
    """A run that has ended, with checkpoints of steps 4 and 8."""
    assert main([str(toy), *KEYS, "run.name=parent"]) == 0
    return Path("runs/parent")


@pytest.mark.parametrize(
    ("arguments", "branch"),
    [
        (["run.name=fork", "--resume", OLDER], "fork"),
        (["run.name=fork", "--resume", "runs/parent"], "fork"),
        (["run.name=parent", "--resume", OLDER], "parent-2"),
        (["--resume", OLDER], "toy"),
        (["run.name=fork", "--decay-from", OLDER, "schedule.name=wsd"], "fork"),
    ],
    ids=["older", "other name", "same name", "no name", "decay"],
)
def test_R35_a_branch_leaves_its_parent_as_it_is(
    arguments: list[str], branch: str, toy: Path, parent: Path
) -> None:
    before = contents(parent)
    changes = ["optim.lr=1e-3", "--allow-change", "optim.lr"]
    changes += ["train.steps=10", "--allow-change", "train.steps"]
    assert main([str(toy), *KEYS, *arguments, *changes]) == 0
    assert contents(parent) == before
    assert names() == sorted(["parent", branch])
    run_dir = Path("runs") / branch
    start = 8 if arguments[-1] == "runs/parent" else 4
    assert [row["step"] for row in rows(run_dir)] == list(range(start + 1, 11))
    record = read_record(run_dir)
    assert record is not None
    assert record["ended"]
    assert record["parent"] is not None
    assert record["parent"]["run"] == str(parent.resolve())
    assert record["parent"]["checkpoint"] == f"step-{start:08d}"
    assert record["parent"]["step"] == start
    state = json.loads((run_dir / "checkpoints/step-00000010/state.json").read_text())
    assert [p["run"] for p in state["lineage"]] == [str(parent.resolve())]
    assert load_config(run_dir / "config.toml").run.name in (None, branch)
    assert (run_dir / "tokenizer.json").is_file()


def test_R35_a_branch_without_a_change_has_the_bits_of_its_parent(
    toy: Path, parent: Path, capsys: Capture
) -> None:
    assert main([str(toy), *KEYS, "run.name=fork", "--resume", OLDER]) == 0
    assert re.search(rf"{OLDER} .*\b4\b", capsys.readouterr().out)
    ends = [
        checkpoint.load(run / "checkpoints/step-00000008") for run in (parent, Path("runs/fork"))
    ]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(ends[0].tensors[n].equal(t) for n, t in ends[1].tensors.items())
    assert [row["loss"] for row in rows(Path("runs/fork"))] == [
        row["loss"] for row in rows(parent) if row["step"] > 4
    ]
    # The lineage of a branch of the branch
    assert main(["--resume", "runs/fork", "run.name=second"]) == 0
    capsys.readouterr()
    assert checkpoint_main(["runs/second"]) == 0
    shown = capsys.readouterr().out
    for run, step in ((parent, 4), (Path("runs/fork"), 8)):
        assert re.search(rf"{re.escape(str(run.resolve()))} .*\b{step}\b", shown)


def test_R35_the_newest_checkpoint_of_a_run_goes_on_in_its_folder(toy: Path) -> None:
    command = [str(toy), *KEYS, "run.name=a"]
    assert main([*command, "--stop-at-step", "4"]) == 75
    newest = "runs/a/checkpoints/step-00000004"
    assert main([*command, "--resume", newest, "--stop-at-step", "5"]) == 75
    # Also where a newer one is damaged
    assert main([*command, "--resume", "auto", "--stop-at-step", "6"]) == 75
    flip_bit(Path("runs/a/checkpoints/step-00000006/model.safetensors"), 9999)
    newest = "runs/a/checkpoints/step-00000005"
    assert main([*command, "--resume", newest]) == 0
    assert names() == ["a"]
    assert [row["step"] for row in rows(Path("runs/a"))] == list(range(1, 9))


def test_R35_overwrite_alone_drops_what_is_newer(toy: Path, parent: Path, capsys: Capture) -> None:
    command = [str(toy), *KEYS, "--resume", OLDER, "--overwrite"]
    before = contents(parent)
    assert main([*command, "run.name=fork"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"--overwrite .*runs/parent\b.*run\.name = fork\b", error)
    with pytest.raises(SystemExit):
        main([str(toy), "--resume", "auto", "--overwrite"])
    assert main([*command, "optim.lr=1e-4"]) == 2  # refused before anything is dropped
    assert contents(parent) == before
    assert main([*command, "--stop-at-step", "5"]) == 75
    assert "--overwrite: runs/parent/checkpoints/step-00000008 " in capsys.readouterr().out
    assert names() == ["parent"]
    assert [row["step"] for row in rows(parent)] == [1, 2, 3, 4, 5]
    assert {p.name for p in (parent / "checkpoints").iterdir()} >= {"step-00000005"}
    assert not (parent / "checkpoints/step-00000008").exists()


def test_R35_a_branch_of_a_taken_name_is_refused(toy: Path, parent: Path, capsys: Capture) -> None:
    assert main([str(toy), *KEYS, "run.name=fork", "--stop-at-step", "2"]) == 75
    before = contents(Path("runs"))
    assert main([str(toy), *KEYS, "run.name=fork", "--resume", OLDER]) == 2
    assert re.search(r"runs/fork .*--resume auto\b.*run\.name", capsys.readouterr().err)
    assert contents(Path("runs")) == before


def test_R35_a_branch_that_was_cut_off_before_its_first_checkpoint_starts_from_its_parent(
    toy: Path, parent: Path, capsys: Capture
) -> None:
    command = [str(toy), *KEYS, "run.name=fork"]
    assert main([*command, "--resume", OLDER]) == 0
    shutil.rmtree("runs/fork/checkpoints")
    Path("runs/fork/metrics.jsonl").write_text("")
    assert main([*command, "--resume", "auto"]) == 0
    assert [row["step"] for row in rows(Path("runs/fork"))] == [5, 6, 7, 8]
    shutil.rmtree("runs/fork/checkpoints")
    Path("runs/fork/metrics.jsonl").write_text("")
    shutil.rmtree(parent)
    assert main([*command, "--resume", "auto"]) == 2
    assert re.search(rf"runs/fork .*/{OLDER}\b", capsys.readouterr().err)


def test_a_decaying_branch_needs_no_config(toy: Path) -> None:
    wsd = ["schedule.name=wsd", "run.name=base", *KEYS]
    assert main([str(toy), *wsd]) == 0
    before = contents(Path("runs/base"))
    source = "runs/base/checkpoints/step-00000004"
    assert main(["train.steps=6", "--decay-from", source]) == 0
    assert main(["train.steps=7", "run.name=longer", "--decay-from", source]) == 0
    assert names() == ["base", "base-2", "longer"]
    assert contents(Path("runs/base")) == before
    assert [row["step"] for row in rows(Path("runs/base-2"))] == [5, 6]
    assert rows(Path("runs/base-2"))[-1]["lr"] == 0
    config = load_config("runs/base-2/config.toml")
    assert (config.schedule.decay_start_step, config.run.name) == (4, "base-2")


def test_a_job_that_decays_goes_on_with_its_branch_and_not_with_the_parent(toy: Path) -> None:
    command = [str(toy), "schedule.name=wsd", *KEYS]
    assert main([*command, "--stop-at-step", "4"]) == 75
    job = [*command, "train.steps=6", "--decay-from", "runs/toy", "--resume", "auto"]
    assert main([*job, "--stop-at-step", "5"]) == 75
    assert names() == ["toy", "toy-2"]
    assert main(job) == 0
    assert [row["step"] for row in rows(Path("runs/toy-2"))] == [5, 6]
    # And the parent's own job with the parent.
    assert main([*command, "--resume", "auto"]) == 0
    assert [row["step"] for row in rows(Path("runs/toy"))] == list(range(1, 9))
    assert names() == ["toy", "toy-2"]


def test_resume_auto_takes_the_newest_unfinished_run_whatever_was_removed(
    toy: Path, capsys: Capture
) -> None:
    command = [str(toy), *KEYS]
    assert main([*command, "train.steps=3"]) == 0
    assert main([*command, "train.steps=3"]) == 0
    shutil.rmtree("runs/toy")
    # Numbers go on from the last one, also where an earlier one is free.
    assert main([*command, "--stop-at-step", "2"]) == 75
    assert names() == ["toy-2", "toy-3"]
    Path("runs/toy-3").rename("runs/toy")  # as earlier versions numbered it
    assert main([*command, "--resume", "auto", "--stop-at-step", "3"]) == 75
    assert rows(Path("runs/toy"))[-1]["step"] == 3
    capsys.readouterr()
    assert main([*command, "--resume", "auto"]) == 0
    ended = re.compile("^runs/toy .*config", re.MULTILINE)  # a note of its own
    assert not ended.search(capsys.readouterr().out)
    assert rows(Path("runs/toy"))[-1]["step"] == 8
    assert main([*command, "--resume", "auto"]) == 0
    assert ended.search(capsys.readouterr().out)
    assert names() == ["toy", "toy-2"]


def test_resume_auto_passes_over_a_gap_in_the_numbers(toy: Path) -> None:
    command = [str(toy), *KEYS]
    for _ in range(2):
        assert main([*command, "--stop-at-step", "2"]) == 75
    shutil.rmtree("runs/toy")
    assert main([*command, "--resume", "auto"]) == 0
    assert names() == ["toy-2"]
    assert rows(Path("runs/toy-2"))[-1]["step"] == 8


def test_resume_auto_never_takes_another_configs_run(toy: Path) -> None:
    other = toy.with_name("toy-2.toml")
    other.write_text(toy.read_text().replace("dim = 32", "dim = 64"))
    elsewhere = toy.parent / "other/toy.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(other.read_text())
    assert main([str(toy), *KEYS, "--stop-at-step", "2"]) == 75
    assert main([str(other), *KEYS, "--stop-at-step", "2"]) == 75
    assert names() == ["toy", "toy-2"]
    assert main([str(toy), *KEYS, "--resume", "auto", "--stop-at-step", "3"]) == 75
    assert main([str(other), *KEYS, "--resume", "auto", "--stop-at-step", "4"]) == 75
    assert main([str(elsewhere), *KEYS, "--resume", "auto", "--stop-at-step", "1"]) == 75
    assert {name: rows(Path("runs") / name)[-1]["step"] for name in names()} == {
        "toy": 3,
        "toy-2": 4,
        "toy-3": 1,
    }
    # The second run of the first config passes over the folders of the others.
    assert main([str(toy), *KEYS, "--stop-at-step", "1"]) == 75
    assert names() == ["toy", "toy-2", "toy-3", "toy-4"]
    # A config that was moved is the same.
    moved = toy.parent / "moved/toy.toml"
    moved.parent.mkdir()
    toy.rename(moved)
    assert main([str(moved), *KEYS, "--resume", "auto", "--stop-at-step", "2"]) == 75
    assert rows(Path("runs/toy-4"))[-1]["step"] == 2


def test_a_learning_rate_that_was_changed_undoes_a_decay_with_a_warning(
    toy: Path, capsys: Capture
) -> None:
    assert main([str(toy), "train.steps=6"]) == 0
    capsys.readouterr()
    longer = ["train.steps=12", "optim.lr=2e-3", "--resume", "auto"]
    allowed = ["--allow-change", "train.steps", "--allow-change", "optim.lr"]
    assert main([str(toy), *longer, *allowed, "--stop-at-step", "7"]) == 75
    assert re.search(r"step 7\b.* 0\.00\d+\b.* 0\b.*--decay-from", capsys.readouterr().out)
    # A rate that is doubled by name, and has not decayed, is meant.
    constant = [str(toy), "run.name=b", "schedule.name=constant"]
    assert main([*constant, "--stop-at-step", "4"]) == 75
    capsys.readouterr()
    assert main([*constant, "optim.lr=6e-3", "--resume", "auto", "--allow-change", "optim.lr"]) == 0
    assert "--decay-from" not in capsys.readouterr().out


def test_a_run_in_a_mirror_is_known_by_its_record(toy: Path) -> None:
    command = [str(toy), *KEYS, f"checkpoint.mirror={toy.parent / 'm'}"]
    assert main([*command, "--stop-at-step", "2"]) == 75
    assert main([*command, "train.steps=3"]) == 0
    shutil.rmtree("runs")
    assert main([*command, "--resume", "auto"]) == 0
    assert names() == ["toy"]
    record = read_record(Path("runs/toy"))
    assert record is not None
    assert (record["config"], record["ended"]) == (str(toy), True)


def test_R35_a_checkpoint_that_the_mirror_is_ahead_of_is_not_continued(
    toy: Path, capsys: Capture
) -> None:
    command = [str(toy), *KEYS, "run.name=a", f"checkpoint.mirror={toy.parent / 'm'}"]
    assert main([*command, "--stop-at-step", "2"]) == 75
    shutil.copytree("runs", "old")
    assert main([*command, "--resume", "auto", "--stop-at-step", "5"]) == 75
    shutil.rmtree("runs")
    shutil.copytree("old", "runs")
    assert main([*command, "--resume", "runs/a/checkpoints/step-00000002"]) == 2
    assert re.search(r"--resume runs/a/\S+-00000002: .*-00000005\b", capsys.readouterr().err)
    shutil.rmtree("runs")
    shutil.move("old", "runs")
    assert main([*command, "--resume", "runs/a"]) == 0  # from the newest
    assert [row["step"] for row in rows(Path("runs/a"))] == list(range(1, 9))


def test_R35_a_run_in_a_mirror_is_not_renamed_by_its_address(toy: Path, capsys: Capture) -> None:
    mirror = f"file://{toy.parent}/m"
    command = [str(toy), *KEYS, "run.name=a", f"checkpoint.mirror={mirror}"]
    assert main([*command, "--stop-at-step", "2"]) == 75
    assert main(["--resume", f"{mirror}/a", "run.name=fork"]) == 2
    assert re.search(r"--resume file:\S+/m/a: .*run\.name = fork\b", capsys.readouterr().err)


def test_a_mirror_brings_no_checkpoint_of_another_run_of_that_name(
    toy: Path, capsys: Capture
) -> None:
    mirror = f"checkpoint.mirror={toy.parent / 'm'}"
    for name, steps in (("one", "4"), ("two", "2")):
        assert main([str(toy), *KEYS, mirror, f"run.name={name}", "--stop-at-step", steps]) == 75
    Path("runs/one").rename("runs/old")
    Path("runs/two").rename("runs/one")
    before = contents(Path("m"))
    assert main([str(toy), *KEYS, mirror, "run.name=one", "--resume", "auto"]) == 2
    assert re.search(r"/m/one .*runs/one\b.*checkpoint\.mirror", capsys.readouterr().err)
    assert contents(Path("m")) == before
    # A run by the name of a link is the run that it leads to.
    Path("runs/one").rename("runs/two")
    Path("runs/one").symlink_to("two")
    command = [str(toy), *KEYS, mirror, "run.name=one", "--resume", "auto"]
    assert main([*command, "--stop-at-step", "3"]) == 75
    assert [row["step"] for row in rows(Path("runs/two"))] == [1, 2, 3]
    assert len([*Path("m/one/checkpoints").iterdir()]) == 1


def test_a_branch_starts_again_from_the_parent_that_it_recorded_and_no_namesake(
    toy: Path, parent: Path
) -> None:
    branch = [str(toy), *KEYS, "run.out_dir=elsewhere", "run.name=fork"]
    assert main([*branch, "--resume", OLDER]) == 0
    shutil.rmtree("elsewhere/fork/checkpoints")
    Path("elsewhere/fork/metrics.jsonl").write_text("")
    other = [str(toy), *KEYS, "run.out_dir=elsewhere", "run.name=parent", "run.seed=5"]
    assert main([*other, "--stop-at-step", "4"]) == 75
    assert main([*branch, "--resume", "auto"]) == 0
    assert [row["loss"] for row in rows(Path("elsewhere/fork"))] == [
        row["loss"] for row in rows(parent) if row["step"] > 4
    ]


def test_a_branch_that_is_named_is_not_that_of_another_checkpoint(
    toy: Path, capsys: Capture
) -> None:
    command = [str(toy), "schedule.name=wsd", *KEYS]
    assert main([*command, "checkpoint.every_steps=2", "--stop-at-step", "4"]) == 75
    source = "runs/toy/checkpoints/step-{:08d}"
    job = [*command, "train.steps=6", "run.name=fork", "--resume", "auto", "--decay-from"]
    assert main([*job, source.format(2), "--stop-at-step", "5"]) == 75
    before = contents(Path("runs/fork"))
    assert main([*job, source.format(4)]) == 2
    assert re.search(r"runs/fork .*step-00000004\b.*run\.name", capsys.readouterr().err)
    assert contents(Path("runs/fork")) == before
    assert main([*job, source.format(2)]) == 0
    assert rows(Path("runs/fork"))[-1]["step"] == 6


def test_a_job_that_decays_from_another_checkpoint_starts_another_branch(toy: Path) -> None:
    command = [str(toy), "schedule.name=wsd", *KEYS]
    assert main([*command, "checkpoint.every_steps=2", "--stop-at-step", "4"]) == 75

    def decay(step: int, *more: str) -> int:
        source = f"runs/toy/checkpoints/step-{step:08d}"
        return main([*command, "train.steps=6", "--decay-from", source, "--resume", "auto", *more])

    assert decay(2, "--stop-at-step", "5") == 75
    assert decay(4, "--stop-at-step", "5") == 75
    assert names() == ["toy", "toy-2", "toy-3"]
    Path("runs/toy").rename("moved")
    assert decay(2) == 0
    assert names() == ["toy-2", "toy-3"]
    assert [rows(Path("runs") / name)[-1]["step"] for name in names()] == [6, 5]


def test_what_overwrite_dropped_does_not_come_back_from_the_mirror(toy: Path) -> None:
    command = [str(toy), *KEYS, "run.name=a", f"checkpoint.mirror={toy.parent / 'm'}"]
    assert main([*command, "checkpoint.every_steps=2", "--stop-at-step", "4"]) == 75
    older = "runs/a/checkpoints/step-00000002"
    with pytest.MonkeyPatch.context() as patched:  # it is killed before its first save
        patched.setattr(train_run, "train_to_end", lambda *_: 75)
        assert main([*command, "--resume", older, "--overwrite"]) == 75
    assert main([*command, "--resume", "auto", "--stop-at-step", "3"]) == 75
    assert [row["step"] for row in rows(Path("runs/a"))] == [1, 2, 3]


def test_a_run_of_a_config_that_is_gone_is_not_taken_before_one_of_this_config(toy: Path) -> None:
    gone = toy.parent / "gone/toy.toml"
    gone.parent.mkdir()
    gone.write_text(toy.read_text())
    assert main([str(toy), *KEYS, "--stop-at-step", "2"]) == 75
    assert main([str(gone), *KEYS, "--stop-at-step", "2"]) == 75
    gone.unlink()
    assert main([str(toy), *KEYS, "--resume", "auto", "--stop-at-step", "3"]) == 75
    assert [rows(Path("runs") / name)[-1]["step"] for name in names()] == [3, 2]


def test_a_copy_of_a_run_is_not_newer(toy: Path) -> None:
    assert main([str(toy), *KEYS, "--stop-at-step", "2"]) == 75
    shutil.copytree("runs/toy", "runs/toy-2")
    assert main([str(toy), *KEYS, "--resume", "auto", "--stop-at-step", "3"]) == 75
    assert [rows(Path("runs") / name)[-1]["step"] for name in names()] == [3, 2]


def test_names_with_a_dot_are_kept_whole(toy: Path) -> None:
    toy = toy.rename(toy.with_name("m-1.5.toml"))
    assert main([str(toy), *KEYS]) == 0
    older = "runs/m-1.5/checkpoints/step-00000004"
    assert main(["--resume", older, "--stop-at-step", "5"]) == 75
    assert names() == ["m-1.5", "m-1.5-2"]
    record = read_record(Path("runs/m-1.5-2"))
    assert record is not None
    assert record["config"] == str(toy)
    assert config_name(record | {"config": "m-1.5"}) == "m-1.5"
    assert main(["--resume", "runs/m-1.5-2/checkpoints/step-00000005", "--stop-at-step", "6"]) == 75
    assert main([str(toy), *KEYS, "--resume", "auto"]) == 0
    assert rows(Path("runs/m-1.5-2"))[-1]["step"] == 8


def test_a_run_is_named_from_within_its_folder(
    toy: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parent)
    assert main(["--resume", "checkpoints/step-00000004", "--stop-at-step", "5"]) == 75
    assert not (parent / "parent-2").exists()
    monkeypatch.chdir("../parent-2")
    assert main(["--resume", ".", "--stop-at-step", "6"]) == 75
    monkeypatch.chdir("checkpoints")
    assert main(["--resume", "..", "--stop-at-step", "7"]) == 75
    monkeypatch.chdir(toy.parent)
    assert names() == ["parent", "parent-2"]
    assert [row["step"] for row in rows(Path("runs/parent-2"))] == [5, 6, 7]


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint", "../../elsewhere"), ("run", "a\0b"), ("run", "\ud800"), ("config", "a\0b")],
)
def test_a_record_that_names_no_checkpoint_or_path_is_none(
    key: str, value: str, tmp_path: Path
) -> None:
    parent = {"run": "/a", "checkpoint": "step-00000004", "step": 4, "decays": False}
    record = {"config": "/a.toml", "began": "2026-01-01", "parent": parent, "ended": False}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert read_record(tmp_path) == record
    (record if key == "config" else parent)[key] = value
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert read_record(tmp_path) is None
