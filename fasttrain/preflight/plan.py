"""What a run will take: parameters, FLOPs, tokens, memory by category, time; and what will hurt it.

Where the data are missing, a line says how to get them, and the rest is shown.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from fasttrain.config import TrainConfig, counted
from fasttrain.data.format import absent
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.device import resolve_device
from fasttrain.distributed.world import preferred_mode
from fasttrain.engine.optim import build_optimizers, set_lr
from fasttrain.engine.run_size import RunSize, warnings_at_start
from fasttrain.log import metrics
from fasttrain.log.console import format_duration
from fasttrain.model.transformer import Transformer
from fasttrain.preflight.diagnosis import diagnose
from fasttrain.preflight.memory import best_micro_batch, device_memory, estimate_memory, probe_step
from fasttrain.printing import say
from fasttrain.resolve import apply, apply_numerics, resolve, step_shape
from fasttrain.run.ending import describe
from fasttrain.run.setup import data_paths, open_splits

CPU_FLOPS = 1e13  # of a step: minutes on a CPU, which nobody waits for
FP32 = 4
BACKWARD_SHARE = 2 / 3  # of a step without accumulation
# Hoffmann et al. 2022 (arXiv:2203.15556): about 20 tokens a parameter are best for the compute
# spent. Muennighoff et al. 2023 (arXiv:2305.16264): up to 4 epochs are almost as good as new text.
# A first run of base.toml, of some minutes, has 2.6 tokens a parameter and needs no warning.
BEST_TOKENS, FEW_TOKENS, MANY_EPOCHS = 20.0, 2.5, 4.0
LONG_RUN_S = 3600.0


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def preflight(
    config: TrainConfig, *, probe: bool = True, n_ranks: int = 1, gbps: float | None = None
) -> bool:
    """Show what a run will take and what will hurt it; return whether it fits into the free memory.

    ``n_ranks`` processes share each step, on devices like this one, and each can send ``gbps``
    gigabits a second (None: not known). ``probe``: measure a few steps of one.
    """

    def tell(label: str, *texts: str) -> None:
        for text in texts:
            say(f"{label:<12} {text}")

    device = resolve_device(config.run.device)
    resolved = resolve(config, device)
    precision = resolved.precision
    apply(resolved)

    # The data, the micro-batch and the size of the run.
    vocab_size = config.model.vocab_size
    missing = [line for path in data_paths(config) if (line := absent(path, vocab_size))]
    train = val = None
    if not missing or vocab_size is None:  # a model needs one of the two
        config, train, val = open_splits(config, say)
    seq_len, loop = config.data.seq_len, config.train
    if isinstance(loop.micro_batch, str):
        best = best_micro_batch(config, n_ranks, device, report=say)
        loop = replace(loop, micro_batch=best)
    rows, n_micro, *_ = step_shape(loop, seq_len, n_ranks)
    config = replace(config, train=replace(loop, micro_batch=rows))
    share = replace(config.train, tokens_per_step=rows * n_micro * seq_len)
    alone = replace(config, train=share)  # what one rank does
    with torch.device("meta"):
        model = Transformer(config.model, seq_len=seq_len)
    run_size = RunSize(config, model, train, val, n_ranks)
    tell("data", *missing)
    for label, text in describe(run_size).items():
        tell(label, text)

    # Memory, and a few steps where it suffices.
    local = min(n_ranks, torch.cuda.device_count()) if device.type == "cuda" else n_ranks
    mode = "single"
    if n_ranks > 1:
        mode, why = preferred_mode(config.distributed, local, model.num_parameters(), device)
        tell("ranks", f"{n_ranks}, {mode}: {why}")
        if mode == "hsdp" and config.distributed.shard_ranks is None:
            config = replace(config, distributed=replace(config.distributed, shard_ranks=local))
    memory = estimate_memory(config, device=device, n_ranks=n_ranks, mode=mode)
    free = device_memory(device) // (1 if device.type == "cuda" else local)
    fits = memory.total <= free
    runs = probe and fits
    if runs and mode in ("fsdp", "hsdp"):  # the probe is not sharded
        runs = estimate_memory(alone, device=device).total <= free
    flops = model.flops_per_token() * run_size.shape.tokens / n_ranks
    if runs and device.type == "cpu" and flops > CPU_FLOPS:
        runs = False
        tell("speed", f"not measured: a step of {flops:.3g} FLOPs takes minutes on a CPU")
    if runs:
        say("measuring a few steps … (skip this with --no-probe)")
    probed = probe_step(alone, device=device) if runs else None
    whose = "step and rank" if n_ranks > 1 else "step"
    tell("memory", f"peak of an eager {whose} on {device} in {precision.name}:")
    for name, size in memory._asdict().items():
        if size or name != "gathered":  # which one process and DDP do without
            freed = "  (freed before the peak)" if name == "gradients" and not size else ""
            say(f"    {name:<12} {_size(size) if size else '0':>10}{freed}")
    say(f"    {'total':<12} {_size(memory.total):>10}  of {_size(free)} free")
    if probed and n_ranks == 1:
        say(f"    {'measured':<12} {_size(probed.peak_bytes):>10}")

    # Communication and speed.
    if n_ranks > 1:
        given: dict[str, Any] = {"mode": mode, "n_micro": n_micro}
        sent = traffic(config, model, n_ranks=n_ranks, width=precision.compute.itemsize, **given)
        step_s = probed.step_s if probed else None
        say("\n".join(scaling_lines(sent, step_s, gbps=gbps, **given)))
    seconds = None
    if probed:
        tokens_per_s = run_size.shape.tokens / probed.step_s
        peak = metrics.peak_flops(device, precision.name)
        used = metrics.mfu(tokens_per_s / n_ranks, model.flops_per_token(), peak)
        mfu = "n/a" if used is None else f"{used:.1%}"
        on_all = " on all" if n_ranks > 1 else ""
        speed = f"{tokens_per_s:,.0f} tokens/s{on_all}, {1000 * probed.step_s:,.0f} ms"
        first = f"compile {resolved.compile_mode}, first step {probed.first_s:.1f} s"
        tell("speed", f"{speed} a step, MFU {mfu} ({first})")
        if run_size.steps is not None:
            seconds = run_size.steps * probed.step_s
            tell("time", f"{format_duration(seconds)} of steps, without evaluation and saves")

    # Warnings.
    hurts = warnings_of(run_size, device=device, dtype=precision.name, seconds=seconds)
    tell("warning", *warnings_at_start(run_size), *hurts)
    if not fits:
        remedy = "lower train.micro_batch (the loss stays the same with train.tokens_per_step set)"
        remedy += ', or set it to "auto"'
        tell("error", f"it does not fit: {_size(memory.total)} of {_size(free)}; {remedy}")
    return fits


def warnings_of(
    run_size: RunSize, *, device: torch.device, dtype: str, seconds: float | None = None
) -> Iterator[str]:
    """Yield what will hurt the run, each with the remedy.

    The vocabulary of its config is set; ``dtype`` is a name of `fasttrain.device.Precision`;
    ``seconds`` is how long the run will take, where that is known.
    """
    config, train = run_size.config, run_size.train
    model, seq_len, warmup = config.model, config.data.seq_len, config.schedule.warmup_steps
    assert model.vocab_size is not None
    cuda = device.type == "cuda"
    head_dim = model.head_dim or model.dim // model.n_heads
    window = model.sliding_window_tokens
    # What is not known is no reason to warn.
    steps = math.inf if run_size.steps is None else run_size.steps
    n_steps = counted(run_size.steps or 0, "step")
    tokens_per_parameter = math.inf
    if run_size.tokens is not None:
        tokens_per_parameter = run_size.tokens / run_size.model.num_matmul_parameters()
    mean_document = math.inf
    if train is not None:
        mean_document = train.n_tokens / (train.n_documents or 1)

    if model.vocab_size % 64:
        yield (
            f"model.vocab_size = {model.vocab_size} is not a multiple of 64, which slows the head "
            f"on tensor cores; set {-(-model.vocab_size // 64) * 64}"
        )
    if cuda and (model.dim % 64 or head_dim % 8):
        yield (
            f"model.dim = {model.dim} and head_dim = {head_dim}: tensor cores and flash attention "
            "want multiples of 64 and of 8"
        )
    if cuda and dtype == "fp32":
        yield "run.dtype = fp32 leaves the tensor cores idle; use bf16, fp16 or tf32"
    if tokens_per_parameter < FEW_TOKENS:
        yield (
            f"{tokens_per_parameter:.2g} tokens per matrix parameter; about {BEST_TOKENS:.0f} is "
            "compute-optimal: use a smaller model, or train for longer"
        )
    if (run_size.epochs or 0.0) > MANY_EPOCHS:
        yield (
            f"{run_size.epochs:.1f} epochs: after {MANY_EPOCHS:.0f}, repeated text teaches less "
            "and less; add text, or watch the validation loss"
        )
    if warmup >= steps:
        yield (
            f"schedule.warmup_steps = {warmup} is longer than the run of {n_steps}: the peak "
            "learning rate is never reached; lower it"
        )
    elif warmup > 0.2 * steps:
        yield f"schedule.warmup_steps = {warmup} is more than a fifth of the {n_steps}"
    for section in ("eval", "checkpoint", "log"):
        every_steps = getattr(config, section).every_steps or 0
        if every_steps > steps:
            yield (
                f"{section}.every_steps = {every_steps} is longer than the run of {n_steps}: only "
                "at its end"
            )
    if config.checkpoint.every_steps is None and (seconds or 0.0) > LONG_RUN_S:
        yield (
            "checkpoint.every_steps is unset: a crash loses the whole run; set it to some minutes' "
            "worth of steps"
        )
    if mean_document < seq_len / 2 and config.data.attention_across_documents:
        yield (
            f"data.seq_len = {seq_len} is longer than the documents, {mean_document:.0f} tokens on "
            "average: most of what is attended to is another text; shorten it, or set "
            "data.attention_across_documents=false"
        )
    if window is not None and window >= seq_len:
        yield f"model.sliding_window_tokens = {window} has no effect below data.seq_len = {seq_len}"


def diagnose_run(config: TrainConfig) -> bool:
    """Run the checklist on the first batch of a run; return whether no line fails."""
    device = resolve_device(config.run.device)
    resolved = resolve(config, device)
    precision = resolved.precision
    apply_numerics(resolved)
    config, train, _ = open_splits(config, say)
    torch.manual_seed(config.run.seed)
    model = Transformer(config.model, seq_len=config.data.seq_len).to(device)
    optimizers = build_optimizers(model, config.optim, precision.compute)
    for optimizer in optimizers:  # the highest rate: a warmup may begin close to zero
        set_lr(optimizer, config.optim.peak_lr)
    options = LoaderOptions(seq_len=config.data.seq_len, micro_batch=2, seed=config.run.seed)
    with Loader(train, options, device=device) as loader:
        batch = next(loader)
    with precision.autocast():
        report = diagnose(model, (batch.tokens, batch.targets), optimizer=optimizers)
    say(str(report))
    return not report.failed


def traffic(
    config: TrainConfig, model: Transformer, *, mode: str, n_ranks: int, n_micro: int, width: int
) -> dict[str, float]:
    """Return by kind the bytes that a rank sends in a step of ``n_micro`` micro-batches.

    They are those of ring algorithms over N ranks, the fewest possible: a reduce-scatter and an
    all-gather of S bytes send S·(N − 1)/N each, an all-reduce is one after the other. DDP
    all-reduces the fp32 gradients once a step. FSDP gathers the parameters in fp32 for each
    micro-batch: all of them for the forward pass and, with ``distributed.reshard_after_forward``,
    those of the blocks again for the backward pass; it reduce-scatters the fp32 gradients once a
    step. HSDP all-reduces these shards over the copies. Muon gathers its matrices, in ``width``
    bytes a number, and scatters the updates. ``mode`` is ddp, fsdp or hsdp.

    Sources: Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce Algorithms for Clusters of
    Workstations (JPDC 69); Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054).
    """

    def ring(n: int) -> float:
        return (n - 1) / n

    total = sum(p.numel() for p in model.parameters())
    if mode == "ddp":
        return {"all-reduce": 2 * ring(n_ranks) * FP32 * total}
    # Of HSDP so many ranks share one copy of the parameters.
    inner = (config.distributed.shard_ranks if mode == "hsdp" else None) or n_ranks
    in_blocks = sum(p.numel() for p in model.blocks.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    again = in_blocks if config.distributed.reshard_after_forward else 0
    shards = 2 * ring(inner) * width * matrices / inner
    return {
        "all-gather": n_micro * ring(inner) * FP32 * (total + again),
        "reduce-scatter": ring(inner) * FP32 * total,
        "all-reduce": 2 * ring(n_ranks // inner) * FP32 * total / inner,
        "muon": shards if config.optim.name == "muon" else 0.0,
    }


def scaling_lines(
    sent: Mapping[str, float], step_s: float | None, *, mode: str, n_micro: int, gbps: float | None
) -> Iterator[str]:
    """Yield lines that tell what sending costs a step that takes ``step_s`` without it.

    Seconds without latencies, and the shares of the utilisation that are lost: where it overlaps
    with all computation that it can, the last micro-batch's backward pass for DDP and all for FSDP,
    and where it overlaps with none. ``step_s`` and ``gbps``: None where not known.
    """
    kinds = ", ".join(f"{kind} {n / 2**20:,.1f} MiB" for kind, n in sent.items() if n)
    yield f"sent         by each rank in a step: {kinds}"
    if gbps is None:
        yield "             --bandwidth-gbps tells how long that takes"
        return
    sending_s = 8 * sum(sent.values()) / (1e9 * gbps)
    line = f"             {1000 * sending_s:,.1f} ms at {gbps:g} Gbit/s"
    if step_s is not None:
        left_s = max(0.0, sending_s - step_s * (BACKWARD_SHARE / n_micro if mode == "ddp" else 1.0))
        hidden, exposed = (s / (step_s + s) for s in (left_s, sending_s))
        line += (
            f" of a step of {1000 * step_s:,.1f} ms: {hidden:.1%} of the MFU lost where it "
            f"overlaps with computation, {exposed:.1%} where it does not"
        )
    yield line
