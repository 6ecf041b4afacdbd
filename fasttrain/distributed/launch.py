"""What srun and mpirun say of the processes that they start, in the variables that torchrun sets.

torchrun's are RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without
them each process would train alone. Standard library only.
"""

import os
import re
import zlib
from collections.abc import MutableMapping

from fasttrain.config import UserError

# By launcher: the variables of rank, size, rank on its node and size of its node. An MPI that runs
# in a Slurm job inherits the variables of the step that started its daemons: it comes first.
_LAUNCHERS = {
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun (MVAPICH)": (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "flux run": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    "mpiexec (PMI)": ("PMI_RANK", "PMI_SIZE", "", ""),
}
# What all processes of a job have in common, for the port at which they meet.
_JOB_IDS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "FLUX_JOB_ID")
_TORCHRUN = "torchrun --nproc-per-node N -m fasttrain.train …"


def adopt(environment: MutableMapping[str, str] | None = None) -> str | None:
    """Set torchrun's variables from those of another launcher; return its name, None without one.

    ``environment`` is that of this process unless it is given.

    A single process, an interactive shell in a Slurm job, and processes of torchrun stay as they
    are.

    Raises:
        UserError: several processes were started in a way that does not say how they meet.
    """
    environment = os.environ if environment is None else environment
    if "WORLD_SIZE" in environment:
        return environment.get("FASTTRAIN_LAUNCHER")
    for name, variables in _LAUNCHERS.items():
        rank, size, local_rank, local_size = (_number(environment, v) for v in variables)
        if rank is None or size is None or size < 2:
            continue
        if name == "srun" and _is_interactive(environment):
            return None
        if name == "mpiexec" and local_rank is None:
            continue  # srun's own PMI, if it is Slurm that started them
        if local_rank is None:
            raise UserError(
                f"{name} started {size} processes and does not say their numbers on each node; "
                f"start them with {_TORCHRUN}"
            )
        if name == "srun":
            local_size = _tasks_on_node(environment) or local_size
        on_one_node = _on_one_node(environment, name, rank, size, local_rank, local_size)
        environment["RANK"] = str(rank)
        environment["WORLD_SIZE"] = str(size)
        environment["LOCAL_RANK"] = str(local_rank)
        environment["LOCAL_WORLD_SIZE"] = str(local_size or (size if on_one_node else 1))
        environment["FASTTRAIN_LAUNCHER"] = name
        if "MASTER_ADDR" not in environment:
            host = "127.0.0.1" if on_one_node else _first_host(environment)
            if host is None:
                raise UserError(
                    f"{name} started {size} processes on several nodes; set MASTER_ADDR to the "
                    f"host of rank 0 and MASTER_PORT to a free port there, or use {_TORCHRUN}"
                )
            environment["MASTER_ADDR"] = host
        if "MASTER_PORT" not in environment:
            ids = [environment[v] for v in _JOB_IDS if v in environment]
            key = " ".join(ids) if ids or not on_one_node else str(os.getppid())
            key += environment.get("SLURM_STEP_ID", "")
            # Below the ports that systems hand out; two jobs of a host may meet at one of them.
            environment["MASTER_PORT"] = str(20_000 + zlib.crc32(key.encode()) % 12_000)
        return name
    return None


def _number(environment: MutableMapping[str, str], variable: str) -> int | None:
    text = environment.get(variable, "")
    return int(text) if text.isdecimal() else None


def _is_interactive(environment: MutableMapping[str, str]) -> bool:
    """Return whether this runs in a shell of a Slurm job: the other tasks do not run it."""
    special = _number(environment, "SLURM_STEP_ID")
    return "SLURM_PTY_PORT" in environment or (special is not None and special >= 0xFFFFFFF0)


def _tasks_on_node(environment: MutableMapping[str, str]) -> int | None:
    """Return how many tasks of a Slurm step run on this node, from a list such as ``2(x3),1``."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environment, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else None


def _on_one_node(
    environment: MutableMapping[str, str],
    name: str,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int | None,
) -> bool:
    if local_size is not None:
        return local_size == size
    nodes = {"srun": "SLURM_STEP_NUM_NODES", "flux run": "FLUX_JOB_NNODES"}.get(name, "")
    if (n_nodes := _number(environment, nodes)) is not None:
        return n_nodes == 1
    if name == "srun" and (n_nodes := _number(environment, "SLURM_NNODES")) is not None:
        return n_nodes == 1
    return rank == local_rank


def _first_host(environment: MutableMapping[str, str]) -> str | None:
    """Return the first host of a Slurm step, from a list such as ``gpu[03-05,9],big1``."""
    for variable in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if hosts := environment.get(variable):
            return re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts).split(",")[0]
    return None
