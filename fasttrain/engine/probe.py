"""One step tried out: how long it takes and what it holds; and the micro-batch found by that.

Legend: B micro-batch rows, T sequence.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fasttrain.config import TrainConfig, UserError
from fasttrain.config.keys import counted, divisors
from fasttrain.data.loader import Batch
from fasttrain.device import Precision
from fasttrain.engine.memory import device_memory, estimate_memory, measure_peak, release_memory
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.schedule import step_shape
from fasttrain.engine.step import TrainStep
from fasttrain.model.transformer import Transformer

__all__ = ["Probe", "probe_step", "settle_micro_batch"]

# Of the memory that is free: the rest is for evaluation, samples, snapshots and fragmentation.
USABLE = 0.9
# On a CPU more rows pay until the products are large: below this gain in tokens/s they only cost
# memory and cache.
LEAST_GAIN = 1.05
CPU_ROWS = 64  # no more of them are tried
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Probe:
    """What a step was seen to take: seconds, bytes held at most, and of the first one seconds."""

    step_s: float
    peak_bytes: int
    first_s: float


def probe_step(
    config: TrainConfig, *, device: torch.device, precision: Precision, memory: bool = True
) -> Probe:
    """Run a few steps on random tokens and measure them; a step of many micro-batches by two.

    Args:
        config: the configuration with ``model.vocab_size`` and ``train.micro_batch`` settled; it
            compiles as ``run.compile`` says.
        device: where.
        precision: of the matrix products.
        memory: whether to measure the memory too, which on a CPU takes one more, slower step.
    """
    seq_len = config.data.seq_len
    rows, n_micro = step_shape(config.train, seq_len)
    assert config.model.vocab_size is not None
    # By default it takes every GPU of the machine, and warns where there are several.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = Transformer(config.model, seq_len=seq_len).to(device)
        optimizers = build_optimizers(model, config.optim, precision.compute)
        step = TrainStep(model, optimizers, config, device=device, precision=precision)
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
        for optimizer in optimizers:
            for state in optimizer.state.values():
                held += [value for value in state.values() if isinstance(value, torch.Tensor)]
        peak = rises + sum(tensor.nbytes for tensor in held)
    return Probe(step_s, peak, first_s)


def settle_micro_batch(
    config: TrainConfig,
    *,
    device: torch.device,
    precision: Precision,
    world_size: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> TrainConfig:
    """Return ``config`` with a number for ``train.micro_batch = "auto"``.

    On CUDA it is the largest divisor of the step's rows whose estimate fits and whose probe runs;
    on a CPU the one beyond which tokens/s no longer grow. The loss does not depend on it.

    Raises:
        UserError: not even one row fits.
    """
    loop = config.train
    if not isinstance(loop.micro_batch, str):
        return config
    free = USABLE * device_memory(device)
    rows = step_shape(loop, config.data.seq_len, world_size).samples

    def tried(size: int) -> TrainConfig:
        run = replace(config.run, compile="off", fp8=False)  # which wants to be compiled
        # One micro-batch is enough: of a step of many each takes the same.
        settled = replace(loop, micro_batch=size, tokens_per_step=size * config.data.seq_len)
        return replace(config, run=run, train=settled)

    def fits(size: int) -> bool:
        held = estimate_memory(
            replace(config, train=replace(loop, micro_batch=size)),
            size,
            device=device,
            precision=precision,
        )
        return held.total <= free

    best: int | None = None
    if device.type == "cuda":
        for size in reversed([n for n in divisors(rows) if fits(n)]):
            try:
                probe_step(tried(size), device=device, precision=precision, memory=False)
                best = size
                break
            except torch.OutOfMemoryError:
                pass
            release_memory()  # of the model of the attempt, which the error no longer holds
    else:
        speed = 0.0
        for size in divisors(rows):
            if best is not None and size < 2 * best:
                continue  # too near for a gain to be told from noise
            if size > CPU_ROWS or not fits(size):
                break
            probed = probe_step(tried(size), device=device, precision=precision, memory=False)
            now = size / probed.step_s
            if best is not None and now < LEAST_GAIN * speed:
                break
            best, speed = size, now
    if best is None:
        raise UserError(
            f'train.micro_batch = "auto": one row of data.seq_len = {config.data.seq_len} needs '
            f"more than the {free / MIB:,.0f} MiB that may be used on {device}; shrink the model "
            "or the sequence, or use a larger device"
        )
    found = f"{counted(best, 'row')}, {counted(rows // best, 'micro-batch')} a step"
    report(f'train.micro_batch = "auto": {found}')
    return replace(config, train=replace(loop, micro_batch=best))
