"""A long run of the toy config under random faults, beside the same run without them.

`python -m tests.support.toy_soak FOLDER STEPS FAULTS` prints what came of both as JSON. Every fault
ends or hinders one process: kills, signals, full disks, bits that flip in the newest checkpoint.
Batches whose loss is not finite belong to the data: both runs meet the same ones, and go back
behind them.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint import files as disk
from fasttrain.engine.saving import Saver
from fasttrain.engine.step import TrainStep
from fasttrain.train import main
from tests.support.faults import Faults, flip_bit
from tests.support.toy_phases import Told, at_step, digest, ended, forked, hear, heard

NONFINITE_ONE_IN = 41  # micro-batches
KINDS = ("kill", "signal", "disk full", "bit flip")
real_loss = TrainStep._loss


def loss_of_odd_batches(self: TrainStep, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
    bad = int((tokens * torch.arange(1, tokens.numel() + 1).view_as(tokens)).sum())
    loss = real_loss(self, tokens, *rest)
    return loss * float("nan") if bad % NONFINITE_ONE_IN == 0 else loss


def before_steps(action: Callable[[int], object]) -> None:
    """Call ``action`` before each step of this process, with its number in it from 1 on."""
    real, count = TrainStep.compute, 0

    def compute(self: TrainStep, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        action(count)
        return real(self, *arguments, **options)

    TrainStep.compute = compute  # type: ignore[method-assign]


def measure(steps: int, file: Path) -> None:
    """Write the descriptors and the memory of this process down, every tenth of the run."""

    def look(step: int) -> None:
        if step % (steps // 10) == 0:
            n_files = len(os.listdir("/proc/self/fd"))
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with file.open("a") as lines:
                lines.write(json.dumps([step, n_files, pages * os.sysconf("SC_PAGE_SIZE")]) + "\n")

    before_steps(look)


def flip_newest(checkpoints: Path, chance: random.Random) -> bool:
    """Damage the newest checkpoint where another one is behind it."""
    whole = [path for path, manifest in disk.history(checkpoints) if manifest]
    if len(whole) < 2:
        return False
    file = chance.choice(sorted(whole[0].iterdir()))
    flip_bit(file, chance.randrange(8 * file.stat().st_size))
    return True


def fill_at_rollbacks(counts: Path) -> None:
    """Let no file grow while a run goes back to a checkpoint; note each time that it did."""
    real = Saver.go_back

    def go_back(saver: Saver, before: int) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            found = real(saver, before)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with counts.open("a") as file:
            file.write("x" if found else "")
        return found

    Saver.go_back = go_back  # type: ignore[method-assign]


def skipped(run_dir: Path) -> int:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return max(int(row["skipped_steps"]) for row in rows if row["kind"] == "train")


def soak(folder: Path, steps: int, n_faults: int) -> dict[str, Any]:
    chance = random.Random(29)
    arguments = [str(folder / "toy.toml"), f"run.out_dir={folder}", f"train.steps={steps}"]
    arguments += ["model.dropout=0.1", "model.n_layers=1", "log.every_steps=10", "eval.prompts=[]"]
    arguments += [f"checkpoint.every_steps={max(steps // 200, 5)}", "checkpoint.keep_last=3"]
    arguments += [f"eval.every_steps={steps // 5}"]
    arguments += ["train.on_nonfinite=rollback", "train.max_rollbacks=1000000"]
    TrainStep._loss = loss_of_odd_batches  # type: ignore[method-assign, assignment]
    hear()

    def whole(told: Told) -> int:
        measure(steps, folder / "measured.jsonl")
        return main([*arguments, "run.name=whole"])

    started = time.perf_counter()
    assert ended(forked(whole, folder / "whole.log")[0]) == 0
    whole_s = time.perf_counter() - started
    run_dir, faults = folder / "faulty", []
    (folder / "rollbacks").touch()
    for number in range(10 * n_faults):
        kind = KINDS[number % len(KINDS)] if number < n_faults else "none"
        at = chance.randint(1, 3 * steps // (2 * n_faults))
        full_at = chance.randrange(60)
        resume = ["--resume", "auto"] if (run_dir / "checkpoints/latest").exists() else []
        if not resume and run_dir.exists():  # it was killed before its first save
            disk.remove(run_dir)

        def run(told: Told, kind: str = kind, at: int = at, full_at: int = full_at) -> int:
            at_step(at, told if kind == "none" else lambda: (told(), heard.wait()))
            if kind == "disk full":
                Faults(run_dir, fail_at=full_at, persistent=full_at % 2 == 1).__enter__()
                fill_at_rollbacks(folder / "rollbacks")
            return main([*arguments, "run.name=faulty", *resume])  # noqa: B023

        process, pipe = forked(run, folder / "faulty.log")
        os.read(pipe, 1)
        os.close(pipe)
        expected = {0}
        if kind != "none":
            sent = chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
            if kind in ("kill", "bit flip"):
                sent = signal.SIGKILL
            os.kill(process, sent)
            expected = {-sent} if sent == signal.SIGKILL else {75}
            if kind == "disk full":
                expected |= {1, 2}  # no space for the last save, or too often none
        status = ended(process)
        assert status in expected | {0}, (number, kind, status, folder / "faulty.log")
        if status == 0:
            break
        elapsed = time.perf_counter() - started
        print(f"{elapsed:7.1f} s  {number:>3}  {kind:<9}  {status}", file=sys.stderr, flush=True)
        if kind == "bit flip" and not flip_newest(run_dir / "checkpoints", chance):
            kind = "kill"
        faults.append(kind)
    measured = map(json.loads, (folder / "measured.jsonl").read_text().splitlines())
    log = (folder / "faulty.log").read_text()
    return {
        "faults": {kind: faults.count(kind) for kind in KINDS},
        "equal": digest(run_dir) == digest(folder / "whole"),
        "steps": digest(folder / "whole")["step"],
        "skipped_steps": skipped(folder / "whole"),
        "passed_over": log.count("passing over a damaged checkpoint"),
        "rollbacks_on_a_full_disk": (folder / "rollbacks").stat().st_size,
        "failed_saves": log.count("(training goes on)"),
        "measured": list(measured),
        "whole_s": whole_s,
        "faulty_s": time.perf_counter() - started - whole_s,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(soak(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))))
