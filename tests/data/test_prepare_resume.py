"""Preparation that is killed and started again ends with the very same bytes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttrain.data.tokenizer import char_tokenizer
from fasttrain.prepare import build, main, prepare
from fasttrain.prepare.writer import Partial
from fasttrain.storage import DataError
from tests.support.toy import alive, wait_until

# Every operation that changes the disk is a point to be killed at. Processes are forked from one
# that has imported everything, so that each attempt takes some milliseconds.
KILL_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from fasttrain import prepare as command
from fasttrain.prepare import build

build.BATCH_CHARS, build.CHECKPOINT_S = 2500, 0.0
folder = Path(sys.argv[1])
inputs = [str(path) for path in sorted((folder / "in").iterdir())]

def attempt(out, kill_at=None, resume=True):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    done = 0
    def counting(real):
        def call(*args, **kwargs):
            nonlocal done
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return real(*args, **kwargs)
        return call
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    for name in ("fsync", "replace", "rename", "unlink", "truncate", "mkdir", "rmdir"):
        setattr(os, name, counting(getattr(os, name)))
    status = 1
    try:
        command.prepare(out, inputs, tokenizer="bpe:300", shard_tokens=2000, resume=resume,
                        note=lambda line: None)
        status = 0
    finally:
        os._exit(status)

def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}

assert attempt(folder / "whole", resume=False) == 0
whole = content(folder / "whole")
kill_at = 0
while True:
    out = folder / f"out-{kill_at}"
    if attempt(out, kill_at) == 0:
        break
    if kill_at % 4 == 0:
        attempt(out, kill_at // 2)
    assert attempt(out) == 0, kill_at
    assert content(out) == whole, kill_at
    assert not (folder / f".{out.name}.partial").exists()
    kill_at += 1
print(kill_at, len(whole))
"""


def write_inputs(folder: Path, texts: int = 20) -> list[str]:
    (folder / "in").mkdir()
    lines = [
        json.dumps({"text": f"document {n}: " + "words and numbers 12 " * (n % 7 + 1)}) + "\n"
        for n in range(texts)
    ]
    (folder / "in/a.txt").write_text("one text of many lines\n" * 200)
    (folder / "in/b.jsonl").write_text("".join(lines))
    return [str(path) for path in sorted((folder / "in").iterdir())]


def test_killed_at_every_operation_and_resumed_the_output_is_the_same(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path)],
        capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAYON_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    points, files = map(int, result.stdout.split())
    assert points > 30
    assert files >= 6


WITH_WORKERS = """
import os, signal, sys
from fasttrain import prepare as command
from fasttrain.prepare import build
from fasttrain.prepare.writer import Partial
build.BATCH_CHARS, build.CHECKPOINT_S, build.WORKER_BYTES = 20_000, 0.0, 1
if "STOPS" in os.environ:  # behind its first checkpoint
    save = Partial.save
    def saved(self, **state):
        save(self, **state)
        if "batches" in state:
            os.kill(os.getpid(), signal.SIGSTOP)
    Partial.save = saved
sys.exit(command.main(sys.argv[1:]))
"""


