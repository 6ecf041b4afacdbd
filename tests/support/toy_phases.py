"""Runs of the toy config in forked processes that are stuck in a phase, signalled, and resumed.

`python -m tests.support.toy_phases FOLDER` prints what came of each as JSON. One process imports
torch and forks a trainer a run, which keeps a run at some tenths of a second.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimizers load it, for a second in each fork that has not got it

import fasttrain.engine.evaluation
from fasttrain.checkpoint import load, resolve
from fasttrain.engine.loop import TrainingLoop
from fasttrain.engine.step import TrainStep
from fasttrain.run import ending
from fasttrain.run import setup as session
from fasttrain.train import main
from tests.support.faults import Faults
from tests.support.toy import set_imports_aside

STUCK_AT = 6
FOREVER_S = 3600.0
Told = Callable[[], None]  # tells the parent that the phase has begun

# What waits for the signal waits for this, so that no phase is over before, however late it comes.
heard = threading.Event()


def hear() -> None:
    real = TrainingLoop.stop_for

    def stop_for(self: TrainingLoop, reason: str) -> None:
        real(self, reason)
        heard.set()

    TrainingLoop.stop_for = stop_for  # type: ignore[method-assign]


def stuck(told: Told) -> None:
    torch.rand(5)  # what is given up has drawn this, and must draw it again
    told()
    time.sleep(FOREVER_S)


def until_heard(told: Told) -> None:
    """For phases that end by themselves: nothing is given up."""
    ending.PATIENCE_S = FOREVER_S
    told()
    heard.wait()


def at_step(n_done: int, action: Callable[[], object]) -> None:
    """Do something in the step after so many."""
    real = TrainStep._loss
    calls = iter(range(10**9))

    def loss(self: TrainStep, *batch: Any) -> Any:
        if next(calls) == n_done:
            action()
        return real(self, *batch)

    TrainStep._loss = loss  # type: ignore[assignment, method-assign]


def in_first_step(told: Told, run_dir: Path) -> None:
    """As a compiler would be."""
    at_step(0, lambda: stuck(told))


def in_a_step(told: Told, run_dir: Path) -> None:
    at_step(STUCK_AT, lambda: stuck(told))


def in_a_step_that_fails(told: Told, run_dir: Path) -> None:
    """A signal to the whole process group ends the compiler's processes as well."""

    def fail() -> None:
        torch.rand(5)
        until_heard(told)
        raise RuntimeError("the compiler was ended by signal 2")

    at_step(STUCK_AT, fail)


def between_batches_of_an_evaluation(told: Told, run_dir: Path) -> None:
    real = fasttrain.engine.evaluation._totals

    def totals(*arguments: Any) -> Any:
        until_heard(told)
        return real(*arguments)

    fasttrain.engine.evaluation._totals = totals


def in_a_batch_of_an_evaluation(told: Told, run_dir: Path) -> None:
    fasttrain.engine.evaluation._totals = lambda *_: stuck(told)  # type: ignore[assignment, return-value]


def in_a_sample(told: Told, run_dir: Path) -> None:
    session.generate = lambda *_, **__: stuck(told)  # type: ignore[attr-defined, assignment]


def _slow_save(run_dir: Path, step: int, wait: Callable[[], object]) -> None:
    def slow(operation: str) -> None:
        if f"/.tmp-step-0000000{step}" in operation:
            wait()
            time.sleep(0.02)

    Faults(run_dir, before=slow).__enter__()


def in_a_save(told: Told, run_dir: Path) -> None:
    in_step = threading.Event()
    _slow_save(run_dir, 4, lambda: in_step.wait() and until_heard(told))
    at_step(4, lambda: (in_step.set(), heard.wait()))


def in_a_step_while_saving(told: Told, run_dir: Path) -> None:
    _slow_save(run_dir, 5, heard.wait)
    in_a_step(told, run_dir)


PHASES = [
    (in_first_step, signal.SIGTERM),
    (in_a_step, signal.SIGINT),
    (in_a_step_that_fails, signal.SIGINT),
    (between_batches_of_an_evaluation, signal.SIGUSR1),
    (in_a_batch_of_an_evaluation, signal.SIGTERM),
    (in_a_sample, signal.SIGUSR1),
    (in_a_save, signal.SIGTERM),
    (in_a_step_while_saving, signal.SIGTERM),
]


def forked(run: Callable[[Told], int], log: Path) -> tuple[int, int]:
    """Fork; return the process and the end of a pipe that says when `Told` was called."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        set_imports_aside()
        told: list[int] = []
        status = run(lambda: (told or (told.append(1), os.write(writing, b"x"))) and None)
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def digest(run_dir: Path) -> dict[str, Any]:
    """All that must be equal at the end of two runs."""
    loaded = load(resolve(run_dir, "latest"))
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        "step": loaded.step,
        "tensors": {
            n: t.flatten().view(torch.uint8).sum().item() for n, t in loaded.tensors.items()
        },
        "bytes": {n: hash(t.numpy().tobytes()) for n, t in loaded.tensors.items()},
        "log": [
            (r["kind"], r["step"], r.get("loss", r.get("val_loss")))
            for r in lines
            if r["kind"] != "run"
        ],
    }


def play(folder: Path) -> list[dict[str, Any]]:
    arguments = [str(folder / "toy.toml"), f"run.out_dir={folder}", "model.dropout=0.1"]
    arguments += ["eval.every_steps=5", "checkpoint.every_steps=4", "eval.batch_size=4"]

    hear()

    def train(name: str, *more: str) -> Callable[[Told], int]:
        return lambda told: main([*arguments, f"run.name={name}", *more])

    assert ended(forked(train("whole"), folder / "whole.log")[0]) == 0
    whole, reports = digest(folder / "whole"), []
    ending.PATIENCE_COMPILING_S = ending.PATIENCE_S = 0.3
    for phase, number in PHASES:
        name = phase.__name__
        run_dir, log = folder / name, folder / f"{name}.log"

        def run(told: Told, name: str = name, phase: Any = phase, at: Path = run_dir) -> int:
            phase(told, at)
            return train(name)(told)

        process, pipe = forked(run, log)
        os.read(pipe, 1)
        os.close(pipe)
        os.kill(process, number)
        started = time.perf_counter()
        status, took_s = ended(process), time.perf_counter() - started
        stopped = load(resolve(run_dir)).step
        resumed = ended(forked(train(name, "--resume", "auto"), log)[0])
        reports.append(
            {
                "phase": name,
                "signal": number.name,
                "status": status,
                "took_s": took_s,
                "stopped": stopped,
                "resumed": resumed,
                "equal": digest(run_dir) == whole,
                "log": log.read_text(),
            }
        )
    return reports


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(play(Path(sys.argv[1]).resolve())))
