"""`kill -9` during saves: `python -m tests.support.toy_kills FOLDER ROUNDS` reports as JSON.

One process imports torch and forks a trainer a round, which keeps a round at some milliseconds.
The trainer stops itself at an operation of a save, another one each round, and is killed there, so
that on no machine the kill comes too early or too late. What a kill leaves on the disk is told by
the operation that it came before, or in the middle of.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint import CheckpointWriter, resolve
from tests.checkpoint.test_checkpoint_faults import groups, is_intact, leftovers
from tests.support.toy_checkpoints import CONFIG

OPERATIONS = ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")
REAL = {name: getattr(os, name) for name in OPERATIONS}


class Stops:
    """Counts what `os` is asked to do, in whichever thread, and stops the process at number `at`.

    A write is stopped at its half.
    """

    def __init__(self, at: int = 0) -> None:
        self.at, self.n_done = at, 0
        for name in OPERATIONS:
            setattr(os, name, self._stopping(name))

    def _stopping(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.n_done += 1
            if self.n_done == self.at:
                if name == "write":
                    REAL[name](args[0], args[1][: len(args[1]) // 2])
                # To this very thread: it comes no further before the signal is seen to.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            return REAL[name](*args, **kwargs)

        return operation


def save(writer: CheckpointWriter, step: int) -> None:
    writer.save(step, groups(step), {"version": 0}, CONFIG, metric=-step)
    writer.wait()


def train(folder: Path, stop_at: int, tell: int) -> None:
    """Resumes and saves until it stops itself, and says so before and after each save."""
    step = is_intact(resolve(folder))
    writer = CheckpointWriter(folder, keep_last=2)
    Stops(stop_at)
    while True:
        step += 1
        REAL["write"](tell, b"%d begun\n" % step)
        save(writer, step)
        REAL["write"](tell, b"%d saved\n" % step)


def main(folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    writer = CheckpointWriter(folder, keep_last=2, asynchronous=False)
    for step in range(1, 5):
        stops = Stops()
        save(writer, step)
    of_a_save = stops.n_done
    report: dict[str, Any] = {"in_a_save": 0, "partials": 0, "lost": 0, "passed_over": []}
    for number in range(rounds):
        told, tell = os.pipe()
        if (child := os.fork()) == 0:
            # In the first two saves of a trainer: one sweeps up after the kill before, one does not
            train(folder, 1 + number * 2 * of_a_save // rounds, tell)
        os.close(tell)
        _, status = os.waitpid(child, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the trainer ended by itself: {status}"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(told) as pipe:
            step_, last = pipe.read().splitlines()[-1].split()
        step = int(step_)
        report["in_a_save"] += last == "begun"
        report["partials"] += bool(leftovers(folder))
        found = is_intact(resolve(folder, report=report["passed_over"].append))
        assert found in (step - 1, step), (found, step)
        report["lost"] += found < step
    print(json.dumps({**report, "operations": of_a_save}))


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "checkpoints", int(sys.argv[2]))
