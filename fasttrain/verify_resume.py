"""``--verify-resume N``: N steps in one process, and in two, must end at the same bits."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from fasttrain import checkpoint
from fasttrain.command import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, tell
from fasttrain.config import TrainConfig, UserError, config_to_toml, counted
from fasttrain.log.console import format_duration
from fasttrain.printing import say
from fasttrain.run.signals import interruptible


def verify_resume(config: TrainConfig, n_steps: int) -> int:
    """Train ``n_steps`` in one process and, the same, in two; print whether they end alike.

    Compared are the losses of all steps and, at the end, every tensor of the checkpoint:
    parameters, moments, random states and what else it holds. The runs lie in a temporary folder in
    ``run.out_dir``, which is removed unless they differ or fail. Returns 0 where all is equal, 1
    where it differs, otherwise the status of the run that failed.
    """
    if n_steps < 2:
        raise UserError(f"--verify-resume {n_steps}: two processes need at least 2 steps")
    if (n_processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"--verify-resume starts its own processes, and is one of {n_processes} processes; "
            "start it without torchrun"
        )
    if config.train.hours is not None:
        raise UserError(
            "--verify-resume: train.hours makes the learning rate depend on the clock; give the "
            "length otherwise, as in train.hours=none train.steps=1000"
        )
    if (n_all := config.train.steps) is not None and n_steps > n_all:
        raise UserError(f"--verify-resume {n_steps}: the run has {n_all} steps; name fewer")
    out_dir = Path(config.run.out_dir)
    is_new, folder = not out_dir.exists(), out_dir / f"verify-resume-{secrets.token_hex(4)}"
    keys = [f"run.out_dir={json.dumps(str(folder))}", "log.every_steps=1"]
    keys += ["run.deterministic=true", "checkpoint.mirror=none"]
    if config.run.threads is None:  # with other numbers of processors they would sum differently
        keys += [f"run.threads={torch.get_num_threads()}"]
    half, keep = n_steps // 2, False
    parts = [
        ("one", n_steps, f"{n_steps} steps in one go"),
        ("two", half, counted(half, "step")),
        ("two", n_steps, f"{n_steps - half} more in a fresh process"),
    ]
    temporary = tempfile.TemporaryDirectory()
    try:
        (given := Path(temporary.name) / "config.toml").write_text(config_to_toml(config), "utf-8")
        for name, stop, what in parts:
            started = time.perf_counter()
            say(f"{what} … ", end="")
            part = [f"run.name={name}", f"--stop-at-step={stop}", "--resume=auto"]
            status, errors = _train([str(given), *keys, *part])
            say(format_duration(time.perf_counter() - started))
            if status not in (EXIT_DONE, EXIT_STOPPED):
                keep = status != EXIT_BAD_INPUT  # which leaves nothing to look at
                tell(errors.strip() or f"exit status {status}")
                return status if status > 0 else EXIT_FAILED
            reached = checkpoint.resolve(folder / name, "latest").name
            if reached != f"step-{stop:08d}":
                raise UserError(
                    f"--verify-resume {n_steps}: the run's own end comes first, at {reached}; name "
                    "a number of steps that it has"
                )
        difference, compared = first_difference(folder / "one", folder / "two")
        keep = difference is not None
        if difference is None:
            say(f"resuming is exact: {compared} are equal bit for bit after {n_steps} steps")
            return EXIT_DONE
        say(f"RESUMING IS NOT EXACT: first difference: {difference} (runs kept in {folder})")
        return EXIT_FAILED
    finally:
        temporary.cleanup()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it is not there, or a run is in it
                out_dir.rmdir()


def _train(arguments: Sequence[str]) -> tuple[int, str]:
    """Train in a child process; return its exit status and what it wrote to stderr."""
    command = [sys.executable, "-m", "fasttrain.train", *arguments]
    with interruptible():
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


def first_difference(one: Path, two: Path) -> tuple[str | None, str]:
    """Return the first difference of two run folders in words, or None, and what was compared."""
    a, b = _record(one), _record(two)
    for name in a | b:
        # Of a hash, 16 digits
        whole, resumed = (record.get(name, "missing")[:24] for record in (a, b))
        if a.get(name) != b.get(name):
            return f"{name}: {whole} in one go, {resumed} resumed", ""
    kinds = Counter(name.split()[0].partition(".")[0] for name in a)
    losses, parameters, moments = (kinds.pop(kind) for kind in ("loss", "model", "optimizer"))
    return None, (
        f"{losses} losses, {parameters} parameters, {moments} tensors of the optimizers and "
        f"{kinds.total()} others (random states, counters)"
    )


def _record(run_dir: Path) -> dict[str, str]:
    """Return each loss of a run in hexadecimal digits, and the SHA-256 of each tensor saved."""
    record = {}
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()):
        if row["kind"] == "train":
            loss = "none" if row["loss"] is None else float(row["loss"]).hex()
            record[f"loss of step {row['step']}"] = loss
    loaded = checkpoint.load(checkpoint.resolve(run_dir, "latest"))
    record["step"] = str(loaded.step)
    for name, tensor in sorted(loaded.tensors.items()):
        data = tensor.contiguous().flatten().view(torch.uint8)
        record[name] = f"SHA-256 {hashlib.sha256(data.numpy().data).hexdigest()}"
    return record


if __name__ == "__main__":
    sys.exit("usage: python -m fasttrain.train CONFIG --verify-resume N")
