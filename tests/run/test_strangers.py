"""R36: files of a stranger, on a shared machine: nothing is executed, followed, removed or raw."""

import ast
import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fasttrain_kernels import cpu
from fasttrain_kernels.cpu import _cache

from fasttrain import report
from fasttrain.checkpoint import files as disk
from fasttrain.config import UserError, load_config
from fasttrain.config.trust import refuse_foreign_keys
from fasttrain.config.untrusted import open_own, read_regular
from fasttrain.data.format import fetch_description
from fasttrain.data.remote import ShardCache
from fasttrain.log.sinks import CsvLogger, JsonlLogger, LogFile, Sinks
from fasttrain.mirror import Mirror
from fasttrain.model.compiled import keep_compiled
from fasttrain.prepare.build import prepare
from fasttrain.prepare.corpus import build_default_corpus
from fasttrain.storage import DataError, NoLocks, beneath, file_system, put
from fasttrain.train import main
from tests.support.toy import ROOT, write_config

needs_cpp = pytest.mark.skipif(not cpu.is_supported(), reason="no C++ compiler, or another CPU")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to play two users")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped at step 3."""
    monkeypatch.chdir(tmp_path)
    assert (
        main([str(write_config(tmp_path)), "run.name=r", "log.csv=true", "--stop-at-step=3"]) == 75
    )
    return tmp_path / "runs/r"


# ---- compiled code -------------------------------------------------------------------------------


def library(folder: Path) -> Path:
    (path,) = folder.glob("*.so")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a page": lambda content: content[:4096],
    "zeros": lambda content: content[:8192] + bytes(len(content) - 8192),
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
}


@needs_cpp
@pytest.mark.parametrize("damage", DAMAGES)
def test_R36_a_damaged_library_is_built_again(
    damage: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    load = cpu.load.__wrapped__
    load(source)
    path = library(tmp_path / "kept/cpp")
    assert (tmp_path / "kept/cpp").stat().st_mode & 0o777 == 0o700
    sound = path.read_bytes()
    path.unlink()  # it is mapped
    path.write_bytes(DAMAGES[damage](sound))
    assert load(source).answer() == 42
    assert library(tmp_path / "kept/cpp").read_bytes()[:100] == sound[:100]


@needs_cpp
def test_R36_a_library_that_a_link_leads_to_is_built_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    cpu.load.__wrapped__(source)
    path = library(tmp_path / "kept/cpp")
    moved = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(moved)
    assert cpu.load.__wrapped__(source).answer() == 42
    assert not library(tmp_path / "kept/cpp").is_symlink()


def foreign(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 65534, 65534)


def writable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def linked(folder: Path) -> None:
    folder.with_name("target").mkdir()
    folder.symlink_to(folder.with_name("target"))


def below_writable(folder: Path) -> None:
    folder.parent.chmod(0o777)


UNSAFE = {
    "another user's": pytest.param(foreign, marks=needs_root),
    "writable": writable,
    "a link": linked,
    "below a writable one": below_writable,
}


@needs_cpp
@pytest.mark.parametrize("spoil", UNSAFE.values(), ids=UNSAFE)
def test_R36_a_folder_that_others_can_write_holds_no_library(
    spoil: Callable[[Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of").mkdir()
    folder = tmp_path / "of/cpp"
    spoil(folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder.parent))
    with pytest.warns(UserWarning, match="TORCHINDUCTOR_CACHE_DIR"):
        assert cpu.load.__wrapped__(source).answer() == 42
    assert not list(tmp_path.rglob("*.so"))


@needs_cpp
def test_R36_processes_that_build_at_once_leave_one_whole_library(
    source: Path, tmp_path: Path
) -> None:
    code = "import sys; from fasttrain_kernels import cpu; print(cpu.load(sys.argv[1]).answer())"
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kept")}
    env |= {"PYTHONPATH": f"{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", code, str(source)]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in both] == [b"42\n"] * 2
    for path in (tmp_path / "kept/cpp").iterdir():
        assert path.name == _cache._name(path.name.partition("-")[0], path)


def test_R36_compiled_code_is_not_kept_where_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))  # not to be left set
    writable(tmp_path / "shared")
    keep_compiled(tmp_path / "shared")
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(tmp_path / "home")
    warned = rf"warning: {tmp_path}/shared\S*: .*{tmp_path}/home/.*data\.cache_dir"
    assert re.search(warned, capsys.readouterr().err)


