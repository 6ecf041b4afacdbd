"""The command line: ``python -m fasttrain.preflight CONFIG.toml [section.key=value …]``.

What a run will take, before it takes it: parameters, FLOPs, memory by category, tokens, time; and
what will hurt it. ``--diagnose`` runs the checklist of `fasttrain.diagnosis` on the first batch,
``--kernels`` tries each fused operation on this device. Nothing is written but the caches.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fasttrain.config import TrainConfig, UserError, load_config

if TYPE_CHECKING:
    import torch

    from fasttrain.data.dataset import TokenDataset
    from fasttrain.memory import StepMemory

__all__ = ["main", "preflight", "warnings_of"]

EXIT_FOUND_FAULTS, EXIT_BAD_INPUT = 1, 2
# Hoffmann et al. 2022 (arXiv:2203.15556): about 20 tokens a parameter are best for the compute
# spent. Muennighoff et al. 2023 (arXiv:2305.16264): up to 4 epochs are almost as good as new text.
BEST_TOKENS, FEW_TOKENS, MANY_EPOCHS = 20.0, 5.0, 4.0
LONG_RUN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a run: what follows from config and data alone.

    Attributes:
        parameters: of the model, tied ones once.
        matmul_parameters: of these, in matrix products.
        flops_per_token: forward and backward.
        tokens_per_step: of one optimizer step.
        steps: None where ``train.hours`` decides.
        epochs: passes over the training split, None likewise.
    """

    parameters: int
    matmul_parameters: int
    flops_per_token: float
    tokens_per_step: int
    steps: int | None
    epochs: float | None

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run."""
        return None if self.steps is None else self.steps * self.tokens_per_step


def _plan(config: TrainConfig, train: "TokenDataset") -> Plan:
    import torch

    from fasttrain import metrics
    from fasttrain.model import Transformer, flops_constants

    with torch.device("meta"):
        model = Transformer(config.model, seq_len=config.data.seq_len)
    loop, seq_len = config.train, config.data.seq_len
    per_step = loop.tokens_per_step or loop.micro_batch * seq_len
    samples = (train.n_tokens - 1) // seq_len
    steps = loop.steps
    if loop.tokens is not None:
        steps = math.ceil(loop.tokens / per_step)
    elif loop.epochs is not None:
        steps = math.ceil(math.ceil(loop.epochs * samples) * seq_len / per_step)
    return Plan(
        parameters=model.num_parameters(),
        matmul_parameters=model.num_matmul_parameters(),
        flops_per_token=metrics.flops_per_token(**flops_constants(model), seq_len=seq_len),
        tokens_per_step=per_step,
        steps=steps,
        epochs=None if steps is None else steps * per_step / train.n_tokens,
    )


# ---- what will hurt ------------------------------------------------------------------------------


def warnings_of(
    config: TrainConfig,
    plan: Plan,
    train: "TokenDataset",
    *,
    device: "torch.device",
    dtype: str,
    seconds: float | None = None,
) -> Iterator[str]:
    """Yield what will hurt the run, each with the remedy.

    Args:
        config: the configuration with its vocabulary settled.
        plan: the size of the run.
        train: the training split.
        device: where it will run.
        dtype: of the matrix products, as `fasttrain.device.Precision` names it.
        seconds: how long the run will take, where known.
    """
    model, seq_len, steps = config.model, config.data.seq_len, plan.steps
    assert model.vocab_size is not None
    if model.vocab_size % 64:
        better = -(-model.vocab_size // 64) * 64
        yield (
            f"model.vocab_size = {model.vocab_size} is not a multiple of 64, which slows the head "
            f"on tensor cores; set {better}"
        )
    head_dim = model.head_dim or model.dim // model.n_heads
    if device.type == "cuda" and (model.dim % 64 or head_dim % 8):
        yield (
            f"model.dim = {model.dim} and head_dim = {head_dim}: tensor cores and flash attention "
            "want multiples of 64 and of 8"
        )
    if device.type == "cuda" and dtype == "fp32":
        yield "run.dtype = fp32 leaves the tensor cores idle; use bf16, fp16 or tf32"
    if plan.tokens is not None and plan.tokens < FEW_TOKENS * plan.matmul_parameters:
        share = plan.tokens / plan.matmul_parameters
        yield (
            f"{share:.2g} tokens for each parameter in matrix products, and about "
            f"{BEST_TOKENS:.0f} make the best of the compute: a smaller model will end better, or "
            "train for longer"
        )
    if plan.epochs is not None and plan.epochs > MANY_EPOCHS:
        yield (
            f"{plan.epochs:.1f} epochs: beyond {MANY_EPOCHS:.0f} repeated text teaches less and "
            "less; add text, or watch the validation loss"
        )
    warmup = config.schedule.warmup_steps
    if steps is not None and warmup >= steps:
        yield (
            f"schedule.warmup_steps = {warmup} is longer than the run of {steps} steps: the peak "
            "learning rate is never reached; lower it"
        )
    elif steps is not None and warmup > 0.2 * steps:
        yield f"schedule.warmup_steps = {warmup} is more than a fifth of the {steps} steps"
    if steps is not None:
        for name in ("eval.every_steps", "checkpoint.every_steps", "log.every_steps"):
            section, _, key = name.partition(".")
            every = getattr(getattr(config, section), key)
            if every is not None and every > steps:
                yield f"{name} = {every} is longer than the run of {steps} steps: only at its end"
    if config.checkpoint.every_steps is None and (seconds or 0.0) > LONG_RUN_S:
        yield (
            "checkpoint.every_steps is unset: a crash loses the whole run; set it to some minutes' "
            "worth of steps"
        )
    if train.n_documents:
        mean = train.n_tokens / train.n_documents
        if mean < seq_len / 2 and config.data.attention_across_documents:
            yield (
                f"data.seq_len = {seq_len} is longer than the documents, {mean:.0f} tokens on "
                "average: most of what is attended to is another text; shorten it, or set "
                "data.attention_across_documents=false"
            )
    window = model.sliding_window_tokens
    if window is not None and window >= seq_len:
        yield f"model.sliding_window_tokens = {window} has no effect below data.seq_len = {seq_len}"
    if train.max_token >= model.vocab_size:
        yield f"the data hold token {train.max_token}, model.vocab_size is {model.vocab_size}"


# ---- what a person sees --------------------------------------------------------------------------


def _memory_lines(memory: "StepMemory", free: int, peak: int | None) -> Iterator[str]:
    for f in fields(memory):
        yield f"    {f.name:<12} {_size(getattr(memory, f.name)):>10}"
    yield f"    {'total':<12} {_size(memory.total):>10}  of {_size(free)} free"
    if peak is not None:
        yield f"    {'measured':<12} {_size(peak):>10}"


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def preflight(
    config: TrainConfig, *, probe: bool = True, show: Callable[[str], None] = print
) -> bool:
    """Show what a run will take and what will hurt it.

    Args:
        config: the configuration as loaded.
        probe: run a few steps to measure time and memory.
        show: takes each line.

    Returns:
        Whether it fits into the memory that is free.

    Raises:
        UserError: something is missing or does not fit together.
    """
    import torch

    from fasttrain import metrics
    from fasttrain.data.files import cache_folder
    from fasttrain.device import keep_compiled, resolve_compile, resolve_device, resolve_precision
    from fasttrain.loggers import format_count, format_duration
    from fasttrain.memory import device_memory, estimate_memory
    from fasttrain.probe import probe_step, settle_micro_batch
    from fasttrain.session import open_splits

    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.dtype, device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    keep_compiled(
        cache_folder(Path(config.data.cache_dir) if config.data.cache_dir else None) / "compiled"
    )
    config, train, val = open_splits(config, show)
    config = settle_micro_batch(config, device=device, precision=precision, report=show)
    plan = _plan(config, train)
    rows, seq_len = config.train.micro_batch, config.data.seq_len
    n_micro = plan.tokens_per_step // (rows * seq_len)
    show(
        f"model        {plan.parameters:,} parameters, {plan.matmul_parameters:,} in matrix "
        f"products; {format_count(plan.flops_per_token)} FLOPs a token"
    )
    show(
        f"data         {train.n_tokens:,} tokens to train on, {val.n_tokens:,} to validate; "
        f"vocabulary {config.model.vocab_size:,}"
    )
    show(f"step         {plan.tokens_per_step:,} tokens: {n_micro} × {rows} rows × {seq_len}")
    if plan.tokens is not None:
        show(
            f"run          {plan.steps:,} steps, {format_count(plan.tokens)} tokens, "
            f"{plan.epochs:.2f} epochs, {plan.tokens * plan.flops_per_token:.3g} FLOPs"
        )
    else:
        show(f"run          {config.train.hours} h")

    memory = estimate_memory(config, rows, device=device, precision=precision)
    free = device_memory(device)
    fits = memory.total <= free
    mode = resolve_compile(config.run, device, config.model.n_layers)
    probed = probe_step(config, device=device, precision=precision) if probe and fits else None
    show(f"memory       of an eager step on {device}, {precision.name}, at its peak:")
    for line in _memory_lines(memory, free, probed.peak_bytes if probed else None):
        show(line)
    seconds = None
    if probed:
        tokens_per_s = plan.tokens_per_step / probed.step_s
        peak = metrics.peak_flops(device, precision.name)
        share = metrics.mfu(tokens_per_s, plan.flops_per_token, peak)
        mfu = "n/a" if share is None else f"{share:.1%}"
        show(
            f"speed        {tokens_per_s:,.0f} tokens/s, {1000 * probed.step_s:,.0f} ms a step, "
            f"MFU {mfu} (compile {mode}, first step {probed.first_s:.1f} s)"
        )
        if plan.steps is not None:
            seconds = plan.steps * probed.step_s
            show(f"time         {format_duration(seconds)} of steps, without evaluation and saves")
    for line in warnings_of(
        config, plan, train, device=device, dtype=precision.name, seconds=seconds
    ):
        show(f"warning      {line}")
    if not fits:
        show(
            f"error        it does not fit: {_size(memory.total)} of {_size(free)}; lower "
            "train.micro_batch (the loss stays the same with train.tokens_per_step set), or "
            'set it to "auto"'
        )
    return fits


def diagnose_run(config: TrainConfig, *, show: Callable[[str], None] = print) -> bool:
    """Run the checklist on the first batch of a run; return whether no line fails."""
    import torch

    from fasttrain.data.loader import Loader
    from fasttrain.device import resolve_device, resolve_precision
    from fasttrain.diagnosis import diagnose
    from fasttrain.model import Transformer
    from fasttrain.optim import build_optimizers
    from fasttrain.schedule import lr_at
    from fasttrain.session import open_splits

    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.dtype, device)
    config, train, _ = open_splits(config, show)
    plan = _plan(replace(config, train=replace(config.train, micro_batch=1)), train)
    torch.manual_seed(config.run.seed)
    model = Transformer(config.model, seq_len=config.data.seq_len).to(device)
    optimizers = build_optimizers(model, config.optim)
    # The highest rate of the run: a warmup may well begin at almost nothing.
    total = plan.steps or 10**12
    rate = lr_at(
        min(config.schedule.warmup_steps, total - 1), total, config.schedule, config.optim.lr
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
    with Loader(
        train, seq_len=config.data.seq_len, micro_batch=2, seed=config.run.seed, device=device
    ) as loader:
        batch = next(loader)
    with precision.autocast():
        report = diagnose(model, batch, optimizer=optimizers)
    show(str(report))
    return not report.failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fasttrain.preflight",
        description="Tell what a run takes before it takes it, and what will hurt it.",
    )
    parser.add_argument("config", type=Path, nargs="?", help="TOML file, such as configs/base.toml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values in place of the file's"
    )
    parser.add_argument(
        "--no-probe", action="store_true", help="do not run a step: no time, no measured memory"
    )
    parser.add_argument(
        "--diagnose",
        action="store_true",
        help="run the checklist for a loss that does not fall, on the first batch",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="check each fused operation on this device and time its paths; takes no config",
    )
    parser.add_argument(
        "--device", default="auto", help="device of --kernels: auto, cpu, cuda or cuda:N"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when all is well, 1 when not, 2 on bad input."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.kernels:
            from fasttrain.kernel_check import show_kernels

            return 0 if show_kernels(arguments.device) else EXIT_FOUND_FAULTS
        if arguments.config is None:
            parser.error("give a config file, or --kernels")
        config = load_config(arguments.config, arguments.overrides)
        if arguments.diagnose:
            return 0 if diagnose_run(config) else EXIT_FOUND_FAULTS
        return 0 if preflight(config, probe=not arguments.no_probe) else EXIT_FOUND_FAULTS
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
