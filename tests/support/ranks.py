"""Processes that are ranks, forked from one that has imported everything: that takes seconds."""

import fcntl
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from fasttrain.run import signals
from tests.support import toy_ranks
from tests.support.toy import set_imports_aside, write_config
from tests.support.toy_ranks import environment

PATIENCE_S = 500.0  # on a machine that does other things as well
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("fasttrain.run.run", "torch.distributed.run", "torch.distributed.fsdp"),
        *("torch.distributed.tensor", "torch._dynamo"),  # DDP and DTensor import them when used
    ]
)
Process = multiprocessing.context.ForkServerProcess


def new_store() -> TCPStore:
    """Return a store that listens at a port of its own, for as long as it is referred to."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], Any]) -> Path:
    """Return a folder that one of the test processes has filled for all of them."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with open(root / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (root / name).exists():
            (root / name).mkdir()
            fill(root / name)
    return root / name


def begin(
    target: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    output: str,
    variables: Mapping[str, str] = {},
) -> Process:
    """Start a process that calls ``target`` in ``folder`` and writes to the file ``output``."""
    (folder / output).touch()
    process = FORKS.Process(
        target=_be, args=(target, arguments, folder, output, dict(variables)), daemon=False
    )
    process.start()
    return process


def _be(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: Path,
    output: str,
    variables: dict[str, str],
) -> None:
    """Be as a process that was started anew."""
    os.setsid()
    os.chdir(folder)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    warnings.simplefilter("ignore")
    set_imports_aside()
    torch.set_num_threads(1)
    target(*arguments)


def torchrun(arguments: list[str]) -> None:
    """Be torchrun, and fork what it starts as ``-m tests.support.toy_ranks``."""
    from torch.distributed.elastic.multiprocessing import subprocess_handler
    from torch.distributed.run import main

    forks = multiprocessing.get_context("fork")

    def rank(arguments: list[str], variables: dict[str, str]) -> None:
        os.setsid()
        for number in signal.Signals:  # the agent's handlers are not the rank's
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(variables)
        toy_ranks.command(arguments)

    def start(self: Any, args: tuple[str, ...], variables: dict[str, str]) -> Any:
        given = list(args[args.index("tests.support.toy_ranks") + 1 :])
        process = forks.Process(target=rank, args=(given, variables))
        process.start()
        return process._popen  # type: ignore[attr-defined]

    subprocess_handler.SubprocessHandler._popen = start  # type: ignore[method-assign]
    main(arguments)


def script(path: str, *arguments: str) -> None:
    """Be ``python PATH ARGUMENTS``."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def run_script(code: str, *arguments: str, size: int, folder: Path) -> list[str]:
    """Run a script on several ranks; return what each printed."""
    store, path = new_store(), folder / "script.py"
    path.write_text(code)
    outputs = [f"script-{rank}.txt" for rank in range(size)]
    finish(
        begin(
            script,
            str(path),
            *arguments,
            folder=folder,
            output=output,
            variables=environment(rank, size, store.port) if size > 1 else {},
        )
        for rank, output in enumerate(outputs)
    )
    return [(folder / output).read_text() for output in outputs]


def finish(started: Iterable[Process]) -> None:
    """Wait until processes have ended; none outlives this."""
    processes = list(started)
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()


def run_all(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Run the command for each entry in turn, on the ranks that it asks for.

    Args:
        folder: the working directory.
        runs: by name: ``argv``, ``size`` and ``faults``.
    """
    store = new_store()
    (folder / "runs.json").write_text(json.dumps(runs))
    finish(
        begin(
            *(toy_ranks.serve, folder, rank, store.port),
            folder=folder,
            output=f"output-{rank}.txt",
        )
        for rank in range(max(run["size"] for run in runs.values()))
    )


def result(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """Return how a run ended on a rank: status, step, rows trained on, digest."""
    path = folder / f"{name}.{rank}.json"
    assert path.exists(), (folder / f"output-{rank}.txt").read_text()[-4000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


class Job:
    """Two ranks, started by torchrun or by themselves; what they print goes to files."""

    def __init__(self, folder: Path, *keys: str) -> None:
        self.folder, self.keys = folder, keys
        self.config = write_config(folder)
        self.processes: list[Process] = []
        self.stores: list[TCPStore] = []

    def _begin(self, target: Callable[..., Any], arguments: list[str], **variables: str) -> None:
        output = f"output-{len(self.processes)}.txt"
        self.processes.append(
            begin(target, arguments, folder=self.folder, output=output, variables=variables)
        )

    def _arguments(self, overrides: tuple[str, ...]) -> list[str]:
        return [str(self.config), *self.keys, *overrides]

    def torchrun(self, *overrides: str, restarts: int = 0, faults: Any = ()) -> None:
        options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        options += ["-m", "tests.support.toy_ranks", *self._arguments(overrides)]
        self._begin(torchrun, options, FAULTS=json.dumps(faults))

    def direct(self, *overrides: str, faults: Any = (), **variables: str) -> None:
        self.stores.append(new_store())
        for rank in range(2):
            own = environment(rank, 2, self.stores[-1].port) | variables
            arguments = self._arguments(overrides)
            self._begin(toy_ranks.command, arguments, FAULTS=json.dumps(faults), **own)

    def output(self, n: int = 0) -> str:
        return (self.folder / f"output-{n}.txt").read_text(errors="replace")

    def outputs(self) -> str:
        return "\n".join(self.output(n)[-3000:] for n in range(len(self.processes)))

    def until(self, condition: Callable[[], Any]) -> float:
        """Wait for a condition; return how long it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < PATIENCE_S, self.outputs()
            time.sleep(0.02)
        return time.monotonic() - started

    def running(self, run: str, step: int = 3) -> None:
        """Wait until a run has logged a step, behind the line of what made it."""
        log = self.folder / "runs" / run / "metrics.jsonl"
        self.sees(lambda: log.exists() and len(log.read_text().splitlines()) > step)

    def sees(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition, which is to come before any of the processes ends."""
        self.until(lambda: condition() or any(p.exitcode is not None for p in self.processes))
        assert condition(), self.outputs()

    def ended(self) -> list[int | None]:
        """Wait for all processes that were started; return their exit statuses."""
        self.until(lambda: all(p.exitcode is not None for p in self.processes))
        return [p.exitcode for p in self.processes]

    def workers(self, n: int = 0) -> list[int]:
        """Return the processes that the n-th one has started."""
        return signals._descendants(self.processes[n].pid or -1)

    def close(self) -> None:
        for n, process in enumerate(self.processes):
            if process.exitcode is None:
                for pid in self.workers(n):
                    os.kill(pid, signal.SIGKILL)
                process.kill()
            process.join()
