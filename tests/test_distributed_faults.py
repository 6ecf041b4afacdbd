"""Ranks that are killed, stopped and signalled: the job fails or ends as one, and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import checkpoint
from tests import ranks
from tests.toy import ENV, ROOT, write_config
from tests.toy_trainer import rows

STOPPED = 75
KEYS = ["train.micro_batch=2", "train.tokens_per_step=128", "eval.sample_every_steps=none"]
KEYS += ["model.dropout=0.1", "checkpoint.every_steps=3"]
ENDLESS = ["train.steps=1000000", "checkpoint.every_steps=none", "log.every_steps=1"]
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc-per-node=2"]


def environ(faults: list[dict[str, int]], **more: str) -> dict[str, str]:
    path = f"{ROOT}:{ROOT / 'kernels'}"
    return ENV | {"PYTHONPATH": path, "FAULTS": json.dumps(faults), **more}


class Job:
    """Two ranks, started by torchrun or by themselves; what they print goes to files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_config(folder)
        self.processes: list[subprocess.Popen[bytes]] = []

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        with open(self.folder / f"output-{len(self.processes)}.txt", "wb") as output:
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )

    def torchrun(self, *arguments: str, restarts: int = 0, faults: Any = ()) -> None:
        command = [*TORCHRUN, f"--max-restarts={restarts}", "-m", "tests.toy_ranks"]
        self._start([*command, str(self.config), *KEYS, *arguments], environ(list(faults)))

    def direct(self, *arguments: str, faults: Any = ()) -> None:
        port = ranks.free_port()
        for rank in range(2):
            command = [sys.executable, "-W", "ignore", "-m", "tests.toy_ranks", str(self.config)]
            own = ranks.environment(rank, 2, port)
            self._start([*command, *KEYS, *arguments], environ(list(faults), **own))

    def output(self, n: int = 0) -> str:
        return (self.folder / f"output-{n}.txt").read_text(errors="replace")

    def until(self, condition: Callable[[], Any], timeout_s: float = 240.0) -> float:
        """Wait for a condition; return how long it took."""
        started = time.monotonic()
        while not condition():
            shown = "\n".join(self.output(n)[-2000:] for n in range(len(self.processes)))
            assert time.monotonic() - started < timeout_s, shown
            time.sleep(0.02)
        return time.monotonic() - started

    def running(self, run: str, step: int = 3) -> None:
        """Wait until a run has logged a step."""
        log = self.folder / "runs" / run / "metrics.jsonl"
        self.until(lambda: log.exists() and len(log.read_text().splitlines()) >= step)

    def ended(self) -> list[int]:
        """Wait for all processes that were started; return their exit statuses."""
        self.until(lambda: all(p.poll() is not None for p in self.processes))
        return [p.wait() for p in self.processes]

    def workers(self) -> list[int]:
        """Return the processes that the first one has started, by rank."""
        (agent,) = self.processes
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (folder / "environ").read_text().split("\0")
            except OSError:
                continue
            if parent == agent.pid:
                found += [(v, int(folder.name)) for v in variables if v.startswith("RANK=")]
        return [pid for _, pid in sorted(found)]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def job(tmp_path: Path) -> Any:
    made = Job(tmp_path)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest(run_dir: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.resolve(run_dir, "latest"))


def assert_stopped_at_one_step(job: Job, run: str) -> None:
    """The newest checkpoint is whole, and of the last step that any rank made."""
    last = [
        json.loads((job.folder / f"rows-{rank}.jsonl").read_text().splitlines()[-1])[0] + 1
        for rank in range(2)
    ]
    assert last[0] == last[1]
    assert newest(job.folder / "runs" / run).step == last[0]


def test_R3_R7_ranks_are_killed_and_the_job_ends_at_the_bits_of_one_that_was_not(
    job: Job,
) -> None:
    """Before the first checkpoint, behind it, and in the last epoch; either rank."""
    kill = int(signal.SIGKILL)
    kills = [(0, 1, 2), (1, 0, 5), (2, 1, 11)]
    faults = [dict(attempt=a, rank=r, step=s, signal=kill) for a, r, s in kills]
    job.torchrun("run.name=killed", restarts=3, faults=faults)
    assert job.ended() == [0], job.output()[-3000:]
    assert "starting over" in job.output()
    job.processes.clear()
    trained = [trained_rows(job, rank) for rank in range(2)]
    for rank in range(2):
        (job.folder / f"rows-{rank}.jsonl").unlink()
    job.direct("run.name=whole")
    assert job.ended() == [0, 0]
    assert trained == [trained_rows(job, rank) for rank in range(2)]
    killed, whole = (newest(job.folder / "runs" / name).tensors for name in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(killed[name], whole[name])] == []
    losses = [[row["loss"] for row in rows(job.folder / "runs" / n)] for n in ("killed", "whole")]
    assert losses[0] == losses[1]


