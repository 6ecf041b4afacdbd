"""Runs with ``checkpoint.mirror``: resumed where their folder is gone, whatever the bucket does."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from fasttrain import storage as files
from fasttrain import verify_resume
from fasttrain.mirror import Mirror
from fasttrain.train import main
from tests.support import ranks
from tests.support.faults import flip_bit
from tests.support.faulty_server import FaultyServer, proxy_upstream, serving
from tests.support.toy import write_config
from tests.support.toy_mirror import Faulty
from tests.support.toy_trainer import rows

Capture = pytest.CaptureFixture[str]
KEYS = ["checkpoint.every_steps=2", "train.steps=8", "model.dropout=0.1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    monkeypatch.setattr(Faulty, "happens", Faulty.happens)
    Faulty.log.clear()


def equal(a: str, b: str) -> None:
    """Assert that two runs have the same losses and end at the same bits."""
    assert verify_resume.first_difference(Path(a), Path(b))[0] is None


def test_a_run_whose_folder_is_gone_goes_on_from_its_mirror(toy: Path, capsys: Capture) -> None:
    assert main([str(toy), *KEYS, "run.out_dir=whole"]) == 0
    command = [str(toy), *KEYS, f"checkpoint.mirror={toy.parent / 'm'}"]
    assert main([*command, "--resume", "auto"]) == 0  # there is nothing yet
    assert re.search(r"resume\b.*runs/toy .*checkpoint", capsys.readouterr().out)
    equal("whole/toy", "runs/toy")
    shutil.rmtree("runs")
    # A new run does not write over it, not even where nothing of it is left
    assert main([*command, "--stop-at-step", "4"]) == 75
    assert [path.name for path in Path("runs").iterdir()] == ["toy-2"]
    capsys.readouterr()
    assert main([*command, "run.name=toy"]) == 2
    assert re.search(r"runs/toy .*checkpoint\.mirror.*--resume auto", capsys.readouterr().err)
    # The newest run of the config
    shutil.rmtree("runs")
    assert main([*command, "--resume", "auto"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"{re.escape(str(toy.parent))}/m/toy-2 .*\b2\b.*checkpoints", shown)
    assert re.search(r"runs/toy-2/checkpoints/step-00000004-c2 .*\b4\b", shown)
    equal("whole/toy", "runs/toy-2")
    assert [path.name for path in Path("runs").iterdir()] == ["toy-2"]


def test_a_run_is_named_by_its_address_without_a_config(
    toy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary := toy.parent / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert main([str(toy), *KEYS, "run.out_dir=whole"]) == 0
    mirror = f"file://{toy.parent}/m"
    keys = [*KEYS, f"checkpoint.mirror={mirror}", "run.name=a"]
    assert main([str(toy), *keys, "--stop-at-step", "5"]) == 75
    shutil.rmtree("runs")
    assert main(["--resume", f"{mirror}/none"]) == 2
    assert f"{mirror}/none/config.toml: get_file " in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main(["--resume", f"{mirror}/a/"]) == 0
    equal("whole/toy", "runs/a")
    assert Path("m/a/checkpoints/step-00000008-c5").is_dir()  # it is copied there again
    assert not [*temporary.rglob("config.toml")]


def test_R14_the_newest_of_both_sides_that_is_sound_is_taken(toy: Path, capsys: Capture) -> None:
    command = [str(toy), *KEYS, f"checkpoint.mirror={toy.parent / 'm'}"]
    assert main([*command, "--stop-at-step", "4"]) == 75
    shutil.copytree("runs", "old")  # what another machine has, which lags behind
    assert main([*command, "--stop-at-step", "6", "--resume", "auto"]) == 75
    shutil.rmtree("runs")
    shutil.copytree("old", "runs")
    flip_bit(Path("m/toy/checkpoints/step-00000006-c3/model.safetensors"), 9999)
    capsys.readouterr()
    again = [*command, "--resume", "auto", "--stop-at-step"]
    assert main([*again, "5"]) == 75
    shown = capsys.readouterr().out
    (passed,) = re.findall("warning: .*/checkpoints/step-.*", shown)
    assert re.search(r"step-00000006-c3/model\.safetensors: .*damaged", passed)
    assert re.search(r"runs/toy/checkpoints/step-00000004 .*\b4\b", shown)
    # What was saved after it is newer than what was damaged
    shutil.rmtree("runs")
    shutil.copytree("old", "runs")
    assert main([*again, "6"]) == 75
    assert re.search(r"runs/toy/\S+/step-00000005-c4 .*\b5\b", capsys.readouterr().out)


def test_a_machine_that_lags_behind_gets_the_log_too(toy: Path, capsys: Capture) -> None:
    command = [str(toy), *KEYS, f"checkpoint.mirror={toy.parent / 'm'}", "--resume", "auto"]
    assert main([*command, "--stop-at-step", "2"]) == 75
    shutil.copytree("runs", "old")
    assert main([*command, "--stop-at-step", "4"]) == 75
    shutil.rmtree("runs")
    assert main([*command[:-1], "runs/toy"]) == 2  # by its folder, which is gone
    assert re.search(r"--resume runs/toy: .*checkpoint\.mirror", capsys.readouterr().err)
    shutil.move("old", "runs")
    assert main([*command, "--stop-at-step", "5"]) == 75
    assert [row["step"] for row in rows(Path("runs/toy"))] == [1, 2, 3, 4, 5]


def test_an_address_whose_password_was_not_saved_is_refused(toy: Path, capsys: Capture) -> None:
    mirror = f"checkpoint.mirror=faulty://me:hunter22@{toy.parent}/m"
    assert main([str(toy), *KEYS, mirror, "--stop-at-step", "2"]) == 75
    folders = sorted(toy.parent.iterdir())
    for command in (["--resume", "runs/toy"], ["runs/toy/config.toml", "--resume", "auto"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        address = re.escape(f"faulty://***@{toy.parent}/m")
        assert re.search(rf"checkpoint\.mirror = {address}: .*checkpoint\.mirror=", said)
    assert main(["--resume", "runs/toy", mirror, "--stop-at-step", "4"]) == 75
    assert sorted(toy.parent.iterdir()) == folders  # nothing was copied elsewhere


def test_a_bucket_that_fails_does_not_end_the_run(toy: Path, capsys: Capture) -> None:
    def fail(what: str, half: object) -> None:
        if "checkpoints/step-" in what:
            raise OSError(5, "the bucket is on fire")

    Faulty.happens = fail
    command = [str(toy), *KEYS, f"checkpoint.mirror=faulty://{toy.parent}/m"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search("warning: .*checkpoint.*the bucket is on fire", shown)
    assert re.search(r"^(?!warning).*checkpoint\b.* faulty:///.*\d s$", shown, re.MULTILINE)
    # What is missing there is copied when the run is resumed, though it has come to its end
    Faulty.happens = lambda what, half: None
    assert main([*command, "--resume", "auto"]) == 0
    assert "step-00000008-c4" in "".join(p.name for p in Path("m/toy/checkpoints").iterdir())


def test_failures_are_counted_in_the_log(
    toy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_at_once(mirror: Any) -> None:
        mirror._due = True
        mirror._work()

    def fail(what: str, half: object) -> None:
        if "step-00000004" in what:
            raise PermissionError(13, "not yours")

    monkeypatch.setattr(Mirror, "wake", copy_at_once)
    Faulty.happens = fail
    keys = [*KEYS, "checkpoint.asynchronous=false"]
    assert main([str(toy), *keys, f"checkpoint.mirror=faulty://{toy.parent}/m"]) == 0
    assert [row["failed_copies"] for row in rows(Path("runs/toy"))] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert "  failed_copies 1" in capsys.readouterr().out
    assert main([str(toy), *keys, "run.name=b"]) == 0  # without a mirror there is no such column
    assert "failed_copies" not in rows(Path("runs/b"))[0]


@pytest.mark.parametrize("fails", ["write", "ls"])
def test_R13_a_bucket_that_fails_from_the_start_is_refused(
    fails: str, toy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **options: object) -> None:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(Faulty, "_write" if fails == "write" else "ls", fail)
    command = [str(toy), *KEYS, f"checkpoint.mirror=faulty://{toy.parent}/m", "--resume", "auto"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "faulty:///" in error
    assert "not yours" in error
    assert "credentials" in error
    assert not Path("runs/toy").exists()


def test_verify_resume_copies_nothing(toy: Path) -> None:
    command = [str(toy), *KEYS, f"checkpoint.mirror={toy.parent / 'm'}"]
    assert main([*command, "--verify-resume", "2"]) == 0
    assert not Path("m").exists()


def test_several_ranks_go_on_from_a_mirror(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    keys = [*KEYS, "distributed.mode=fsdp", "distributed.init_timeout_s=300"]
    keys += ["train.tokens_per_step=128", "train.micro_batch=2"]
    mirror = f"checkpoint.mirror={tmp_path / 'm'}"
    argv = {
        "whole": [*keys, "run.out_dir=whole"],
        "cut": [*keys, "run.out_dir=first", mirror, "--stop-at-step", "5"],
        "resumed": [*keys, "run.out_dir=second", mirror, "--resume", "auto"],
    }
    runs = {name: {"size": 2, "argv": [str(config), *more]} for name, more in argv.items()}
    ranks.run_all(tmp_path, runs)
    statuses = {name: [ranks.result(tmp_path, name, r)["status"] for r in (0, 1)] for name in runs}
    assert statuses == {"whole": [0, 0], "cut": [75, 75], "resumed": [0, 0]}
    shown = (tmp_path / "output-0.txt").read_text()
    assert re.search(r"step-00000005-c3 .*\b5\b", shown)
    equal(f"{tmp_path}/whole/toy", f"{tmp_path}/second/toy")


# ---- a server of S3 ------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """An S3 server with a bucket of that name, behind one that can fail."""
    s3fs = pytest.importorskip("s3fs", reason="needs the extra remote")
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing-only")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore, beside s3fs's and ours
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    with serving(proxy_upstream(server.get_host_and_port()[1])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        urlopen(f"{proxy.url}/moto-api/reset", data=b"").close()  # it outlives its servers
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_bucket_of_S3(toy: Path, bucket: FaultyServer, capsys: Capture) -> None:
    assert main([str(toy), *KEYS, "run.out_dir=whole"]) == 0
    command = [str(toy), *KEYS, "checkpoint.mirror=s3://bucket/runs"]
    assert main([*command, "--stop-at-step", "5"]) == 75
    shutil.rmtree("runs")
    capsys.readouterr()
    assert main([*command, "--resume", "auto"]) == 0
    assert re.search(r"runs/toy/\S+/step-00000005-c3 .*\b5\b", capsys.readouterr().out)
    equal("whole/toy", "runs/toy")
    puts = [path.partition("?")[0] for method, path in bucket.requests if method == "PUT"]
    for name in {path.split("/")[5] for path in puts if "/step-" in path}:
        of_copy = [path for path in puts if f"/{name}/" in path]
        assert of_copy[-1].endswith("/manifest.json")
    shutil.rmtree("runs")
    assert main(["--resume", "s3://bucket/runs/toy"]) == 0
    assert re.search(r"step-00000008-c\d+ .*\b8\b.*train", capsys.readouterr().out)
    equal("whole/toy", "runs/toy")


def test_a_bucket_of_S3_that_fails(toy: Path, bucket: FaultyServer, capsys: Capture) -> None:
    command = [str(toy), *KEYS, "checkpoint.mirror=s3://bucket/runs"]
    bucket.fails_always = "optimizer.safetensors"
    assert main([*command, "--stop-at-step", "3"]) == 75
    assert re.search("warning: .*checkpoint.*s3://bucket/runs/toy", capsys.readouterr().out)
    bucket.fails_always = ""
    assert main([*command, "--resume", "auto", "--stop-at-step", "4"]) == 75
    shutil.rmtree("runs")
    assert main([*command, "--resume", "auto", "--stop-at-step", "5"]) == 75
    assert "runs/toy/checkpoints/step-00000004-c" in capsys.readouterr().out


def test_a_bucket_of_S3_that_is_none(toy: Path, bucket: FaultyServer, capsys: Capture) -> None:
    assert main([str(toy), *KEYS, "checkpoint.mirror=s3://buckle/runs"]) == 2
    assert "s3://buckle/runs/toy/config.toml: pipe_file " in capsys.readouterr().err
    assert not Path("runs/toy").exists()
