"""From one process to many: process groups, how ranks share the work, what they tell each other.

Everything that moves tensors is PyTorch's own: `torch.distributed`, DDP, `fully_shard`, torchrun.
A run of one process makes no group, and every function here then costs nothing.

A *rank* is one process; *control* is a group on the hosts (gloo) beside the devices' own, for what
the training loop decides: it never waits for the device.
"""

import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import fasttrain_kernels
import torch
import torch.distributed as dist
from fasttrain_kernels._torch import set_group_timeout
from fasttrain_kernels.grad_norm import local_tensor
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fasttrain.config import DistributedConfig, TrainConfig, UserError, show
from fasttrain.distributed import launch

# What DDP may take of a device: parameters, gradients, reduction buckets and two moments, fp32. The
# rest is left to activations and the allocator.
DDP_BYTES_PER_PARAMETER = 20
DDP_PART_OF_MEMORY = 0.6

# Keys that may differ between the ranks of a run: where each finds its files and its device, and
# what rank 0 alone does.
OF_ONE_RANK = (
    *("run.name", "run.out_dir", "run.device", "run.threads", "data.path"),
    *("data.cache_dir", "data.cache_gib", "data.prefetch", "eval.tasks_path"),
    *("log.csv", "log.tensorboard", "log.wandb", "log.profile_steps"),
    *("distributed.timeout_s", "distributed.init_timeout_s"),
)


