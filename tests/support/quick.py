"""`pytest -m quick`: every test that needs this process alone, and little time.

A test is quick unless tests/slow.txt names its function, or its file. That list is recorded:

    pytest --record-slow     # or make record-slow; runs everything, and writes tests/slow.txt

Quick tests run in one process that can start no other and finds no compiler. A test that is not in
the list and tries to start a process fails, and says so.
"""

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

SLOW = Path(__file__).parents[1] / "slow.txt"
LEAST_SLOW_S = 0.4  # of all parametrizations of a function together
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
HEAD = """\
# What `pytest -m quick` leaves out: files and functions of which a test starts a process, needs a
# compiler, or takes long. Written by `make record-slow`.
"""


class StartsProcessError(RuntimeError):
    """A quick test has tried to start a process."""


class Guard:
    """Refuses processes while a quick test runs."""

    def __init__(self) -> None:
        self.is_on = False
        self.has_refused = False
        os.environ["PATH"] = os.devnull  # no folder, so there is no compiler
        sys.addaudithook(self._audit)
        start = BaseProcess.start  # of multiprocessing, whose fork server raises no audit event

        def guarded(process: BaseProcess) -> None:
            self._audit("os.fork", (process.name,))
            start(process)

        BaseProcess.start = guarded  # type: ignore[method-assign]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in STARTS:
            return
        program = str(arguments[0]) if arguments else ""
        if event == "subprocess.Popen" and os.path.basename(program) == "git":
            raise FileNotFoundError("git")  # a run notes the commit where there is git
        self.has_refused = True
        raise StartsProcessError(
            f"{event} {program}: a quick test starts no process; if this test needs one, run make "
            "record-slow, or add it to tests/slow.txt"
        )


_guard: list[Guard] = []  # of this process, if it runs quick tests


def _is_quick(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == "quick")


def function_of(item: pytest.Item) -> str:
    """Return the name of a test in the list: ``config/test_config.py::test_x``."""
    path = item.path.relative_to(SLOW.parent).as_posix()
    return f"{path}::{getattr(item, 'originalname', item.name)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-slow", action="store_true", help="write tests/slow.txt from this run"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before pytest-xdist reads how many processes to start."""
    if _is_quick(config):
        config.option.numprocesses = 0
        config.option.dist = "no"


def pytest_configure(config: pytest.Config) -> None:
    if _is_quick(config) or config.option.record_slow:
        _guard.append(Guard())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = set(SLOW.read_text("utf-8").splitlines()) if SLOW.exists() else set()
    for item in items:
        function = function_of(item)
        if item.get_closest_marker("soak"):
            continue
        if function not in slow and function.partition("::")[0] not in slow:
            item.add_marker("quick")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not _guard:
        return (yield)
    guard = _guard[0]
    guard.is_on, guard.has_refused = True, False
    try:
        return (yield)
    finally:
        guard.is_on = False
        if item.config.option.record_slow:
            with _record_file(item.config).open("a") as file:
                file.write(json.dumps([function_of(item), guard.has_refused]) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report: Any = yield
    if item.config.option.record_slow:
        took_s = call.duration if report.outcome != "failed" else float("inf")
        with _record_file(item.config).open("a") as file:
            file.write(json.dumps([function_of(item), took_s]) + "\n")
    return report


def _record_file(config: pytest.Config) -> Path:
    """Return the file to which all processes of a run write."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    return Path(tempfile.gettempdir(), f"slow-{run}.jsonl")


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if not config.option.record_slow or hasattr(config, "workerinput"):
        return
    runner = config.pluginmanager.get_plugin("dsession")
    name = runner.nodemanager.testrunuid if runner else str(os.getpid())
    record = Path(tempfile.gettempdir(), f"slow-{name}.jsonl")
    lines = record.read_text().splitlines()
    record.unlink()
    SLOW.write_text(HEAD + "\n".join(slow_names(lines)) + "\n", "utf-8")


def slow_names(lines: list[str]) -> list[str]:
    """Return the functions that are slow, and in place of all of a file's, the file."""
    seconds: dict[str, float] = defaultdict(float)
    for line in lines:
        name, value = json.loads(line)
        seconds[name] += float("inf") if value is True else float(value)
    files: dict[str, Mapping[str, float]] = {}
    for name, took_s in seconds.items():
        file = name.partition("::")[0]
        files[file] = {**files.get(file, {}), name: took_s}
    names: list[str] = []
    for file, functions in sorted(files.items()):
        slow = sorted(name for name, took_s in functions.items() if took_s > LEAST_SLOW_S)
        names += [file] if len(slow) == len(functions) else slow
    return names