def trained_rows(job: Job, rank: int) -> list[list[str]]:
    """Return the rows of each step that counts: a step that is repeated counts once."""
    lines = (job.folder / f"rows-{rank}.jsonl").read_text().splitlines()
    steps = dict(map(json.loads, lines))
    assert list(steps) == list(range(12))
    return list(steps.values())


def test_R7_the_others_end_in_seconds_when_a_rank_is_killed(job: Job) -> None:
    kill = dict(attempt=0, rank=1, step=4, signal=int(signal.SIGKILL))
    job.direct("distributed.mode=fsdp", *ENDLESS, faults=[kill])
    survivor, victim = job.processes
    job.until(lambda: victim.poll() is not None)
    assert job.until(lambda: survivor.poll() is not None) < 5
    assert survivor.returncode not in (0, STOPPED)
    assert "rank 0: another rank has ended or is out of reach" in job.output(0)


def test_R8_a_rank_that_is_stopped_ends_the_others_at_the_timeout(job: Job) -> None:
    stop = dict(attempt=0, rank=1, step=4, signal=int(signal.SIGSTOP))
    job.direct("distributed.timeout_s=3", *ENDLESS, faults=[stop])
    waiting, stopped = job.processes
    job.running("toy")
    assert job.until(lambda: waiting.poll() is not None) < 15
    assert waiting.returncode == 1
    told = job.output(0)
    assert "rank 0: no step has ended for 3 s (distributed.timeout_s" in told
    assert "Thread" in told
    assert "step.py" in told  # where it waits
    assert stopped.poll() is None
    os.kill(stopped.pid, signal.SIGCONT)
    assert job.until(lambda: stopped.poll() is not None) < 15
    assert stopped.returncode not in (0, STOPPED)


def test_R10_a_signal_to_one_rank_stops_all_at_one_step(job: Job) -> None:
    """It may come during evaluation, which is then made up for when the run goes on."""
    job.direct("distributed.mode=fsdp", *ENDLESS, "eval.every_steps=2")
    job.running("toy")
    job.processes[1].send_signal(signal.SIGUSR1)
    assert job.until(lambda: all(p.poll() is not None for p in job.processes)) < 25
    assert job.ended() == [STOPPED, STOPPED]
    assert_stopped_at_one_step(job, "toy")
    assert "rank 1 is to stop: ending with a checkpoint" in job.output(0)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_R10_a_signal_while_a_rank_is_in_its_first_step_for_long(job: Job, mode: str) -> None:
    """As while it compiles: all ranks give the step up, also the one that got no signal."""
    job.direct(f"distributed.mode={mode}", faults=[dict(attempt=0, rank=1, step=1, signal=0)])
    job.until(lambda: all((job.folder / f"rows-{rank}.jsonl").exists() for rank in range(2)))
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.until(lambda: all(p.poll() is not None for p in job.processes)) < 25
    assert job.ended() == [STOPPED, STOPPED], job.output(0)[-3000:] + job.output(1)[-3000:]
    assert newest(job.folder / "runs" / "toy").step == 0
    assert "the step under way was given up" in job.output(0)


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGUSR1, False)],
)
def test_R10_a_signal_to_torchrun_stops_all_at_one_step(
    job: Job, number: signal.Signals, everyone: bool
) -> None:
    """SIGINT as from a terminal: to torchrun and all ranks. SIGUSR1 kills torchrun itself."""
    job.torchrun(*ENDLESS)
    job.running("toy")
    (agent,) = job.processes
    workers = job.workers()
    assert len(workers) == 2
    for pid in [agent.pid, *(workers if everyone else [])]:
        os.kill(pid, number)
    assert job.until(lambda: not any(map(alive, workers)) and agent.poll() is not None) < 25
    assert agent.returncode != 0
    assert_stopped_at_one_step(job, "toy")
    assert "ending with a checkpoint" in job.output()
