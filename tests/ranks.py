"""The command on several ranks: processes that start once and run it many times, shared by tests.

``python -m tests.ranks FOLDER RANK`` is one of the processes: for each entry of FOLDER/runs.json
that has its rank it sets what torchrun would set and calls the command.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.toy import ENV, ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(factory: pytest.TempPathFactory, name: str) -> tuple[Path, Any]:
    """Return a folder that all test processes share, and the lock under which one fills it."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    (root / name).mkdir(exist_ok=True)
    return root / name, locked(root / f"{name}.lock")


def run_all(folder: Path, runs: dict[str, dict[str, Any]], timeout_s: float) -> None:
    """Run the command for each entry in turn, on the ranks that it asks for.

    Args:
        folder: the working directory.
        runs: by name: ``argv``, ``size`` and whether and how its loss is spoiled.
        timeout_s: for all of them.
    """
    for run in runs.values():
        run["port"] = free_port()
    (folder / "runs.json").write_text(json.dumps(runs))
    n = max(run["size"] for run in runs.values())
    processes = []
    for rank in range(n):
        with open(folder / f"output-{rank}.txt", "w") as output:
            command = [sys.executable, "-W", "ignore", "-m", "tests.ranks", str(folder), str(rank)]
            environ = ENV | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=output)
            )
    try:
        for process in processes:
            process.wait(timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def result(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """Return how a run ended on a rank: status, step, rows trained on, digest, output."""
    path = folder / f"{name}.{rank}.json"
    assert path.exists(), (folder / f"output-{rank}.txt").read_text()[-4000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def digest(array: Any) -> str:
    """Return a short hash of an array of NumPy."""
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


# ---- inside a process ----------------------------------------------------------------------------


def _serve(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    from fasttrain import session
    from fasttrain.step import TrainStep
    from fasttrain.train import main
    from fasttrain.trainer import Trainer

    torch.set_num_threads(1)
    trainers: list[Trainer] = []
    rows: list[list[str]] = []
    spoiled: dict[str, Any] = {}

    class Kept(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)

    real_call, real_loss = TrainStep.__call__, TrainStep._loss
    calls = [0]

    def call(self: TrainStep, batches: Sequence[Any], lr: float) -> None:
        seen = []
        for batch in batches:
            shown = batch.targets.ne(-100).any(1)
            seen += [digest(row) for row in batch.tokens[shown].numpy()]
        rows.append(seen)
        real_call(self, batches, lr)

    def loss(self: TrainStep, *batch: Any) -> torch.Tensor:
        calls[0] += 1
        value = real_loss(self, *batch)
        bad = spoiled.get("rank") == rank and calls[0] in spoiled["calls"]
        return value * math.nan if bad else value

    session.Trainer = Kept  # type: ignore[misc, attr-defined]
    TrainStep.__call__ = call  # type: ignore[method-assign]
    TrainStep._loss = loss  # type: ignore[method-assign]
    for name, run in json.loads((folder / "runs.json").read_text()).items():
        if rank >= run["size"]:
            continue
        trainers.clear()
        rows.clear()
        calls[0] = 0
        spoiled.clear()
        spoiled.update(run.get("spoil", {}))
        for key, value in environment(rank, run["size"], run["port"]).items():
            os.environ[key] = value
            if run["size"] == 1:
                del os.environ[key]
        print(f"---- {name}", flush=True)
        status = main(run["argv"])
        found: dict[str, Any] = {"status": status, "rows": rows}
        if trainers:
            parameters = [getattr(p, "_local_tensor", p) for p in trainers[0].model.parameters()]
            found["digest"] = digest(torch.cat([p.detach().flatten() for p in parameters]).numpy())
            found["step"] = trainers[0].step_count
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
