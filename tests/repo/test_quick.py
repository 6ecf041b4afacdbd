"""`pytest -m quick`: what it leaves out is there, and it lets no test start a process."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.quick import LEAST_SLOW_S, SLOW, slow_names

TESTS = Path(__file__).parents[1]
NAMES = [line for line in SLOW.read_text("utf-8").splitlines() if not line.startswith("#")]


def test_the_list_of_what_is_left_out_names_tests_that_exist() -> None:
    defined: dict[str, set[str]] = {}
    for name in NAMES:
        file, _, function = name.partition("::")
        path = TESTS / file
        assert path.is_file(), f"{name}: run make record-slow"
        if file not in defined:
            tree = ast.parse(path.read_text("utf-8"))
            defined[file] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert not function or function in defined[file], f"{name}: run make record-slow"


def test_quick_keeps_tests_of_every_part() -> None:
    whole_files = {name for name in NAMES if "::" not in name}
    for folder in ("checkpoint", "config", "data", "engine", "kernels", "log", "model", "run"):
        files = {path.relative_to(TESTS).as_posix() for path in (TESTS / folder).glob("test_*.py")}
        assert files - whole_files, folder


STARTS = {
    "a program": "subprocess.run([sys.executable, '-c', ''])",
    "a shell": "os.system('true')",
    "a fork": "os.fork()",
    "a process": "multiprocessing.get_context('spawn').Process(target=print).start()",
    "a pool": "multiprocessing.get_context('forkserver').Pool(1)",
}


@pytest.mark.parametrize("what", STARTS)
def test_a_quick_test_that_starts_a_process_fails_and_is_told_what_to_do(what: str) -> None:
    program = (
        "import multiprocessing, os, shutil, subprocess, sys\n"
        "from tests.support.quick import Guard, StartsProcessError\n"
        "guard = Guard()\n"
        "guard.is_on = True\n"
        "try:\n"
        f"    {STARTS[what]}\n"
        "except StartsProcessError as error:\n"
        "    print(guard.has_refused, shutil.which('g++'), error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS.parent, capture_output=True, text=True
    )
    assert ran.stdout.startswith("True None "), ran.stderr
    assert "record-slow" in ran.stdout


def test_functions_are_slow_by_all_their_parametrizations_together() -> None:
    half = 0.6 * LEAST_SLOW_S
    rows = [
        ["a.py::fast", half],
        ["a.py::both", half],
        ["a.py::both", half],
        ["a.py::starts", True],
        ["b.py::slow", 2 * LEAST_SLOW_S],
        ["b.py::fails", float("inf")],
    ]
    names = slow_names([json.dumps(row) for row in rows])
    assert names == ["a.py::both", "a.py::starts", "b.py"]
