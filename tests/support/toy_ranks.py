"""What a forked process does as a rank: the command, with faults where the test wants them.

A fault is a dict: in which ``attempt`` of torchrun's (0), on which ``rank`` (None: on all), in the
last micro-batch of which ``step`` does ``what`` happen: a signal's number, which the rank sends
itself; ``hang``, for ever; ``impatient``: once another rank had its signal, 3 s are a time-out;
``flip``: of a bit in its parameters; ``raise``; or a factor on the loss, such as nan.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fasttrain.engine.loop import TrainingLoop
from fasttrain.engine.step import TrainStep
from fasttrain.run import ending
from fasttrain.run import setup as session
from fasttrain.train import leave, main


def digest(array: Any) -> str:
    """Return a short hash of an array of NumPy."""
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


class Spy:
    """Sees what a run trains on, and makes its faults happen."""

    def __init__(self, faults: Sequence[dict[str, Any]], rank: int, attempt: int = 0) -> None:
        self.faults = {
            fault["step"]: fault["what"]
            for fault in faults
            if fault.get("attempt", 0) == attempt and fault["rank"] in (rank, None)
        }
        self.trainer: TrainingLoop | None = None
        self.rows: list[list[str]] = []  # by step
        self.log: Path | None = None
        self._left = 0  # micro-batches of the step under way
        self._real = session.TrainingLoop, TrainStep.compute, TrainStep._loss  # type: ignore[attr-defined]

    def __enter__(self) -> "Spy":
        spy, (_, real_compute, real_loss) = self, self._real

        class Kept(TrainingLoop):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                spy.trainer = self

        def compute(step: TrainStep, batches: Sequence[Any], **options: Any) -> Any:
            shown = [batch.tokens[batch.targets.ne(-100).any(1)].numpy() for batch in batches]
            spy.rows.append([digest(row) for rows in shown for row in rows])
            spy._left = len(batches)
            if spy.log is not None and spy.trainer is not None:
                with open(spy.log, "a") as file:
                    file.write(json.dumps([spy.trainer.state.step, spy.rows[-1]]) + "\n")
            return real_compute(step, batches, **options)

        def loss(step: TrainStep, *batch: Any) -> torch.Tensor:
            value = real_loss(step, *batch)
            spy._left -= 1
            if spy._left or spy.trainer is None:
                return value
            what = spy.faults.pop(spy.trainer.state.step + 1, 1.0)
            if isinstance(what, float):
                return value * what
            while what == "hang":
                time.sleep(0.1)
            if what == "impatient":
                while not Path("faults.jsonl").exists():
                    time.sleep(0.01)
                spy.trainer.lockstep.timeout_s = 3.0
                spy.trainer.lockstep.beat()
                return value
            if what == "flip":  # of the first parameter, as memory may flip it
                parameter = step.parameters[0].data
                getattr(parameter, "_local_tensor", parameter).view(torch.int32)[1, 0] ^= 1 << 20
                return value
            if what == "raise":
                raise ValueError("what a rank fails of")
            with open("faults.jsonl", "a") as file:
                file.write(json.dumps([os.getpid(), what]) + "\n")
            os.kill(os.getpid(), what)
            return value

        self._set(Kept, compute, loss)
        return self

    def __exit__(self, *error: object) -> None:
        self._set(*self._real)

    def _set(self, trainer: Any, compute: Any, loss: Any) -> None:
        session.TrainingLoop = trainer  # type: ignore[attr-defined]
        TrainStep.compute = compute  # type: ignore[method-assign]
        TrainStep._loss = loss  # type: ignore[method-assign]


def command(arguments: Sequence[str]) -> None:
    """Run the command once. ``FAULTS``: in JSON; ``ECHO_S``: that of `ending`.

    Each step's rows are appended to rows-RANK.jsonl.
    """
    rank, attempt = (int(os.environ.get(k, 0)) for k in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    ending.ECHO_S = float(os.environ.get("ECHO_S", ending.ECHO_S))
    with Spy(json.loads(os.environ.get("FAULTS", "[]")), rank, attempt) as spy:
        spy.log = Path(f"rows-{rank}.jsonl")
        leave(main(arguments))


def serve(folder: Path, rank: int, port: int) -> None:
    """Run the command for each entry of runs.json that has this rank, as torchrun would."""
    for name, run in json.loads((folder / "runs.json").read_text()).items():
        if rank >= run["size"]:
            continue
        for key, value in environment(rank, run["size"], port).items():
            os.environ[key] = value
            if run["size"] == 1:
                del os.environ[key]
        print(f"---- {name}", flush=True)
        with Spy(run.get("faults", []), rank) as spy:
            argv = run["argv"] + (run.get("odd", []) if rank == 1 else [])
            found: dict[str, Any] = {"status": main(argv), "rows": spy.rows}
        if spy.trainer is not None:
            model = spy.trainer.model
            parameters = [getattr(p, "_local_tensor", p) for p in model.parameters()]
            found["digest"] = digest(torch.cat([p.detach().flatten() for p in parameters]).numpy())
            found["step"] = spy.trainer.state.step
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
        if dist.is_initialized():
            dist.destroy_process_group()


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank; as its agent does, another process keeps the store."""
    return {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


if __name__ == "__main__":
    command(sys.argv[1:])