class SharedError(UserError):
    """Raised on the other ranks if one fails: rank 0 alone reports it."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0  # over all nodes
    local_rank: int = 0  # on its node: the number of its CUDA device
    size: int = 1
    local_size: int = 1  # on this node
    mode: str = "single"  # single | ddp | fsdp | hsdp; auto until `choose_mode`
    why: str = ""  # of the mode, in words
    launcher: str = "torchrun"  # what started the processes
    mesh: DeviceMesh | None = None  # these three: None for single
    control: dist.ProcessGroup | None = None  # the group on the hosts
    store: Store | None = None  # names and values that all ranks see

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints and writes what exists once."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks."""
        return self.mode in ("fsdp", "hsdp")

    @property
    def n_copies(self) -> int:
        """How many whole copies of the parameters the ranks hold together."""
        return self.mesh.size(0) if self.mesh is not None and self.mode != "fsdp" else 1

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's own device for the one that the config names."""
        if device.type != "cuda" or self.size == 1:
            return device
        n = torch.cuda.device_count()
        if self.local_rank >= n:
            raise UserError(
                f"rank {self.rank} is number {self.local_rank} on its node, which has {n} CUDA "
                f"devices; start torchrun with --nproc-per-node {n} at most (with srun: give each "
                "task all GPUs of its node, --gpu-bind=none)"
            )
        return torch.device("cuda", self.local_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place, on its device; one small reduction."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to add a tensor up over all ranks, in place; what is returned waits for it."""
        work = dist.all_reduce(tensor, async_op=True) if self.size > 1 else None
        return work.wait if work else lambda: None

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Waits."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in order of rank, on every rank. Waits."""
        if self.control is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def set_timeout(self, timeout_s: float) -> None:
        """Have a collective fail that takes longer than ``timeout_s`` from now on."""
        for group in (None, self.control) if self.size > 1 else ():  # the devices', the hosts'
            set_group_timeout(timedelta(seconds=timeout_s), group)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError (SharedError but on rank 0) if ranks hold different facts. Waits.

        The message names a rank, what differs, and both values.
        """
        first = self.share(facts)
        differing = [
            f"{name} = {_told(facts.get(name))}, and rank 0 has {_told(first.get(name))}"
            for name in {**first, **facts}
            if first.get(name) != facts.get(name)
        ]
        more = f"; {len(differing) - 3} more differ" if len(differing) > 3 else ""
        with self.failing_together():
            if differing:
                raise UserError(
                    f"differs from rank 0, it has {'; '.join(differing[:3])}{more}; start all "
                    "ranks with the same config, data, code and torch"
                )

    def drifted(self, parameters: Iterable[Tensor]) -> list[int]:
        """Return the ranks whose copy of the parameters is not, bit for bit, that of most copies.

        One small reduction. Waits, also for the device. Of two copies the first counts as right.
        """
        if self.n_copies == 1:
            return []
        own = checksum(parameters)
        sums = torch.zeros(self.size, dtype=torch.int64, device=own.device)
        sums[self.rank] = own
        copies = self.sum(sums).view(self.n_copies, -1)
        shards = zip(*copies.tolist(), strict=True)
        usual = [Counter(found).most_common(1)[0][0] for found in shards]
        return [r for r, found in enumerate(sums.tolist()) if found != usual[r % len(usual)]]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Make a `UserError` of one rank the error of all (SharedError but on rank 0). Waits.

        The block itself must not wait for other ranks.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        messages = self.gather(str(error) if error else "")
        if error is not None and self.leads:
            raise error
        for rank, message in enumerate(messages):
            if message:
                kind = UserError if self.leads else SharedError
                raise kind(f"rank {rank}: {message}") from error


def facts_by_name(config: TrainConfig, data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values of a config, and the facts that identify each split of its data."""
    tables = asdict(config) | {f"data.{split}": facts for split, facts in data.items()}
    return {f"{table}.{k}": v for table, found in tables.items() for k, v in found.items()}


def facts_of_rank(
    config: TrainConfig, data: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what must be the same on all ranks, by name; ``data`` identifies each split."""
    named = facts_by_name(config, data).items()
    facts = {name: value for name, value in named if not name.startswith(OF_ONE_RANK)}
    for package in (Path(__file__).parents[1], Path(fasttrain_kernels.__file__).parent):
        for file in sorted(package.rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                name = f"code of {package.name}/{file.relative_to(package)}"
                facts[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {**facts, "torch": str(torch.__version__), **options}


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return a sum of the bits of tensors, int64 on their device; a flipped bit changes it.

    So do several, but for a chance of 2^-32: each row and each column counts with its own factor.
    Of DTensors the shards of this rank count. Nothing waits, and no large tensor is copied.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums: list[list[Tensor]] = [[], []]
    for tensor in tensors:
        local = local_tensor(tensor.detach())
        bits = local.view(integers[local.element_size()])
        bits = bits.flatten(1) if bits.dim() > 1 else bits.reshape(1, -1)
        for dim in (0, 1):
            sums[dim].append(bits.sum(dim, dtype=torch.int64))
    weighted = []
    for values in map(torch.cat, sums):  # each times an odd number that follows no pattern
        # Source: the finalizer of splitmix64 (Steele et al. 2014), modulo 2^64
        x = torch.arange(1, len(values) + 1, device=values.device) * -0x61C8864680B583EB
        x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
        weighted.append((values * ((x ^ (x >> 27)) | 1)).sum())
    columns, rows = weighted
    return rows + 2 * columns  # a factor that is odd: no flip of one bit comes to 0


def _told(value: Any) -> str:
    """Return a value for people, a long one by its hash."""
    text = show(value)
    if len(text) <= 40:
        return text
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return f"(sha256 {digest[:12]})"


def start(config: DistributedConfig, device: torch.device) -> tuple[World, torch.device]:
    """Join the processes that torchrun started, if any; return them and this rank's own device.

    Those that srun or mpirun started join as well: see `launch.adopt`.

    Raises UserError if they did not find each other in ``distributed.init_timeout_s``.
    """
    launcher = launch.adopt() or "torchrun"
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(), device
    try:
        world = World(
            rank=int(os.environ["RANK"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            size=int(os.environ["WORLD_SIZE"]),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            mode="auto",
            launcher=launcher,
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is set but {error} is missing or no number; start several processes with "
            "torchrun, which sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from error
    device = world.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by a script, or for an earlier trainer of this process
        return replace(world, control=dist.new_group(backend="gloo")), device
    patience = timedelta(seconds=config.init_timeout_s)
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _fresh_store(world, patience)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=patience,
            device_id=device if device.type == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=patience)
    except (dist.DistError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"rank {world.rank} of {world.size} did not meet the others at {where} within "
            f"{config.init_timeout_s:g} s ({reason}); check that every node runs the "
            "same command, reaches that host and port, and names its network with "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME if it has several"
        ) from error
    return replace(world, control=control, store=store), device


def _fresh_store(world: World, patience: timedelta) -> Store:
    """Return a store that all ranks share and that holds nothing yet.

    Processes that torchrun restarts find in its store what those before them wrote, such as
    addresses at which nobody listens any more. So rank 0 chooses a new name, and answers with it to
    the word that each rank has just chosen.
    """
    store, _, _ = next(rendezvous("env://", timeout=patience))
    word = secrets.token_hex(8)
    if not world.leads:
        store.set(f"fasttrain/{world.rank}", word)
        name = store.get(f"fasttrain/{word}").decode()
        store.add(f"{name}/met", 1)
        return PrefixStore(name, store)
    name = f"fasttrain/{word}"
    deadline = time.monotonic() + patience.total_seconds()
    while store.add(f"{name}/met", 0) < world.size - 1:
        for rank in range(1, world.size):
            if store.check([key := f"fasttrain/{rank}"]):
                store.set(f"fasttrain/{store.get(key).decode()}", name)
        if time.monotonic() > deadline:
            raise dist.DistStoreError("not all of them came")
        time.sleep(0.01)
    return PrefixStore(name, store)


def stop(world: World) -> None:
    """Leave the process groups."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def choose_mode(
    config: DistributedConfig, world: World, n_parameters: int, device: torch.device
) -> World:
    """Return the world with its mode and mesh; UserError if ``hsdp`` cannot divide the ranks."""
    if world.size == 1:
        return world
    mode, why = preferred_mode(config, world.local_size, n_parameters, device)
    mesh = {"shard": world.size}
    if mode == "hsdp":
        inner = config.shard_ranks or world.local_size
        if world.size % inner or inner < 2 or inner == world.size:
            raise UserError(
                f"distributed.mode = hsdp shards over {inner} ranks and replicates over the rest, "
                f"but there are {world.size}; set distributed.shard_ranks to a divisor between, or "
                "use distributed.mode=fsdp"
            )
        mesh = {"replicate": world.size // inner, "shard": inner}
    made = init_device_mesh(device.type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    return replace(world, mode=mode, why=why, mesh=made)


def preferred_mode(
    config: DistributedConfig, local_size: int, n_parameters: int, device: torch.device
) -> tuple[str, str]:
    """Return the mode, chosen by memory if it is ``auto``, and why; ranks share a CPU's memory."""
    if config.mode != "auto":
        return config.mode, f"distributed.mode = {config.mode}"
    need = DDP_BYTES_PER_PARAMETER * n_parameters
    if device.type == "cuda":
        memory = int(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_size
    fit = need <= DDP_PART_OF_MEMORY * memory
    mode, fits = ("ddp", "fit") if fit else ("fsdp", "do not fit")
    gib = f"{need / 2**30:.2f} GiB for parameters, gradients and optimizer state"
    return mode, f"{gib} {fits} beside activations in each rank's {memory / 2**30:.1f} GiB"