def made_default_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the default text of a small standard library, in the folder ``cache``."""
    root = tmp_path / "lib"
    root.mkdir()
    for n in range(40):
        (root / f"m{n}.py").write_text(f"def f{n}(a):\n    return a + {n}\n" * 1500)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    return build_default_corpus(vocab_size=300, cache_dir=tmp_path / "cache")


def test_R36_a_damaged_default_text_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_default_text(tmp_path, monkeypatch)
    sound = (folder / "train_000000.bin").read_bytes()
    for damaged in ("train_000000.bin", "tokenizer.json", "dataset.json", "train_000000.ends"):
        (folder / damaged).write_bytes((folder / damaged).read_bytes()[:-3])
        again = build_default_corpus(vocab_size=300, cache_dir=tmp_path / "cache")
        assert (again / "train_000000.bin").read_bytes() == sound


@pytest.mark.parametrize("kind", ["file", "link", "cut off, without locks"])
def test_R36_whatever_is_in_place_of_the_default_text_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = made_default_text(tmp_path, monkeypatch)
    sound = (folder / "train_000000.bin").read_bytes()
    if kind == "file":
        shutil.rmtree(folder)
        folder.write_text("")
    elif kind == "link":
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / "nowhere")
    else:
        (folder / "train_000000.bin").write_bytes(sound[:-3])

        def no_locks(*_: object, **__: object) -> int:
            raise NoLocks(37, "no locks")

        monkeypatch.setattr("fasttrain.prepare.corpus.lock", no_locks)
    again = build_default_corpus(vocab_size=300, cache_dir=tmp_path / "cache")
    assert (again / "train_000000.bin").read_bytes() == sound


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_R36_whatever_is_in_place_of_a_fetched_description_is_replaced(
    name: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_text("a text\n" * 1000)
    prepare(tmp_path / "data", [str(tmp_path / "in.txt")], tokenizer="bytes", note=lambda _: None)
    address = f"file://{tmp_path}/data"
    path = fetch_description(address, tmp_path / "cache") / name
    sound = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
        (path / "x").write_text("")
    else:
        path.symlink_to(tmp_path / "nowhere")
    assert (fetch_description(address, tmp_path / "cache") / name).read_bytes() == sound
    assert not path.is_symlink()


# ---- a resumed run's own config ------------------------------------------------------------------

LEADING = {
    "tasks": 'eval.tasks_path="runs/r/tasks"',
    "a task file": 'eval.tasks=["./evil.yaml"]',
    "code": 'data.cache_dir="runs/r/cache"',
    "a mirror": 'checkpoint.mirror="elsewhere"',
}


@pytest.mark.parametrize("key", LEADING)
def test_R36_a_run_names_no_code_and_no_other_folder_by_its_own_config(
    key: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = LEADING[key].split("=", 1)
    section, _, short = name.partition(".")
    text = (run / "config.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(f"{short} =")]
    lines.insert(lines.index(f"[{section}]") + 1, f"{short} = {value}")
    (run / "config.toml").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert main(["--resume", str(run), "--stop-at-step=4"]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert "--trust" in said
    assert main(["--resume", str(run), f"{name}={'[]' if short == 'tasks' else 'none'}"]) == 0
    assert not Path("elsewhere").exists()
    refuse_foreign_keys(load_config(run / "config.toml"), [LEADING[key]], run)  # the user's own


def test_R36_a_run_is_taken_as_it_is_by_a_user_who_trusts_it(run: Path) -> None:
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("[checkpoint]", '[checkpoint]\nmirror = "m"'))
    assert main(["--resume", str(run), "--trust", "--stop-at-step=4"]) == 75
    assert Path("m/r/checkpoints").is_dir()


def test_R36_a_run_in_a_mirror_does_not_say_where_it_goes(run: Path) -> None:
    config = load_config(run / "config.toml", ["run.out_dir=/somewhere"])
    refuse_foreign_keys(config, [], run)
    with pytest.raises(UserError, match=r'run\.out_dir = "/somewhere".*--trust'):
        refuse_foreign_keys(config, [], run, at_address=True)


# ---- links and pipes -----------------------------------------------------------------------------

FILES = ("metrics.jsonl", "samples.txt", "config.toml", "train.log", "train.csv", ".lock")


@pytest.mark.parametrize("by", ["symbolic", "hard"])
@pytest.mark.parametrize("name", FILES)
def test_R36_no_link_in_a_run_folder_is_written_through(name: str, by: str, run: Path) -> None:
    victim = run.parent / "victim"
    text = '{"step": 1, "loss": 1}\n[run]\n' if name != "config.toml" else (run / name).read_text()
    victim.write_text(text)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim) if by == "symbolic" else (run / name).hardlink_to(victim)
    assert main(["--resume", str(run), "--stop-at-step=4"]) in (2, 75)
    assert victim.read_text() == text


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "faults", "profile", "wandb"])
def test_R36_a_folder_of_a_run_that_is_a_link_is_refused(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = run.parent / "victim"
    (run / name).rename(victim) if (run / name).exists() else victim.mkdir()
    (run / name).symlink_to(victim)
    before = sorted(victim.rglob("*"))
    assert main(["--resume", str(run), "--stop-at-step=4"]) == 2
    assert re.search(rf"\b{name}: .*symbolic link", capsys.readouterr().err)
    assert sorted(victim.rglob("*")) == before


def test_R36_the_report_replaces_a_link(run: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    victim = run.parent / "victim"
    victim.write_text("mine")
    for name in ("report.html", "report.png"):
        (run / name).symlink_to(victim)
    assert report.main([str(run)]) == 0
    assert victim.read_text() == "mine"
    assert not (run / "report.html").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "train.log", "config.toml"])
def test_R36_a_pipe_in_a_run_folder_hangs_nothing(name: str, run: Path) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert main(["--resume", str(run), "--stop-at-step=4"]) == 2
    with contextlib.suppress(UserError):
        report.read_run(run)


def test_R36_a_huge_file_in_a_run_folder_fills_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    os.truncate(path, 6 << 30)
    with pytest.raises(UserError, match=rf"metrics\.jsonl: {6 << 30} bytes"):
        report.read_run(tmp_path)
    with pytest.raises(UserError, match=rf"metrics\.jsonl: {6 << 30} bytes.*\b{1 << 20}\b"):
        read_regular(path, 1 << 20)
    os.truncate(path, 64 << 20)
    JsonlLogger(path).drop_after(5)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_R36_a_log_is_written_to_the_null_device_and_to_no_other(tmp_path: Path) -> None:
    log = LogFile(Path(os.devnull))
    log.write("gone\n")
    log.close()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"/pipe: .*\bnot a\b.*\bfile\b"):
        open_own(tmp_path / "pipe", os.O_WRONLY)
    table = CsvLogger(tmp_path)
    table.write("train", {"step": 1, "loss": 2.0})
    table.close()
    assert (tmp_path / "train.csv").exists()


# ---- what is removed -----------------------------------------------------------------------------


def test_R36_a_save_removes_only_what_saves_left(tmp_path: Path) -> None:
    own = [".tmp-latest", ".tmp-best", ".old-step-00000003", ".tmp-removed-step-00000001"]
    own += [f".tmp-step-00000002-{'0' * 16}-1", ".tmp-step-00000002-c7", ".tmp-metrics.jsonl"]
    own += [f".tmp-failed-{'a' * 16}-1"]
    dead = disk.new_mark()[:4] + f"{2**22 + 1:08x}" + "0" * 12  # above the largest number
    own += [f".tmp-step-00000004-{dead}-1"]
    (tmp_path / "step-00000003").mkdir()
    living = f".tmp-step-00000005-{disk.new_mark()[:4]}{os.getppid():08x}{'0' * 12}-1"
    kept = [".tmp-thesis", ".old-photos", ".tmp-step-notes", ".old-step-mother", ".tmp-", living]
    kept += [".tmp-step-00000001.txt", ".tmp-latest-news"]
    for name in (*own, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    disk.sweep(tmp_path, spare="-none-")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "step-00000003"])


def test_R36_the_cache_of_shards_removes_only_shards(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, gib=3000 / 2**30)
    cache.folder.mkdir()
    theirs = ["train_000001.bin", "notes.part", "README.md", f"{'a' * 63}.bin", f"{'A' * 64}.bin"]
    for name in theirs:
        (cache.folder / name).write_bytes(b"x" * 5000)
    old = cache.folder / f"{'b' * 64}.bin"
    old.write_bytes(b"x" * 2000)
    part = cache.folder / f"{'c' * 64}.part"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    assert cache.reserve(part, 2500)
    assert not old.exists()
    assert {*theirs} <= {path.name for path in cache.folder.iterdir()}
    part.unlink()
    part.symlink_to(victim)
    with contextlib.suppress(UserError):
        cache.reserve(part, 2500)
    assert victim.read_text() == "mine"


def mirror_of(root: Path, name: str = "m") -> Mirror:
    return Mirror(str(root / name), root / "runs/r", 1, note=lambda _: None, warn=lambda _: None)


@pytest.mark.parametrize("names", ["plain", "as copies"])
def test_R36_the_mirror_removes_no_checkpoint_that_it_did_not_copy(run: Path, names: str) -> None:
    copies = run.parent.parent / "m/r/checkpoints"
    copies.mkdir(parents=True)
    before = [f"step-0000000{n}" + ("" if names == "plain" else f"-c{n + 50}") for n in (1, 2)]
    for name in before:
        (copies / name).mkdir()
        (copies / name / "thesis.tex").write_text("mine")
    config = str(run.parent.parent / "toy.toml")
    for stop in (5, 7):
        argv = [config, "run.name=r", "checkpoint.mirror=m", "log.csv=true", "--resume=auto"]
        argv.append("checkpoint.keep_last=1")
        assert main([*argv, f"--stop-at-step={stop}"]) == 75
    assert [(copies / name / "thesis.tex").read_text() for name in before] == ["mine"] * 2
    assert len(list(copies.iterdir())) == 3  # of its own it keeps the last


def test_R36_a_mirror_that_is_the_run_folder_by_another_name_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.parent.parent / "alias").symlink_to(run.parent)
    with pytest.raises(UserError, match=r"checkpoint\.mirror = \S+/alias: .*run\.out_dir"):
        mirror_of(run.parent.parent, "alias")
    # As by another mount of a network's disk, of which device and inode tell nothing
    monkeypatch.setattr("fasttrain.mirror._is_same", lambda *_: False)
    monkeypatch.setattr("fasttrain.mirror.refuse_links", lambda *_: None)
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"/alias/\S+ .*\brun folder\b"):
        mirror_of(run.parent.parent, "alias")._copy_new()
    assert sorted(run.rglob("*")) == before


def test_R36_a_mirror_does_not_write_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a.part").symlink_to(victim)
    (tmp_path / "a").symlink_to(victim)
    put(f"file://{tmp_path}/a", b"new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "new"


# ---- addresses -----------------------------------------------------------------------------------


STRANGE = ("http://h/../../../x", "s3://../../x", "http://h/a/..", "gs:///etc/x", "http://h/.x/./y")


@pytest.mark.parametrize("address", [*STRANGE, "http://h/" + "y" * 500, "http://h/a\\..\\b"])
def test_R36_what_an_address_names_is_kept_beneath_the_cache(address: str, tmp_path: Path) -> None:
    path = beneath(tmp_path, address)
    assert path.parent == tmp_path
    assert path.resolve() == tmp_path.resolve() / path.name
    assert beneath(tmp_path, address) != beneath(tmp_path, f"{address}/other")
    assert beneath(tmp_path, "s3://bucket/a-b/c_1.x") == tmp_path / "s3/bucket/a-b/c_1.x"


def test_R36_a_server_chooses_no_name_outside_of_the_cache(tmp_path: Path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"format": "x"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/../../../../escaped"
        with pytest.raises(DataError):
            fetch_description(address, tmp_path / "a/b/c/cache")
    finally:
        server.shutdown()
        server.server_close()
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert made
    assert all(path.is_relative_to(tmp_path / "a/b/c/cache") for path in made)


def test_R36_an_address_runs_no_template() -> None:
    with pytest.raises(DataError, match=r"reference::http://h/x\.json: .*\bfollow"):
        file_system("reference::http://h/x.json")


# ---- what fails beside a run, and what is printed ------------------------------------------------


def test_R12_R36_a_sink_that_fails_is_closed_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(write_config(tmp_path), ["log.csv=true"])
    sinks = Sinks(config, tmp_path)
    closed = []

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    broken: Any = SimpleNamespace(
        name="log.broken", write=fails, drop_after=fails, close=lambda: closed.append(1)
    )
    sinks.all.insert(0, broken)
    for step in (1, 2, 3):
        sinks.write("train", {"step": step, "loss": 1.0})
    sinks.drop_after(2)
    sinks.close()
    said = capsys.readouterr().err
    assert said.count("warning: log.broken ") == 1
    assert closed == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "train.csv").read_text().splitlines()) == 3


def calls_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"print, line {node.lineno}"
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if text.startswith(("sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer")):
            yield text


def test_R36_one_module_prints_and_no_other() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {call}"
        for path in (ROOT / "fasttrain").rglob("*.py")
        if path.name != "printing.py"
        for call in calls_of(ast.parse(path.read_text("utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "text", ["\x1b]0;x\x07", "\x9b2J", "\x7f", "\u202e", "\u200b", "\r", "\x00"]
)
def test_R36_a_prompt_reaches_console_and_files_escaped(
    text: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = json.dumps([f"a{text}b"], ensure_ascii=True)
    argv = [str(run.parent.parent / "toy.toml"), f"eval.prompts={prompts}", "train.steps=3"]
    assert main([*argv, "run.name=other"]) == 0
    said = capfd.readouterr()
    other = run.with_name("other")
    files = [(other / name).read_bytes().decode() for name in ("samples.txt", "train.log")]
    for shown in (said.out, said.err, *files):
        assert text not in shown


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_R36_a_pipe_beside_a_run_hangs_no_resume(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.rename(run.with_name("toy"))
    pipe(run.with_name("toy-9") / "metrics.jsonl")
    pipe(run.with_name("toy-8") / ".lock")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["toy.toml", "--resume", "auto", "--stop-at-step=4"]) == 75


@pytest.mark.parametrize("name", ["run.json", "checkpoints/step-00000009-c9/manifest.json"])
def test_R36_a_pipe_in_a_mirror_hangs_nothing(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipe(run.parent.with_name("m") / "r" / name)
    command = ["toy.toml", "run.name=r", "checkpoint.mirror=m", "--resume", "auto"]
    status = main([*command, "--stop-at-step=4"])
    assert status == (2 if name == "run.json" else 75)
    if status == 2:
        told = rf"/{re.escape(path.name)}: .*\bnot a\b.*\bfile\b"
        assert re.search(told, capsys.readouterr().err)


def test_R36_a_pipe_at_the_address_of_a_dataset_hangs_nothing(tmp_path: Path) -> None:
    pipe(tmp_path / "data/dataset.json")
    with pytest.raises(DataError, match=r"dataset\.json: .*\bnot a\b.*\bfile\b"):
        fetch_description(f"file://{tmp_path}/data", tmp_path / "cache")
