"""What a config means on this machine: every setting that is left open, decided once.

`resolve` decides and changes nothing; what does not go together is refused here. `apply` changes
the process as the config says. Below the setup of a run nothing decides again: it is handed a
`Resolved`.
"""

import os
import shutil
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fasttrain_kernels.cpu import compiler, computes_in, is_supported
from fasttrain_kernels.cpu.blocks import KINDS

from fasttrain.command import usable_cores
from fasttrain.config import TrainConfig, UserError, refuse
from fasttrain.config.schema import LoopConfig
from fasttrain.device import (
    Precision,
    keep_freed_memory,
    prefer_attention_kernel,
    resolve_attention,
    resolve_precision,
    set_matmul_precision,
    set_threads,
)
from fasttrain.distributed.world import World
from fasttrain.model.compiled import keep_compiled
from fasttrain.storage import cache_folder

# One graph compiles for longer than one block, and its steps are some 10 % shorter.
MAX_LAYERS_OF_ONE_CPU_GRAPH = 6


class StepShape(NamedTuple):
    """The size of a step."""

    rows: int  # sequences of a micro-batch
    n_micro: int  # micro-batches on each rank
    samples: int  # sequences of all ranks
    tokens: int  # of all ranks


def step_shape(loop: LoopConfig, seq_len: int, n_ranks: int = 1) -> StepShape:
    """Return how each of ``n_ranks`` makes a step of ``train.tokens_per_step``.

    Each rank rounds its share to whole sequences. Its micro-batch is the largest divisor of their
    number up to ``train.micro_batch`` (``auto``: no limit). The loss does not depend on this split.
    """
    rows, unit = loop.micro_batch, seq_len * n_ranks
    rank_samples = rows
    if loop.tokens_per_step is not None:
        rank_samples = max((loop.tokens_per_step + unit // 2) // unit, 1)
        most = rank_samples if isinstance(rows, str) else min(rows, rank_samples)
        rows = next(n for n in range(most, 0, -1) if rank_samples % n == 0)
    return StepShape(rows, rank_samples // rows, rank_samples * n_ranks, rank_samples * unit)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings of a run, decided for its device and its ranks.

    Attributes:
        config: As given; ``auto`` in it stands for what the other fields say.
        device: Where this rank computes.
        world: The ranks, and how they share a model.
        precision: Of matrix products.
        compile_mode: How forward and backward run: ``off``; ``c++``, blocks written in C++;
            ``blocks``, one compiled block for all; or a mode of ``run.compile``, one graph.
        attention: The kernel of SDPA that is tried first; None on a CPU.
        shape: The size of a step; None for a model of the user's own.
        why_not_cpp: Why the blocks in C++ are not used on this CPU. None if they are, or if
            ``run.compile`` does not ask for them.
        rounds_once: Whether the matrices of the blocks are cast to half precision once a step, and
            all of its micro-batches use these copies.
    """

    config: TrainConfig
    device: torch.device
    world: World
    precision: Precision
    compile_mode: str
    attention: str | None
    shape: StepShape | None
    why_not_cpp: str | None
    rounds_once: bool


def resolve(config: TrainConfig, device: torch.device, world: World | None = None) -> Resolved:
    """Decide what ``config`` leaves open, for our Transformer; nothing is changed.

    Args:
        config: The settings; ``train.micro_batch`` may be ``auto`` only where no step is made.
        device: What `fasttrain.device.resolve_device` returned.
        world: The ranks, whose mode is chosen. Default: this process alone.

    Raises:
        UserError: Settings do not go together, or the machine lacks what one needs.
    """
    world = world or World()
    run = config.run
    precision = resolve_precision(run.dtype, device)
    mode = resolve_compile(config, device)
    shape = step_shape(config.train, config.data.seq_len, world.size)
    _refuse_accumulation_in_graphs(mode, shape, world)
    _refuse_sharded(config, world, one_graph=mode == "cuda-graphs", remedy="auto")
    if world.sharded and mode not in ("off", "c++"):
        mode = "blocks"  # a graph of everything cannot gather what it needs
    rounds_once = (
        world.size == 1
        and shape.n_micro > 1
        and device.type == "cuda"
        and mode in ("default", "max-autotune-no-cudagraphs")
        and precision.compute.itemsize == 2
        and not run.fp8  # it would round a second time
        and config.train.activation_checkpointing == "none"  # copies would use what it saves
    )
    asks_for_cpp = device.type == "cpu" and run.compile in ("auto", "c++")
    return Resolved(
        config=config,
        device=device,
        world=world,
        precision=precision,
        compile_mode=mode,
        attention=resolve_attention(run.attention, device, deterministic=run.deterministic),
        shape=shape,
        why_not_cpp=why_unfit(config) if asks_for_cpp else None,
        rounds_once=rounds_once,
    )


def resolve_custom(config: TrainConfig, device: torch.device, world: World) -> Resolved:
    """Decide the same for a model of the user's own, of which the config says nothing.

    It is compiled, as one graph, only if ``run.compile`` asks for that: compiling pays after a
    minute, and a model of any kind may not compile.

    Raises:
        UserError: As `resolve` does.
    """
    run = config.run
    asks = run.compile not in ("auto", "c++", "off")
    _refuse_sharded(config, world, one_graph=run.compile == "default", remedy="off")
    return Resolved(
        config=config,
        device=device,
        world=world,
        precision=resolve_precision(run.dtype, device),
        compile_mode=resolve_compile(config, device) if asks else "off",
        attention=resolve_attention(run.attention, device, deterministic=run.deterministic),
        shape=None,
        why_not_cpp=None,
        rounds_once=False,
    )


def _refuse_sharded(config: TrainConfig, world: World, *, one_graph: bool, remedy: str) -> None:
    run = config.run
    if world.sharded and (one_graph or run.fp8):
        raise UserError(
            f"run.compile = {run.compile!r} with run.fp8 = {run.fp8} does not go with "
            f"distributed.mode = {world.mode!r}; use distributed.mode=ddp, or "
            f"run.compile={remedy} and run.fp8=false"
        )


def _refuse_accumulation_in_graphs(mode: str, shape: StepShape, world: World) -> None:
    if mode in ("cuda-graphs", "max-autotune") and shape.n_micro > 1 and world.mode == "ddp":
        other = "default" if mode == "cuda-graphs" else "max-autotune-no-cudagraphs"
        raise UserError(
            f"run.compile = {mode!r} does not accumulate gradients with distributed.mode = "
            "'ddp'; raise train.micro_batch until one makes the step, or use "
            f"run.compile={other}"
        )


def apply(resolved: Resolved) -> None:
    """Change this process as decided: threads, memory, the caches of compiled code, numerics.

    Deterministic operations must be chosen before CUDA starts: see `make_deterministic`.
    """
    config, device = resolved.config, resolved.device
    set_threads(config.run.threads, usable_cores())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    keep_compiled(cache_folder(config.data.cache_dir) / "compiled")
    apply_numerics(resolved)


def apply_numerics(resolved: Resolved) -> None:
    """Set the precision of fp32 products and the order of SDPA's kernels, of this process."""
    set_matmul_precision(resolved.precision)
    if resolved.attention is not None:
        prefer_attention_kernel(resolved.attention)


# ---- what is compiled ----------------------------------------------------------------------------


def resolve_compile(config: TrainConfig, device: torch.device) -> str:
    """Return how a run compiles: ``off``, ``c++``, ``blocks``, or a mode of ``run.compile``.

    ``c++`` uses the blocks written in C++ on a CPU that can run the config with them; otherwise it
    means ``off``. ``auto`` compiles everything as one graph on CUDA. On a CPU it is ``c++`` where
    that fits: it is built in seconds, and its steps are the fastest, or at most 3 % slower than a
    graph's (benchmarks/EXPERIMENTS.md). Else, with a C++ compiler, it is one graph up to
    `MAX_LAYERS_OF_ONE_CPU_GRAPH` layers. Beyond, it is one block that is compiled once and run for
    all, so that the time to compile does not grow with the depth.
    """
    mode, on_cpu = config.run.compile, device.type == "cpu"
    in_cpp = mode in ("auto", "c++") and on_cpu and why_unfit(config) is None
    if mode == "c++" or in_cpp:
        return "c++" if in_cpp else "off"
    if mode == "auto" and on_cpu:
        shallow = config.model.n_layers <= MAX_LAYERS_OF_ONE_CPU_GRAPH
        return ("default" if shallow else "blocks") if _has_cpp_compiler() else "off"
    if on_cpu and mode != "off":
        if not _has_cpp_compiler():
            lacks = "needs a C++ compiler on a CPU and none is on the PATH"
            refuse("run.compile", mode, f"{lacks}; install g++ or use run.compile=off")
        if mode != "default":
            refuse("run.compile", mode, "needs a CUDA device; use default, auto or off")
    return "default" if mode == "auto" else mode


def _has_cpp_compiler() -> bool:
    return any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c)


def why_unfit(config: TrainConfig) -> str | None:
    """Return why `run_blocks_on_cpu` cannot train a config's model here; None where it can."""
    model = config.model
    if not is_supported():
        lacks = f"this CPU has {torch.backends.cpu.get_cpu_capability()}"
        if compiler() is None:
            lacks = "no g++ or clang++ with OpenMP is on the PATH"
        return f"C++ blocks need AVX2, AVX-512 or an ARM, and a compiler; {lacks}"
    precision = resolve_precision(config.run.dtype, torch.device("cpu"))
    if not computes_in(precision.compute):
        return f"C++ blocks do not compute in {precision.name} on this CPU"
    widths = (model.dim, model.hidden_dim or 16, model.head_dim or model.dim // model.n_heads)
    window = model.sliding_window_tokens
    wanted = {
        "model widths that are no multiples of 16": any(n % 16 for n in widths),
        f"model.mlp={model.mlp}": model.mlp not in KINDS,
        "model.bias": model.bias,
        "model.dropout": model.dropout > 0,
        "model.residual_in_fp32=false": precision.name == "bf16" and not model.residual_in_fp32,
        "model.sliding_window_tokens": window is not None and window < config.data.seq_len,
        "data.attention_across_documents=false": not config.data.attention_across_documents,
        "activation checkpointing": config.train.activation_checkpointing != "none",
    }
    return next((f"C++ blocks lack {key}" for key, is_wanted in wanted.items() if is_wanted), None)
