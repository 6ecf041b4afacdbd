"""The memory that a training step needs, estimated; and its memory and time, measured.

The estimate allocates nothing. It runs forward and backward on fake tensors, which have shapes but
no data, and tracks every storage from allocation to release, so what autograd keeps is counted for
any option of the model. Formulas add what fake tensors cannot show: the optimizer's state, and
scratch memory inside the fused loss and Muon. The estimate is of eager execution; a compiled step
usually needs less.

    parameters   Σ numel · itemsize
    gradients    alive at the peak: none of this step's at the end of the first forward pass
    optimizer    `optim.state_bytes`: 8 bytes a parameter for AdamW, 4 for Muon
    activations  all else that is alive at the peak: kept for backward, and temporaries
    logits       one chunk of the fused loss: rows · vocabulary · itemsize (and the head, cast)
    buffers      tables of the model, batches on the device, matrices rounded once a step
    gathered     of sharded parameters: what is gathered of them, its gradients, and collectives

On several ranks it is the memory of one. DDP keeps all gradients in its buckets throughout. What
FSDP2 gathers and frees is torch's own code, run on fake tensors with collectives that send nothing.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from fasttrain_kernels._torch import TorchDispatchMode, fake_store, fake_tensors
from fasttrain_kernels.grad_norm import local_tensor
from fasttrain_kernels.linear_cross_entropy import chunk_rows, holds_all_logits
from torch import Tensor

from fasttrain.config import DistributedConfig, OptimConfig, TrainConfig, UserError
from fasttrain.config.keys import counted, divisors
from fasttrain.data.loader import Batch
from fasttrain.device import Precision
from fasttrain.distributed.sharding import set_gradient_sync, shard
from fasttrain.distributed.world import World, choose_mode
from fasttrain.engine.optim import build_optimizers, optimizer_tensors, state_bytes
from fasttrain.engine.step import TrainStep, default_criterion
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import resolve, step_shape

# Of the memory that is free: the rest is for evaluation, samples, snapshots and fragmentation.
USABLE = 0.9
# On a CPU more rows pay until the products are large: below this gain in tokens/s they only cost
# memory and cache.
LEAST_GAIN = 1.05
CPU_ROWS = 64  # no more of them are tried

# ---- estimated ---------------------------------------------------------------------------------


class StepMemory(NamedTuple):
    """Bytes that are held at the moment of a step when most are held."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """The sum over the categories."""
        return sum(self)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make; knows what was alive when most was.

    ``plain``: the loss is without z-loss and softcap. ``given``: what is there besides the model.
    """

    def __init__(self, model: Transformer, *given: Tensor, plain: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.parameters, self.plain = model, list(model.parameters()), plain
        held = map(local_tensor, (*self.parameters, *model.buffers(), *given))
        self.known = {id(tensor.untyped_storage()) for tensor in held}
        self.alive: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()
        # When most is held: bytes of all but gradients, of gradients, and of what the loss holds
        # inside, which the first counts too
        self.peak = (0, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = local_tensor(tensor).untyped_storage()
                if id(storage) not in self.known:
                    self.alive[id(storage)] = storage
        # Measured anew each time, as FSDP2 shrinks and grows storages that live on.
        held = sum(storage.nbytes() for storage in self.alive.values())
        is_loss = func._schema.name.endswith("::linear_cross_entropy_forward")
        scratch = _loss_scratch(args[0], args[1], plain=self.plain) if is_loss else 0
        if held + scratch > self.peak[0] + self.peak[1]:
            gradients = self.gradients()
            self.peak = (held + scratch - gradients, gradients, scratch)
        return out

    def gradients(self) -> int:
        """Return the bytes of the gradients that are there, of this rank's shards."""
        return sum(local_tensor(p.grad).nbytes for p in self.parameters if p.grad is not None)

    def sizes(self, config: OptimConfig, precision: Precision, n_ranks: int) -> tuple[int, ...]:
        """Return the bytes of parameters, gradients, optimizer state and an update's scratch."""
        parameters = sum(local_tensor(p).nbytes for p in self.parameters)
        optimizers = build_optimizers(self.model, config, precision.compute)
        # Only Muon's update holds anything beside its state.
        scratch = (getattr(o, "scratch_bytes", lambda _: 0)(n_ranks) for o in optimizers)
        state = sum(map(state_bytes, optimizers))
        return parameters, self.gradients(), state, max(scratch, default=0)


def _loss_scratch(hidden: Tensor, weight: Tensor, *, plain: bool) -> int:
    """Return what `linear_cross_entropy` holds inside: logits of a chunk, the head in its dtype.

    ``plain``: without z-loss and softcap, with which a small problem is never taken at once.
    """
    n_cols = weight.shape[0]
    if plain and holds_all_logits(hidden, weight, None):
        # In its backward pass log-softmax and two gradients of it; those of hidden states and head,
        # which the op that was traced returns, are not there yet.
        return 3 * hidden.shape[0] * n_cols * hidden.element_size() - weight.nbytes - hidden.nbytes
    rows = min(chunk_rows(hidden, n_cols, None), hidden.shape[0])
    narrow = hidden.element_size() < 4
    # A CPU does the softmax of narrow logits in fp32: their copy and the result.
    wide = 8 if narrow and hidden.device.type == "cpu" else 0
    cast = weight.numel() * hidden.element_size() if weight.dtype != hidden.dtype else 0
    return rows * n_cols * (hidden.element_size() + wide) + cast


def _trace(
    config: TrainConfig, rows: int, n_micro: int, precision: Precision, world: World | None = None
) -> _Trace:
    """Run forward and backward of a step on fake tensors; return what lived meanwhile."""
    world, seq_len = world or World(), config.data.seq_len
    criterion, device = default_criterion(config), torch.device(precision.device_type)
    with fake_tensors(), device:
        model = Transformer(config.model, seq_len=seq_len)
        shard(model, world, config.distributed)
        tokens = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)
        targets = torch.zeros_like(tokens)
        # On CUDA FlexAttention needs no mask of its own; a CPU takes one of (B, T, T).
        separate = not config.data.attention_across_documents and device.type == "cpu"
        doc_starts = torch.zeros_like(tokens, dtype=torch.bool) if separate else None
        plain = not (config.train.z_loss or config.model.logit_softcap)
        scale = torch.ones((), device=device)
        trace = _Trace(model, tokens, targets, scale, plain=plain)
        with trace:
            # With gradients accumulated, the second forward pass meets those of the first.
            for n_left in reversed(range(n_micro)):
                set_gradient_sync(model, world, sync=n_left == 0)
                with precision.autocast():
                    loss = criterion(model, tokens, targets, doc_starts, scale)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
    return trace


@contextmanager
def _pretended(config: DistributedConfig, n_ranks: int, mode: str) -> Iterator[World]:
    """Be rank 0 of ``n_ranks`` that are not there: collectives return at once and send nothing."""
    dist.init_process_group("fake", rank=0, world_size=n_ranks, store=fake_store())
    try:
        world = World(size=n_ranks, local_size=n_ranks, mode="auto")
        yield choose_mode(replace(config, mode=mode), world, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def estimate_memory(
    config: TrainConfig, *, device: torch.device, n_ranks: int = 1, mode: str = "single"
) -> StepMemory:
    """Estimate the memory of a training step of eager execution; nothing is allocated.

    The step of ``config``, whose vocabulary and micro-batch are set, is shared by ``n_ranks`` in
    ``mode``: single, ddp, fsdp or hsdp; the last two are refused in a process that has a process
    group. ``device`` decides which attention runs and how the loss is split.
    """
    seq_len = config.data.seq_len
    rows, n_micro, *_ = step_shape(config.train, seq_len, n_ranks)
    alone = resolve(config, device)
    precision = alone.precision
    # DDP's buckets hold all gradients from the first step on, as a second micro-batch finds them.
    n_alone = min(n_micro, 2) if mode == "single" else 2
    trace = _trace(config, rows, n_alone, precision)
    parameters, all_gradients, state, scratch = trace.sizes(config.optim, precision, 1)
    # Batches: of ids as stored those prefetched on the host, as int64 those of one whole step.
    buffers = sum(b.nbytes for b in trace.model.buffers())
    buffers += 16 * rows * n_micro * seq_len
    if device.type == "cpu":
        buffers += 4 * config.data.prefetch * rows * (seq_len + 1)
    gathered, (others, gradients, logits) = 0, trace.peak
    activations = others - logits
    if mode == "single" and alone.rounds_once:
        # Autocast, which is traced instead, holds as much until the backward pass.
        matrices = (p for p in trace.model.blocks.parameters() if p.ndim == 2)
        copies = precision.compute.itemsize * sum(p.numel() for p in matrices)
        activations, buffers = activations - copies, buffers + copies
        scratch = max(scratch, all_gradients - copies)  # of a micro-batch, before they are added
    if mode in ("fsdp", "hsdp"):
        # On a CPU: what is gathered and when does not depend on the device.
        precision = replace(precision, device_type="cpu")
        unsharded = _trace(config, rows, n_alone, precision)
        with _pretended(config.distributed, n_ranks, mode) as world:
            trace = _trace(config, rows, min(n_micro, 2), precision, world)
            held, all_gradients, _, scratch = trace.sizes(config.optim, precision, n_ranks)
        state, parameters = state * held // parameters, held
        others, gradients, _ = trace.peak
        gathered = max(0, others - unsharded.peak[0])
    if all_gradients + scratch > gradients + activations + logits + gathered:  # in the update
        gradients, activations, logits, gathered = all_gradients, scratch, 0, 0
    return StepMemory(parameters, gradients, state, activations, logits, buffers, gathered)


# ---- measured ----------------------------------------------------------------------------------


def measure_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return by how many bytes the memory held rises at most while ``run`` runs.

    On CUDA torch's allocator counts; on a CPU the profiler, also what operations allocate inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it announces itself on standard error
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(max(accumulate((change for _, change in changes), initial=0)))


def device_memory(device: torch.device) -> int:
    """Return the bytes that are free for a run: on the device, or within this process's limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
        # A container's limit; the word "max" stands for none.
        limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, int(text) - int(used.read_text()))
    return free


class Probe(NamedTuple):
    """What a step was measured to take; the first one compiles."""

    step_s: float
    peak_bytes: int
    first_s: float


def probe_step(config: TrainConfig, *, device: torch.device, memory: bool = True) -> Probe:
    """Run a few steps on random tokens and measure them; a step of many micro-batches by two.

    ``config`` has its vocabulary and micro-batch set. Measuring memory takes one more step.
    """
    seq_len = config.data.seq_len
    resolved = resolve(config, device)
    rows, n_micro, *_ = step_shape(config.train, seq_len)
    assert config.model.vocab_size is not None
    # By default fork_rng takes every GPU of the machine, and warns where there are several.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = Transformer(config.model, seq_len=seq_len).to(device)
        optimizers = build_optimizers(model, config.optim, resolved.precision.compute)
        step = TrainStep(model, optimizers, resolved)
        ids = torch.randint(config.model.vocab_size, (rows, seq_len + 1), device=device)
    starts = None
    if not config.data.attention_across_documents:
        starts = torch.zeros(rows, seq_len, dtype=torch.bool, device=device)
        starts[:, 0] = True
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), starts, rows)

    def timed(n: int) -> float:
        started = time.perf_counter()
        step([batch] * n, config.optim.peak_lr)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    first_s = timed(1)
    one = min(timed(1) for _ in range(2))
    # With accumulation: the update is paid once, each further micro-batch what it adds.
    step_s = one + (n_micro - 1) * max(timed(2) - one, 0.0) if n_micro > 1 else one
    peak = 0
    if memory:
        rises = measure_peak(lambda: step([batch] * min(n_micro, 2), config.optim.peak_lr), device)
        held = [*model.parameters(), *model.buffers(), batch.tokens, batch.targets]
        held += optimizer_tensors(model, optimizers).values()
        peak = rises + sum(tensor.nbytes for tensor in held)
    return Probe(step_s, peak, first_s)


def best_micro_batch(
    config: TrainConfig, n_ranks: int, device: torch.device, report: Callable[[str], object]
) -> int:
    """Return the number for ``train.micro_batch = "auto"``; UserError if none fits.

    On CUDA it is the largest divisor of a rank's rows whose estimate fits and whose probe runs; on
    a CPU the one beyond which tokens/s no longer grow. The loss does not depend on it.
    """
    free, seq_len = USABLE * device_memory(device), config.data.seq_len
    rows = step_shape(config.train, seq_len, n_ranks).samples // n_ranks
    loop = replace(config.train, tokens_per_step=rows * seq_len)

    def rows_per_s(size: int) -> float:
        run = replace(config.run, compile="off", fp8=False)  # fp8 must be compiled
        # One micro-batch is enough: in a step of many each takes the same.
        one = replace(loop, micro_batch=size, tokens_per_step=size * seq_len)
        tried = replace(config, run=run, train=one)
        return size / probe_step(tried, device=device, memory=False).step_s

    def fits(size: int) -> bool:
        sized = replace(config, train=replace(loop, micro_batch=size))
        return estimate_memory(sized, device=device).total <= free

    best, speed = None, 0.0
    if device.type == "cuda":
        for size in filter(fits, reversed(divisors(rows))):
            with suppress(torch.OutOfMemoryError):
                rows_per_s(size)
                best = size
                break
            # The error no longer holds the attempt's model, but reference cycles do.
            gc.collect()
            torch.cuda.empty_cache()
    else:
        for size in divisors(rows):
            if best is not None and size < 2 * best:
                continue  # too near for a gain to be told from noise
            if size > CPU_ROWS or not fits(size):
                break
            now = rows_per_s(size)
            if now < LEAST_GAIN * speed:
                break
            best, speed = size, now
    if best is None:
        raise UserError(
            f'train.micro_batch = "auto": one row of data.seq_len = {seq_len} needs '
            f"more than the {free / 2**20:,.0f} MiB that may be used on {device}; shrink the model "
            "or the sequence, or use a larger device"
        )
    chosen = f"{counted(best, 'sequence')}, {counted(rows // best, 'micro-batch')} per step"
    report(f'train.micro_batch = "auto": {chosen}')
    return best
