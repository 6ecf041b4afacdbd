"""Ranks that are killed, stopped and signalled: the job fails or ends as one, and goes on."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import pytest
import torch

from fasttrain import checkpoint
from fasttrain.data.format import open_dataset
from fasttrain.run import signals
from tests.support import toy_ranks
from tests.support.ranks import Job
from tests.support.toy import ENV, ROOT, alive, wait_until, write_config
from tests.support.toy_trainer import rows

STOPPED = 75
KILL = int(signal.SIGKILL)
# It takes seconds on a machine with a core for each; time-outs, of 300 s, are not what ends it.
SOON_S = 60.0
KEYS = ["train.micro_batch=2", "train.tokens_per_step=128", "eval.sample_every_steps=none"]
KEYS += ["model.dropout=0.1", "checkpoint.every_steps=3"]
ENDLESS = ["train.steps=1000000", "checkpoint.every_steps=none", "log.every_steps=1"]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path, *KEYS)
    yield made
    made.close()


def newest(run_dir: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.resolve(run_dir, "latest"))


def assert_stopped_at_one_step(folder: Path, run: str) -> None:
    """The newest checkpoint is whole, and of the last step that any rank made."""
    last = [
        json.loads((folder / f"rows-{rank}.jsonl").read_text().splitlines()[-1])[0] + 1
        for rank in range(2)
    ]
    assert last[0] == last[1]
    assert newest(folder / "runs" / run).step == last[0]


def test_R3_R7_after_ten_kills_the_job_ends_at_the_bits_of_one_that_was_not_killed(
    job: Job,
) -> None:
    """An epoch of 250 samples in 8 steps; either rank is killed, or both, at any of them."""
    epoch = ["train.steps=none", "train.epochs=1", "train.micro_batch=8"]
    epoch += ["train.tokens_per_step=512", "checkpoint.every_steps=2"]
    chance = random.Random(3)
    steps = sorted(chance.choices(range(1, 9), k=10))
    faults = [
        dict(attempt=attempt, rank=chance.choice([0, 1, None, None]), step=step, what=KILL)
        for attempt, step in enumerate(steps)
    ]
    job.torchrun("run.name=killed", *epoch, restarts=10, faults=faults)
    assert job.ended() == [0], job.output()[-3000:]
    killed = (job.folder / "faults.jsonl").read_text().splitlines()
    assert len(killed) >= 10
    assert re.search(r"runs/killed .*checkpoint.*\bfolder\b", job.output())
    job.processes.clear()
    trained = [trained_rows(job, rank) for rank in range(2)]
    for rank in range(2):
        (job.folder / f"rows-{rank}.jsonl").unlink()
    job.direct("run.name=whole", "--resume=auto", *epoch)
    assert job.ended() == [0, 0]
    assert len(re.findall(r"runs/whole .*checkpoint.*\bnew\b", job.output())) == 1
    assert trained == [trained_rows(job, rank) for rank in range(2)]
    tokens = open_dataset(job.folder / "data", "train").read(0, 250 * 16)
    samples = [toy_ranks.digest(row) for row in tokens.astype("int64").reshape(250, 16)]
    assert Counter(chain.from_iterable(chain.from_iterable(trained))) == Counter(samples)
    ours, whole = (newest(job.folder / "runs" / name).tensors for name in ("killed", "whole"))
    assert ours.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(ours[name], whole[name])] == []
    losses = [[row["loss"] for row in rows(job.folder / "runs" / n)] for n in ("killed", "whole")]
    assert losses[0] == losses[1]


def trained_rows(job: Job, rank: int) -> list[list[str]]:
    """Return the rows of each step that counts: a step that is repeated counts once."""
    lines = (job.folder / f"rows-{rank}.jsonl").read_text().splitlines()
    steps = dict(map(json.loads, lines))
    assert list(steps) == list(range(8))
    return list(steps.values())


def test_R7_the_others_end_in_seconds_when_a_rank_is_killed(job: Job) -> None:
    job.direct("distributed.mode=fsdp", *ENDLESS, faults=[dict(rank=1, step=4, what=KILL)])
    survivor, victim = job.processes
    job.until(lambda: victim.exitcode is not None)
    assert job.until(lambda: survivor.exitcode is not None) < SOON_S
    assert survivor.exitcode == 1
    assert "rank 0: another rank has ended or is out of reach" in job.output(0)


def test_R7_the_error_of_the_rank_that_fails_is_what_the_job_fails_of(job: Job) -> None:
    job.torchrun(*ENDLESS, faults=[dict(rank=1, step=4, what="raise")])
    job.until(lambda: "Traceback" in job.output())
    workers = job.workers()
    assert job.until(lambda: job.processes[0].exitcode is not None) < SOON_S
    assert job.processes[0].exitcode == 1
    wait_until(lambda: not any(map(alive, workers)))
    told = job.output()
    assert "rank 1: Traceback" in told
    summary = told[told.rindex("Root Cause") :]  # torchrun's
    assert "rank      : 1" in summary
    assert "ValueError: what a rank fails of" in summary


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.larning_rate=1", "optim.larning_rate "),  # before ranks meet
        ("data.seq_len=100000", "data.seq_len = 100000 "),  # and after
    ],
)
def test_bad_input_to_torchrun_is_told_in_a_line_also_in_its_summary(
    job: Job, override: str, told: str
) -> None:
    job.torchrun(override, "train.tokens_per_step=none")
    assert job.ended() == [1]
    before, _, after = job.output().partition("Traceback (most recent call last):")  # torchrun's
    assert before.count(told) <= 1  # none where torchrun ended rank 0 for what rank 1 returned
    *others, last = after.rstrip("=\n ").splitlines()
    assert last.startswith("  traceback : error: ")
    assert told in last
    assert not any("Traceback" in line for line in others)


def test_R8_a_rank_that_is_stopped_ends_the_others_at_the_timeout(job: Job) -> None:
    stop = dict(rank=1, step=4, what=int(signal.SIGSTOP))
    job.direct(*ENDLESS, faults=[stop, dict(rank=0, step=4, what="impatient")])
    waiting, stopped = job.processes
    job.running("toy")
    assert job.until(lambda: waiting.exitcode is not None) < SOON_S
    assert waiting.exitcode == 1
    told = job.output(0)
    assert "rank 0: no step has ended for 3 s (distributed.timeout_s" in told
    assert "Thread" in told
    assert "step.py" in told  # where it waits
    assert stopped.exitcode is None
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGCONT)
    assert job.until(lambda: stopped.exitcode is not None) < SOON_S
    assert stopped.exitcode not in (0, STOPPED)


def test_R10_R13_a_signal_to_one_rank_stops_all_at_one_step(job: Job) -> None:
    """It may come during evaluation, which is then made up for when the run goes on.

    Ranks that want to go on with the same folder meanwhile are refused, and told so once.
    """
    job.direct("distributed.mode=fsdp", *ENDLESS, "eval.every_steps=2")
    job.running("toy")
    first = list(job.processes)
    job.direct("--resume=auto")
    job.until(lambda: all(p.exitcode is not None for p in job.processes[2:]))
    assert [p.exitcode for p in job.processes] == [None, None, 2, 2]
    assert re.search(r"runs/toy .*\bin use\b.*run\.name", job.output(2))
    assert job.output(3) == ""
    os.kill(first[1].pid or -1, signal.SIGUSR1)
    assert job.until(lambda: all(p.exitcode is not None for p in first)) < SOON_S
    assert job.ended() == [STOPPED, STOPPED, 2, 2]
    assert_stopped_at_one_step(job.folder, "toy")
    assert re.search(r"rank 1 .*\bstop\b.*checkpoint", job.output(0))


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_R10_a_signal_while_a_rank_is_in_its_first_step_for_long(job: Job, mode: str) -> None:
    """As while it compiles: all ranks give the step up, also the one that got no signal."""
    job.direct(f"distributed.mode={mode}", faults=[dict(rank=1, step=1, what="hang")])
    job.sees(lambda: all((job.folder / f"rows-{rank}.jsonl").exists() for rank in range(2)))
    os.kill(job.processes[0].pid or -1, signal.SIGTERM)
    assert job.until(lambda: all(p.exitcode is not None for p in job.processes)) < SOON_S
    assert job.ended() == [STOPPED, STOPPED], job.output(0)[-3000:] + job.output(1)[-3000:]
    assert newest(job.folder / "runs" / "toy").step == 0
    assert re.search(r"\bstep\b.*given up", job.output(0))


def test_R10_a_second_signal_to_all_ends_them_at_once_and_spoils_nothing(job: Job) -> None:
    """One that is no echo of the first; in a step that would not end."""
    keys = ["distributed.mode=fsdp", *ENDLESS, "checkpoint.every_steps=1"]
    job.direct(*keys, faults=[dict(rank=1, step=4, what="hang")], ECHO_S="0")
    latest = job.folder / "runs/toy/checkpoints/latest"
    job.sees(lambda: latest.exists() and latest.read_text().strip() == "step-00000003")
    for number in (signal.SIGTERM, signal.SIGINT):
        for process in job.processes:
            os.kill(process.pid or -1, number)
    assert job.until(lambda: all(p.exitcode is not None for p in job.processes)) < SOON_S
    assert job.ended() == [1, 1]
    assert "Traceback" not in job.output(0) + job.output(1)
    assert newest(job.folder / "runs" / "toy").step == 3


@pytest.mark.parametrize(("number", "everyone"), [(signal.SIGINT, True), (signal.SIGUSR1, False)])
def test_R10_a_signal_to_torchrun_stops_all_at_one_step(
    job: Job, number: signal.Signals, everyone: bool
) -> None:
    """SIGINT as from a terminal: to torchrun and all ranks. SIGUSR1 kills torchrun itself."""
    job.torchrun(*ENDLESS)
    job.running("toy")
    (agent,) = job.processes
    workers = job.workers()
    assert len(workers) == 2
    for pid in [agent.pid or -1, *(workers if everyone else [])]:
        os.kill(pid, number)
    assert job.until(lambda: not any(map(alive, workers)) and agent.exitcode is not None) < SOON_S
    assert agent.exitcode != 0
    assert_stopped_at_one_step(job.folder, "toy")
    assert re.search(r": .*\bcheckpoint$", job.output(), re.MULTILINE)


SRUN = """#!/bin/bash
printf '%s\n' "srun $*" >> "$SLURM_CALLS"
shift 2  # --kill-on-bad-exit, --cpus-per-task
[ -z "${ONLY_SAY:-}" ] || exit 1
exec "$@"
"""
SCONTROL = """#!/bin/bash
printf '%s\n' "scontrol $*" >> "$SLURM_CALLS"
[ "$1" != show ] || echo localhost
"""


def test_R10_a_job_of_slurm_is_stopped_queued_again_and_resumed(tmp_path: Path) -> None:
    """As configs/slurm.sh runs it, torchrun itself and all; SLURM's own commands are stand-ins."""
    config, calls = write_config(tmp_path), tmp_path / "calls.txt"
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    number = number_with_free_port()
    variables = ENV | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
        "SLURM_CALLS": str(calls),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "2",
    }
    command = ["bash", str(ROOT / "configs/slurm.sh"), str(config), *KEYS, *ENDLESS]
    log = tmp_path / f"runs/toy-{number}/metrics.jsonl"
    job = Job(tmp_path)
    with open(tmp_path / "output-0.txt", "wb") as output:
        batch = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=output, stderr=output)
    try:
        job.until(lambda: (log.exists() and log.read_text()) or batch.poll() is not None)
        step = signals._descendants(batch.pid)
        assert len(step) == 3, job.output()  # torchrun and two ranks
        for pid in step:
            os.kill(pid, signal.SIGTERM)
        assert job.until(lambda: batch.poll() is not None) < SOON_S
    finally:
        for pid in (*signals._descendants(batch.pid), batch.pid) if batch.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        batch.wait()
    wait_until(lambda: not any(map(alive, step)))
    assert batch.returncode != 0
    assert newest(log.parent).step > 0
    show, srun, requeue = calls.read_text().splitlines()
    assert (show, requeue) == ("scontrol show hostnames localhost", f"scontrol requeue {number}")
    started = "srun --kill-on-bad-exit=1 --cpus-per-task=2 python -m torch.distributed.run "
    assert srun.startswith(started)
    assert srun.endswith(f" run.out_dir=runs run.name=toy-{number} --resume auto")
    # Of a job that fails before it trains, the log of the one before says nothing.
    again = subprocess.run(command, cwd=tmp_path, env=variables | {"ONLY_SAY": "1"}, check=False)
    assert again.returncode == 1
    assert calls.read_text().splitlines()[3:] == [show, srun]


def test_outside_slurm_the_job_script_says_how_it_is_used(tmp_path: Path) -> None:
    variables = {k: v for k, v in ENV.items() if not k.startswith("SLURM_")}
    for arguments in (["base.toml"], []):
        command = ["bash", str(ROOT / "configs/slurm.sh"), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("usage: sbatch configs/slurm.sh CONFIG.toml ")
        assert done.stderr.count("\n") == 1


def number_with_free_port() -> int:
    """Return a number of a job whose port, as the script makes it, nobody listens at.

    Of those below the ports that the system hands out, so that nobody will.
    """
    for number in count(os.getpid() % 12_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", 20_000 + number))
            return number
    raise AssertionError("unreachable")
