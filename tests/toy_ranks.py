"""The command with faults: ``python -m tests.toy_ranks CONFIG …`` under torchrun or by itself.

``FAULTS`` in the environment is a JSON list of ``attempt``, ``rank``, ``step`` and ``signal``: that
rank sends itself the signal in the middle of that step, in that attempt of torchrun's; with signal
0 it never goes on. Each step's rows are appended to rows-RANK.jsonl.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from fasttrain import session
from fasttrain.step import TrainStep
from fasttrain.train import leave, main
from fasttrain.trainer import Trainer
from tests.ranks import digest

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = {
        fault["step"]: fault["signal"]
        for fault in json.loads(os.environ.get("FAULTS", "[]"))
        if (fault["attempt"], fault["rank"]) == (attempt, rank)
    }
    trainers: list[Trainer] = []
    real_call, real_loss = TrainStep.__call__, TrainStep._loss

    class Kept(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)

    def call(self: TrainStep, batches: Sequence[Any], lr: float) -> None:
        rows = [digest(row) for batch in batches for row in batch.tokens.numpy()]
        with open(f"rows-{rank}.jsonl", "a") as file:
            file.write(json.dumps([trainers[-1].step_count, rows]) + "\n")
        real_call(self, batches, lr)

    def loss(self: TrainStep, *batch: Any) -> torch.Tensor:
        value = real_loss(self, *batch)
        number = faults.pop(trainers[-1].step_count + 1, None)
        while number == 0:
            time.sleep(0.1)
        if number is not None:
            os.kill(os.getpid(), number)
        return value

    session.Trainer = Kept  # type: ignore[misc, attr-defined]
    TrainStep.__call__ = call  # type: ignore[method-assign]
    TrainStep._loss = loss  # type: ignore[method-assign]
    leave(main(sys.argv[1:]))
