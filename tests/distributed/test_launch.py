"""Processes that srun, mpirun and others start: they join, or are told how to be started."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.config import UserError
from fasttrain.distributed import lockstep
from fasttrain.distributed.launch import adopt
from fasttrain.distributed.world import World
from tests.support.toy import ENV, ROOT, write_config

SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
SRUN |= {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_NTASKS": "8"}
SEVERAL = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2"}


def adopted(variables: dict[str, str]) -> tuple[str | None, ...]:
    """Return rank, size, rank and size on the node, and the host at which the ranks meet."""
    environment = dict(variables)
    adopt(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(environment.get(name) for name in names)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SRUN | {"SLURM_NNODES": "1"}, ("5", "8", "1", "8", "127.0.0.1")),
        (SRUN | SEVERAL | {"SLURM_NODELIST": "gpu[03-05,9],b1"}, ("5", "8", "1", "4", "gpu03")),
        (SRUN | SEVERAL | {"SLURM_NODELIST": "b1,b2"}, ("5", "8", "1", "4", "b1")),
        (SRUN | SEVERAL | {"MASTER_ADDR": "x"}, ("5", "8", "1", "4", "x")),
        (MPI, ("1", "2", "1", "2", "127.0.0.1")),
        # The step in which Slurm started mpirun's daemons is not the job.
        (SRUN | MPI, ("1", "2", "1", "2", "127.0.0.1")),
        (PMI | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, ("1", "2", "1", "2", "127.0.0.1")),
        (SRUN | SEVERAL | PMI | {"SLURM_NODELIST": "b1"}, ("5", "8", "1", "4", "b1")),
    ],
)
def test_what_another_launcher_says_is_what_torchrun_would(
    variables: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert adopted(variables) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"},  # a shell of salloc
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a script of sbatch
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SRUN | {"SLURM_PTY_PORT": "1234"},
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # an interactive step
        MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_one_process_trains_alone(variables: dict[str, str]) -> None:
    assert adopted(variables) == (None,) * 5


def test_what_torchrun_says_comes_first() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    assert adopted(SRUN | torchrun) == ("0", "4", "0", "4", None)
    assert adopted(SRUN | {"WORLD_SIZE": "1"})[:2] == (None, "1")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SRUN | SEVERAL, r"srun .*\b8 processes\b.*MASTER_ADDR\b.*MASTER_PORT"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, r"mpirun .*\b2 processes\b.*MASTER_ADDR"),
        (PMI, r"^(?!.*MASTER_ADDR).*\bprocesses\b.*\bnode\b.*torchrun"),
    ],
)
def test_processes_that_cannot_meet_are_told_how_to(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        adopted(variables)


def test_all_ranks_of_a_job_meet_at_one_port_and_two_jobs_at_two() -> None:
    ports = []
    for variables in (
        SRUN,
        SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"},
        SRUN | {"SLURM_JOB_ID": "78"},
    ):
        environment = variables | SEVERAL | {"SLURM_NODELIST": "b1"}
        adopt(environment)
        ports.append(environment["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


def test_two_processes_of_mpirun_train_one_run(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "fasttrain.train", str(config), "train.steps=3"]
    started = []
    for rank in range(2):
        variables = MPI | {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        }
        environment = ENV | variables | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["toy"]
    assert re.search(r"ranks +2\b.*\bmpirun · ddp\b", outputs[0])


def test_R8_time_in_which_the_watchdog_stood_still_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, ended = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds if now != 3.0 else 10_000.0  # once the job is suspended

    def leave(status: int) -> None:
        ended.append((status, now))
        raise SystemExit

    monkeypatch.setattr(lockstep.time, "monotonic", lambda: now)
    monkeypatch.setattr(lockstep.time, "sleep", sleep)
    monkeypatch.setattr(lockstep.os, "_exit", leave)
    monkeypatch.setattr(lockstep.faulthandler, "dump_traceback", lambda **_: None)
    watched = lockstep.Lockstep(World(), 10.0)
    watched.beat()
    with pytest.raises(SystemExit):
        watched._watch()
    [(status, at)] = ended
    assert status == 1
    assert 10_005 < at < 10_015  # a hang is still found, after its 10 s
    patience = lockstep.Patience(10.0)
    now += 5000.0
    assert not patience.is_over()
    for _ in range(9):
        now += 1.0
        over = patience.is_over()
    assert over
