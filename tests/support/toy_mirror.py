"""A file system whose operations are counted and can go wrong, and kills of a run at each of them.

``python -m tests.support.toy_mirror FOLDER N …`` trains with a mirror there: once to the end, and
for each N it is killed at that operation of the mirror, loses its run folder, and is resumed in a
new one. Reports as JSON.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

# Called before each change, with what is changed and a function that does half of it.
Happens = Callable[[str, Callable[[], object]], None]


class Faulty(LocalFileSystem):
    """``faulty:///folder`` is a folder that `happens` may spoil."""

    protocol = "faulty"
    cachable = False
    log: list[str] = []  # noqa: RUF012
    happens: Happens = staticmethod(lambda what, half: None)

    def _happens(self, what: str, path: str, half: Callable[[], object]) -> None:
        done = f"{what} {path.removesuffix('.part')}"
        Faulty.log.append(done)
        Faulty.happens(done, half)

    def _write(self, path: str, content: bytes) -> None:
        path = self._strip_protocol(path)
        self._happens("write", path, lambda: Path(path).write_bytes(content[: len(content) // 2]))
        Path(path).write_bytes(content)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._write(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._write(path, value)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        path = self._strip_protocol(path)
        if not os.path.isdir(path):
            self._happens("mkdir", path, lambda: None)
        super().makedirs(path, exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        if os.path.exists(path):
            self._happens("unlink", path, lambda: None)
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = self._strip_protocol(path)
        if os.path.exists(path):
            self._happens("remove", path, lambda: os.unlink(min(Path(path).iterdir())))
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


fsspec.register_implementation("faulty", Faulty, clobber=True)


class At:
    """Does something at operation number ``n``, from 0 on; ``done`` says whether it came to it."""

    def __init__(self, n: int, action: Callable[[], object], *, after_half: bool = True) -> None:
        self.n, self.action, self.after_half = n, action, after_half
        self.n_done, self.done = 0, False
        Faulty.happens = self

    def __call__(self, what: str, half: Callable[[], object]) -> None:
        self.n_done += 1
        if self.n_done == self.n + 1:
            self.done = True
            if self.after_half:
                half()
            self.action()


def play(folder: Path, points: list[int]) -> dict[str, Any]:
    from fasttrain.checkpoint.files import read_manifest
    from fasttrain.train import main
    from fasttrain.verify_resume import first_difference
    from tests.support.toy import write_config
    from tests.support.toy_phases import ended, forked

    command = [str(write_config(folder)), "run.threads=1", "checkpoint.every_steps=3"]
    command += ["checkpoint.keep_last=1", "eval.every_steps=4", "model.dropout=0.1"]

    def train(name: str, *more: str) -> int:
        out, mirror = folder / name, f"checkpoint.mirror=faulty://{folder}/mirror-{name}"
        argv = [*command, f"run.out_dir={out}", mirror, *more]
        return ended(forked(lambda told: main(argv), folder / f"{name}.log")[0])

    assert train("whole") == 0
    report: dict[str, Any] = {"killed": 0, "fetched": [], "from_nothing": 0, "differences": []}
    for n in points:
        name = f"killed-{n}"
        At(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
        status = train(name)
        if status == 0:  # a save overtook the copy of the one before, of which there was none
            break
        assert status == -signal.SIGKILL
        report["killed"] += 1
        At(-1, lambda: None)
        copies = folder / f"mirror-{name}" / "toy/checkpoints"
        whole = []
        for copy in copies.glob("step-*") if copies.is_dir() else ():
            try:
                whole.append(read_manifest(copy)["step"])
            except Exception:
                continue
        shutil.rmtree(folder / name)
        assert train(name, "--resume", "auto") == 0
        said = (folder / f"{name}.log").read_text()
        report["from_nothing"] += "nothing to resume" in said
        if whole:
            assert f"step-{max(whole):08d}-c" in said.split("resumed")[1].splitlines()[0], said
            report["fetched"].append(max(whole))
        found, _ = first_difference(folder / "whole/toy", folder / name / "toy")
        report["differences"] += [found] if found else []
    return report


if __name__ == "__main__":
    print(json.dumps(play(Path(sys.argv[1]), [*map(int, sys.argv[2:])])))