def test_workers_change_nothing_and_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("".join(f"line {n} of a text\n" for n in range(60_000)))
    source = str(tmp_path / "in.txt")

    def command(out: str, workers: int, *more: str, **variables: str) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / out), "--input", source, "--tokenizer", "bpe:300", *more]
        return subprocess.Popen(
            [sys.executable, "-c", WITH_WORKERS, *arguments, "--workers", str(workers)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        )  # fmt: skip

    killed = command("two", 2, STOPS="1")
    _, status = os.waitpid(killed.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    assert '"batches"' in (tmp_path / ".two.partial/progress.json").read_text()
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    assert len(children) >= 2
    second = command("two", 1, "--resume")
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 2
    assert re.search(r"/two: .*\bprocess\b", said)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    resumed = command("two", 2, "--resume")
    said, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert re.search(r"^(Continu|Resum)ing .*\.partial", said, re.MULTILINE)
    assert f"data.path={tmp_path / 'two'}" in said
    wait_until(lambda: not any(alive(int(child)) for child in children))
    whole = command("one", 1)
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[Path, list[str]]:
    """A folder whose preparation ended after its first checkpoint."""
    inputs = write_inputs(tmp_path)
    save = Partial.save

    def stop(self: Partial, **state: object) -> None:
        save(self, **state)
        if "batches" in state:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build, "BATCH_CHARS", 1500)
        patched.setattr(build, "CHECKPOINT_S", 0.0)
        patched.setattr(Partial, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", inputs, tokenizer="bytes", note=print)
    assert (tmp_path / ".out.partial/progress.json").exists()
    return tmp_path / "out", inputs


def test_what_was_asked_for_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, inputs = interrupted(tmp_path, monkeypatch)
    for changed, match in (
        ({"tokenizer": "chars"}, "tokenizer = 'bytes'.*'chars'"),
        ({"val_fraction": 0.1}, r"val_fraction = 'auto'.*\b0\.1"),
        ({"shard_tokens": 5}, r"shard_tokens = .*\b5\b"),
    ):
        arguments = {"tokenizer": "bytes", "resume": True, **changed}
        with pytest.raises(DataError, match=f"--resume: .*{match}"):
            prepare(out, inputs, **arguments)  # type: ignore[arg-type]
    os.utime(inputs[0], (1, 1))
    with pytest.raises(DataError, match=r"--resume: .*file \S*a\.txt = \["):
        prepare(out, inputs, tokenizer="bytes", resume=True)
    progress = tmp_path / ".out.partial/progress.json"
    progress.write_text("{")
    with pytest.raises(DataError, match=r"progress\.json: .*\bJSON\b"):
        prepare(out, inputs, tokenizer="bytes", resume=True)
    assert progress.exists()


def test_a_shard_that_is_cut_short_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, inputs = interrupted(tmp_path, monkeypatch)
    (shard,) = (tmp_path / ".out.partial/dataset").glob("train_*.bin")
    os.truncate(shard, 1100)
    monkeypatch.setattr(build, "BATCH_CHARS", 1500)
    with pytest.raises(DataError, match=rf"{re.escape(shard.name)}: .*--resume"):
        prepare(out, inputs, tokenizer="bytes", resume=True, note=print)


def test_without_resume_it_starts_anew_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, inputs = interrupted(tmp_path, monkeypatch)
    notes: list[str] = []
    prepare(out, inputs, tokenizer="chars", note=notes.append)
    assert any(re.search(r"\.out\.partial.*--resume", line) for line in notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_resume_of_nothing_starts_and_of_what_is_complete_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write_inputs(tmp_path)
    out = tmp_path / "out"
    command = [str(out), "--tokenizer", "bytes", "--resume", "--input", *inputs]
    assert main(command) == 0
    assert re.search(r"\bresume\b.*\.out\.partial", capsys.readouterr().out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(command) == 0
    assert re.search(rf"{re.escape(str(out))}\b.*\bcomplete\b", capsys.readouterr().out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*command, "--val-fraction", "0.3"]) == 2
    assert re.search(r"val_fraction = 'auto'.*\b0\.3\b", capsys.readouterr().err)
    with pytest.raises(DataError, match=r"/in: .*\bexists\b.*\bempty\b"):
        prepare(tmp_path / "in", inputs)
    with pytest.raises(DataError, match=r"--workers .*\b1\b.*\b0\b"):
        prepare(tmp_path / "x", inputs, workers=0)


def test_a_finished_dataset_is_complete_only_for_the_files_it_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "in.txt", tmp_path / "out"
    more, vocabulary = tmp_path / "in2.txt", tmp_path / "t.json"
    text.write_text("alpha beta gamma\n" * 200)
    vocabulary.write_text(char_tokenizer("abcdeghlmopt \n").to_str())
    command = [str(out), "--resume", "--tokenizer", str(vocabulary), "--input", f"{tmp_path}/in*"]

    def refused(reason: str, *, after: Callable[[], object]) -> None:
        after()
        assert main(command) == 2
        said = capsys.readouterr().err
        named = re.escape(f"error: {out}: ")
        assert re.match(rf"{named}.*\bexists\b.*\bdataset\b.*{reason}", said), said

    assert main(command) == main(command) == 0
    before = text.stat()
    refused(re.escape(f"file {text} = ["),
            after=lambda: text.write_text("omega beta gamma\n" * 200))  # fmt: skip
    text.write_text("alpha beta gamma\n" * 200)
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(rf"file {re.escape(str(more))} = '.*\[",
            after=lambda: more.write_text("more"))  # fmt: skip
    more.unlink()
    assert main(command) == 0
    refused("tokenizer.* SHA-256 = ",
            after=lambda: vocabulary.write_text(char_tokenizer("abc").to_str()))  # fmt: skip
    record = out / "prepared.json"
    deep = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    for content, reason in (('{"source": 1}', "files"), (deep, "JSON")):
        record.write_text(content)
        assert main(command) == 2
        named = re.escape(f"error: {record}: ")
        assert re.match(rf"{named}.*\b{reason}\b", capsys.readouterr().err)
    refused(r"\brecord\b", after=record.unlink)


def test_the_time_left_is_said_when_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(build.time, "monotonic", lambda: now)
    with build.Bar(100_000_000, True) as bar:
        for at, done_mb in (
            (0.0, 0),
            (1.0, 5),
            (16.0, 20),  # after the first 15 s: 80 left at 15 in 15 s
            (16.5, 100),
            (40.0, 1),  # another pass, just begun
            (40.5, 2),
            (60.0, 31),
            (80.0, 32),  # slower by now; the time of before no longer counts
        ):
            now = at
            bar.show("tokens", done_mb * 1_000_000)
        bar.show("training", None)
    assert capsys.readouterr().err.splitlines() == [
        "20 of 100 MB  tokens  0:01:20 left",
        "1 of 100 MB  tokens  – left",
        "31 of 100 MB  tokens  0:00:46 left",
        "32 of 100 MB  tokens  0:22:40 left",
    ]


@pytest.mark.parametrize("name", [".out.partial", ".out.partial/dataset"])
def test_nothing_is_removed_or_written_through_a_planted_link(name: str, tmp_path: Path) -> None:
    (kept := tmp_path / "victim/dataset/.kept").parent.mkdir(parents=True)
    kept.write_text("kept")
    (link := tmp_path / name).parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "victim" / ("dataset" if "/" in name else ""))
    (text := tmp_path / "a.txt").write_text("to be or not to be " * 100)
    with pytest.raises(DataError, match=rf"{re.escape(name)}: .*symbolic link"):
        prepare(tmp_path / "out", [str(text)], tokenizer="char", note=lambda _: None)
    assert kept.read_text() == "kept"
    assert not (tmp_path / "victim/lock").exists()


def test_a_folder_of_another_user_is_not_prepared_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.partial").mkdir()
    (text := tmp_path / "a.txt").write_text("to be or not to be " * 100)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(DataError, match=r"/\.out\.partial: .*\buser\b"):
        prepare(tmp_path / "out", [str(text)], tokenizer="char", note=lambda _: None)
