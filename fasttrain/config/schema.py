"""The sections of the configuration: every key with its type, default, meaning and range.

The one source of what ``--help``, the reference table and the checks say. ``None`` means unset.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from fasttrain.config.keys import Section, choice, divisors, key

_LR, _MUON_LR = 1e-3, 8e-3  # peak learning rates where none is set
_WIDEST = 2**20  # with which no product of sizes leaves 63 bits
# What a whole string must match, and how to say it.
_PATH = (r"[^\0]+", "a path")
_FOLDER = (r"(?!\.\.?$)[^/\\\x00-\x1f\x7f]+", "a folder name without slashes")
_DEVICE = (r"auto|cpu|cuda(:\d+)?", "one of auto, cpu, cuda, cuda:N")
_PROJECT = (r"[^/\\#?%:]+", "a name without /, \\, #, ?, %, :")
HORIZON = ("train.steps", "train.epochs", "train.tokens", "train.hours")  # one of them is set
_ONE_EVALUATION = "evaluations, but there is only one, at the end; set eval.every_steps"
Problems = Iterator[tuple[str, str]]  # a key, and what is wrong with its value; the remedy


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Section):
    """Where the run is written and what it runs on."""

    name: str | None = key(None, "run folder name (none: the config file's stem)", pattern=_FOLDER)
    out_dir: str = key("runs", "folder that holds the run folders", pattern=_PATH)
    seed: int = key(1337, "seed of initialization, data order and dropout", ge=0, le=2**63 - 1)
    device: str = key("auto", "device to train on (auto: CUDA if there is one)", pattern=_DEVICE)
    dtype: str = choice(
        "auto fp32 tf32 bf16 fp16",
        "precision of matrix products (auto: bf16 if faster, else fp16 on CUDA, fp32 on a CPU)",
    )
    compile: str = choice(
        "auto off c++ default cuda-graphs max-autotune max-autotune-no-cudagraphs",
        "torch.compile mode (c++: C++ blocks on a CPU; auto: c++ if it supports the model)",
    )
    attention: str = choice(
        "auto flash cudnn fa3",
        "SDPA's kernel on CUDA (auto: cudnn on an H100 or B200, else flash; fa3: FlashAttention-3)",
    )
    deterministic: bool = key(False, "make runs bitwise identical on a GPU too, which is slower")
    fp8: bool = key(False, "run the blocks' matrix products in fp8 (Hopper or newer; torchao)")
    threads: int | None = key(None, "number of CPU threads (none: one per usable core)", ge=1)

    def problems(self) -> Problems:
        of_cuda = {"fp8": "True", "dtype": "tf32", "compile": "cuda-graphs"}
        for k, values in (of_cuda | {"attention": "flash cudnn fa3"}).items():
            if self.device == "cpu" and str(getattr(self, k)) in values.split():
                default = "false" if k == "fp8" else "auto"
                yield k, f"needs a CUDA device; use {default} or run.device=cuda"
        if self.fp8 and self.dtype not in ("auto", "bf16"):
            yield "fp8", f"needs run.dtype=bf16, not {self.dtype}; set that, or unset fp8"
        if self.fp8 and self.compile in ("off", "c++"):
            yield "fp8", "is slower than bf16 unless compiled; use run.compile=auto"
        if self.deterministic and self.compile.startswith("max-autotune"):
            problem = f"does not go with run.compile={self.compile}, which chooses kernels by their"
            yield "deterministic", f"{problem} speed of the moment; use run.compile=auto"
        if self.deterministic and self.attention in ("cudnn", "fa3"):
            yield "attention", "is not deterministic; use run.attention=flash or auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    """Shape and parts of the Transformer."""

    vocab_size: int | None = key(
        None, "embedding rows (none: the dataset's, rounded up to a multiple of 64)", ge=2, le=2**32
    )
    dim: int = key(256, "width of the hidden states", ge=1, le=_WIDEST)
    n_layers: int = key(4, "number of blocks", ge=1, le=1024)
    n_heads: int = key(4, "query heads", ge=1, le=_WIDEST)
    n_kv_heads: int | None = key(None, "key and value heads (none: n_heads)", ge=1, le=_WIDEST)
    head_dim: int | None = key(None, "width of a head (none: dim / n_heads)", ge=1, le=_WIDEST)
    hidden_dim: int | None = key(
        None, "MLP width (none: 4·dim; swiglu: 8/3·dim, padded to a multiple of 64)", ge=1, le=2**24
    )
    mlp: str = choice("swiglu gelu relu2", "MLP activation")
    norm: str = choice("rms layer", "RMSNorm or LayerNorm")
    norm_eps: float = key(1e-6, "added to the variance in the norms", gt=0)
    positions: str = choice("rope learned", "rotary or learned positions")
    rope_theta: float = key(10000.0, "base of the rotary frequencies", gt=0)
    bias: bool = key(False, "biases in linear layers and LayerNorm")
    qk_norm: bool = key(False, "RMSNorm on queries and keys")
    tied_embeddings: bool = key(False, "share one matrix between the embedding and the head")
    logit_softcap: float | None = key(None, "c in c·tanh(logits / c) (none: no cap)", gt=0)
    sliding_window_tokens: int | None = key(
        None, "tokens that each token attends to, including itself (none: all before it)", ge=1
    )
    dropout: float = key(0.0, "dropout on embeddings, attention and residual branches", ge=0, lt=1)
    init_std: float | None = key(None, "std of the initial weights (none: 1/sqrt(fan-in))", gt=0)
    zero_init_projections: bool = key(False, "initialize projections into the residual stream to 0")
    embedding_norm: bool = key(False, "RMSNorm without a weight on the token embeddings")
    residual_in_fp32: bool = key(True, "keep the residual stream in fp32 under bf16")
    bigram_vocab_size: int | None = key(
        None, "rows of a hashed token-pair table, added to embeddings (none: off)", ge=2, le=2**32
    )
    value_embeddings: bool = key(False, "mix learned per-token embeddings into all layers' values")
    init_from: str | None = key(
        None, "run or checkpoint folder to take the parameters from (none: random)", pattern=_PATH
    )

    def problems(self) -> Problems:
        if self.head_dim is None and self.dim % self.n_heads:
            problem = f"is not a multiple of model.n_heads = {self.n_heads}"
            yield "dim", f"{problem}; change either, or set model.head_dim"
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            problem = f"does not divide model.n_heads = {self.n_heads}"
            remedy = f"use one of {', '.join(map(str, divisors(self.n_heads)))}"
            yield "n_kv_heads", f"{problem}; {remedy}"
        head_dim = self.head_dim or self.dim // self.n_heads
        if self.positions == "rope" and head_dim % 2:
            problem = f"makes heads of {head_dim}, which is odd, and rotary positions turn pairs"
            remedy = f"set model.head_dim={head_dim + 1} or model.positions=learned"
            yield "head_dim", f"{problem}; {remedy}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """The training data."""

    path: str | None = key(
        None,
        "dataset folder, or the address of one, such as s3://bucket/name (none: the source code of "
        "Python's standard library)",
        pattern=_PATH,
    )
    seq_len: int = key(256, "tokens per training sequence", ge=1, le=2**32)
    paths: tuple[str, ...] = key(
        (),
        "several dataset folders or addresses that share a tokenizer, instead of data.path",
        pattern=(r"[^\0]+", "a list of paths"),
    )
    weights: tuple[float, ...] = key((), "exact share of each of data.paths ([]: by size)", gt=0)
    batching: str = choice(
        "packed sliding padded bucketed",
        "adjacent or overlapping windows, or one document per sequence, in any order or grouped "
        "by length; padding counts in train.tokens and train.tokens_per_step, not in log lines",
    )
    stride_tokens: int | None = key(None, "sliding: stride in tokens (none: seq_len / 2)", ge=1)
    attention_across_documents: bool = key(True, "packed, sliding: attend to earlier documents too")
    end_of_text: int | None = key(
        None, "token id between documents, if the files do not record it (GPT-2: 50256)", ge=0
    )
    dtype: str | None = key(None, "dtype of token files without a header", choices="uint16 uint32")
    prefetch: int = key(16, "micro-batches to prepare ahead, half of them at a time", ge=1)
    cache_dir: str | None = key(None, "cache folder (none: the user's cache folder)", pattern=_PATH)
    cache_gib: float = key(32.0, "GiB of data.cache_dir for shards fetched from an address", gt=0)
    corpus_vocab_size: int = key(4096, "BPE vocabulary size for the default text", ge=257, le=65536)

    def problems(self) -> Problems:
        if self.path is not None and self.paths:
            yield "paths", "and data.path both name the data; unset one"
        if len(self.paths) == 1:
            yield "paths", f"names only one dataset; write data.path={self.paths[0]}"
        for name in ("dtype", "end_of_text"):
            if getattr(self, name) is not None and not (self.path or self.paths):
                yield name, "describes data.path, which is unset; set data.path"
        if self.weights and len(self.weights) != len(self.paths):
            yield "weights", f"must be one for each of data.paths; give {len(self.paths)}"
        if self.stride_tokens is not None and self.batching != "sliding":
            yield "stride_tokens", "is a key of sliding windows; set data.batching=sliding"
        if (self.stride_tokens or 0) > self.seq_len:
            yield "stride_tokens", f"leaves tokens out; use at most data.seq_len = {self.seq_len}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Section):
    """The optimizer."""

    name: str = choice(
        "adamw muon sgd adafactor adamw8bit",
        "muon uses adamw for everything except the blocks' matrices; adamw8bit is torchao's",
    )
    lr: float | None = key(
        None, f"peak learning rate (none: {_MUON_LR} with muon, else {_LR})", gt=0
    )
    betas: tuple[float, float] = key((0.9, 0.95), "decay rates of AdamW's two moments", ge=0, lt=1)
    eps: float = key(1e-8, "added to AdamW's denominator", gt=0)
    weight_decay: float = key(0.1, "decay of matrices, times the rate; not decoupled in sgd", ge=0)
    decay_embeddings: bool = key(False, "decay the embedding tables too")
    muon_embedding_lr_scale: float = key(1.0, "muon: embedding lr, relative to the matrices'", ge=0)
    muon_head_lr_scale: float = key(1.0, "muon: head lr, relative to the matrices'", ge=0)
    muon_momentum: float = key(0.95, "Nesterov momentum of Muon", ge=0, lt=1)
    muon_ns_steps: int = key(5, "Newton-Schulz steps of Muon", ge=1)
    momentum: float = key(0.9, "momentum of sgd", ge=0, lt=1)
    nesterov: bool = key(False, "use Nesterov momentum in sgd")

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.lr is None:  # a saved config names it: a default of another version changes no run
            object.__setattr__(self, "lr", _MUON_LR if self.name == "muon" else _LR)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, which is known once the config is made."""
        assert self.lr is not None
        return self.lr

    def problems(self) -> Problems:
        if self.nesterov and self.momentum == 0:
            yield "nesterov", "needs momentum; set, for example, optim.momentum=0.9"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Section):
    """The learning rate schedule."""

    name: str = choice(
        "cosine linear constant wsd step cosine_restarts plateau", "shape after the warmup"
    )
    warmup_steps: int = key(0, "steps of linear warmup", ge=0)
    min_lr: float = key(0.0, "lowest learning rate after the warmup (constant: unused)", ge=0)
    decay_fraction: float = key(0.2, "wsd: decay length, as a fraction of the run", gt=0, le=1)
    decay_start_step: int | None = key(None, "wsd: first decay step (none: decay_fraction)", ge=0)
    decay_every_steps: int | None = key(None, "step: steps between decays (none: run / 3)", ge=1)
    decay_factor: float = key(0.1, "step, plateau: factor of each decay", gt=0, lt=1)
    plateau_evals: int = key(3, "plateau: evaluations without improvement before each decay", ge=1)
    cycle_steps: int | None = key(None, "cosine_restarts: steps per cycle (none: run / 3)", ge=1)
    context_fractions: tuple[float, ...] = key(
        (),
        "packed and sliding: shorter sequences to start with, as fractions of data.seq_len; these "
        "and the full length each get an equal part of the run; a length is rounded down to a "
        "divisor of data.seq_len, and ignored if that more than halves it ([]: full length)",
        gt=0,
        le=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig(Section):
    """Length of the run, and its steps; set exactly one of steps, epochs, tokens and hours."""

    steps: int | None = key(None, "length of the run in optimizer steps", ge=1)
    epochs: float | None = key(None, "length of the run in passes over the training split", gt=0)
    tokens: int | None = key(None, "length of the run in training tokens", ge=1)
    hours: float | None = key(None, "length in hours of steps, without evaluation and saves", gt=0)
    # Typed as what all readers get: the word is replaced before anything is built.
    micro_batch: int = key(
        8,
        "maximum sequences per forward pass on each device; with tokens_per_step, the largest "
        "number that divides a device's share is used (auto: the largest that fits, if faster)",
        ge=1,
        choices="auto",
    )
    tokens_per_step: int | None = key(
        None, "tokens per step in total, in whole sequences (none: a micro-batch per device)", ge=1
    )
    max_grad_norm: float | None = key(1.0, "clip the gradient to this norm (none: never)", gt=0)
    max_grad_value: float | None = key(None, "then clip its elements to ± this (none: never)", gt=0)
    ema_decay: float | None = key(
        None, "per-step decay of averaged weights, to evaluate and sample (none: off)", gt=0, lt=1
    )
    label_smoothing: float = key(0.0, "target probability spread over the vocabulary", ge=0, lt=1)
    z_loss: float = key(0.0, "weight of the squared log-partition penalty", ge=0)
    on_nonfinite: str = choice(
        "skip rollback stop",
        "what to do, besides skipping the update, after a non-finite loss or gradient (skip: "
        "continue, but roll back after 20 in a row)",
    )
    recheck_every_steps: int | None = key(
        None,
        "steps between rechecks, which run forward and backward twice and compare them bit "
        "for bit; on_nonfinite decides what follows a mismatch (none: never)",
        ge=1,
    )
    on_spike: str = choice(
        "off skip rollback",
        "what to do after a loss or gradient norm far above the previous ones (off: warn)",
    )
    spike_sigmas: float = key(10.0, "standard deviations above the mean that define a spike", gt=0)
    spike_window_steps: int = key(128, "previous steps to compare with; half are enough", ge=8)
    max_rollbacks: int = key(3, "maximum number of rollbacks; then the run stops", ge=0)
    activation_checkpointing: str = choice(
        "none full selective",
        "what a block saves for its backward pass (none: everything; full: its input; "
        "selective: also results of matrix products and attention); it recomputes the rest",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(Section):
    """Evaluation on the validation split, and samples."""

    every_steps: int | None = key(None, "steps between evaluations (none: only at the end)", ge=1)
    tokens: int | None = key(None, "targets per evaluation, a fixed subset (none: all)", ge=1)
    batch_size: int | None = key(None, "sequences per forward pass (none: train.micro_batch)", ge=1)
    stride_fraction: float | None = key(
        None,
        "packed and sliding: distance between the starts of windows, as a fraction of "
        "data.seq_len; each token is predicted once, with the tokens before it in its window "
        "as context (none: adjacent windows)",
        gt=0,
        le=1,
    )
    sample_every_steps: int | None = key(None, "steps between samples (none: at the end)", ge=1)
    prompts: tuple[str, ...] | None = key(
        None, "prompts, used in turn ([]: no samples; none: starts of four validation documents)"
    )
    sample_tokens: int = key(128, "tokens per sample", ge=1)
    temperature: float = key(0.8, "temperature of the samples", gt=0)
    top_k: int | None = key(50, "sample from the k most likely tokens (none: from all)", ge=1)
    tasks: tuple[str, ...] = key((), "tasks, groups, tags or patterns of lm-evaluation-harness")
    tasks_path: str | None = key(
        None, "folder of task files (YAML) that override the harness's own", pattern=_PATH
    )
    tasks_every_evals: int = key(1, "run the tasks at every n-th evaluation, and at the last", ge=1)
    tasks_limit: int | None = key(None, "use the first n documents of each task (none: all)", ge=1)
    patience: int | None = key(
        None, "end the run after this many evaluations without an improvement (none: never)", ge=1
    )
    min_change: float = key(0.0, "minimum improvement in nats for patience and plateau", ge=0)

    def problems(self) -> Problems:
        if self.patience is not None and self.every_steps is None:
            yield "patience", f"counts {_ONE_EVALUATION}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Section):
    """Checkpoints."""

    every_steps: int | None = key(
        None, "steps between checkpoints (none: at the end and on interruption)", ge=1
    )
    keep_last: int = key(2, "number of newest checkpoints to keep, in addition to the best", ge=1)
    asynchronous: bool = key(True, "write checkpoints in a background thread")
    mirror: str | None = key(
        None,
        "folder or address, such as s3://bucket/runs, to copy checkpoints to and to resume from "
        "if the run folder is gone",
        pattern=(r"[^\0?#]*[^\0?#/]/*", "a path or an address, without a query"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig(Section):
    """Logging."""

    every_steps: int = key(10, "steps between log lines", ge=1)
    csv: bool = key(False, "write train.csv and eval.csv beside metrics.jsonl")
    tensorboard: bool = key(False, "write TensorBoard files into the run folder")
    wandb_project: str | None = key(None, "Weights & Biases project (none: off)", pattern=_PROJECT)
    wandb_mode: str = choice("online offline", "offline: log to the run folder only")
    profile_steps: tuple[int, ...] = key(
        (), "first and last step of a profiler trace, saved to profile/ in the run folder", ge=1
    )

    def problems(self) -> Problems:
        steps = self.profile_steps
        if steps and (len(steps) != 2 or steps[0] > steps[1]):
            yield "profile_steps", "is not a first and a last step; give two, as in [10, 12]"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig(Section):
    """How processes started by torchrun share the work; unused without torchrun."""

    mode: str = choice(
        "auto ddp fsdp hsdp",
        "ddp: a full copy on each rank; fsdp: sharded over all ranks; hsdp: sharded within a "
        "node; auto: ddp if it fits, else fsdp",
    )
    shard_ranks: int | None = key(None, "hsdp: ranks that share one copy (none: one node)", ge=2)
    reshard_after_forward: bool = key(True, "fsdp: gather parameters again for the backward pass")
    check_every_steps: int | None = key(
        1000, "ddp, hsdp: steps between bitwise checks of ranks, and at the end (none: never)", ge=1
    )
    timeout_s: float = key(300.0, "a step that takes longer than this ends the job", gt=0)
    init_timeout_s: float = key(900.0, "how long ranks wait for each other before step 1", gt=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Section):
    """The whole configuration of a run.

    Raises:
        ConfigError: a combination of values across sections is impossible.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def problems(self) -> Problems:
        horizon = {k: v for k in HORIZON if (v := attrgetter(k)(self)) is not None}
        if not horizon:
            yield "train.steps", f"leaves the run's length open; set one of {', '.join(HORIZON)}"
        first, *others = horizon
        if others:
            also = " and ".join(f"{k} = {horizon[k]}" for k in others)
            remedy = f"keep one and unset the other, as in {first}=none"
            yield first, f"and {also} both fix the length of the run; {remedy}"
        steps, peak = self.train.steps, self.optim.peak_lr
        if steps is not None and self.schedule.warmup_steps >= steps:
            problem = f"is not below train.steps = {steps}; lower it, or train for longer"
            yield "schedule.warmup_steps", problem
        if self.train.tokens_per_step is None and isinstance(self.train.micro_batch, str):
            problem = "leaves the tokens per step open, which affect how a run learns"
            yield "train.micro_batch", f"{problem}; set train.tokens_per_step"
        if self.schedule.name == "plateau" and self.eval.every_steps is None:
            yield "schedule.name", f"waits for {_ONE_EVALUATION}"
        if self.schedule.min_lr > peak:
            yield "schedule.min_lr", f"is above the peak learning rate, optim.lr = {peak}; lower it"
        for name in ("train.on_nonfinite", "train.on_spike"):
            if attrgetter(name)(self) == "rollback" and self.checkpoint.every_steps is None:
                yield name, "needs checkpoints; set checkpoint.every_steps"
        if not self.model.residual_in_fp32 and self.run.dtype not in ("auto", "bf16"):
            problem = f"needs run.dtype=bf16, not {self.run.dtype}; set that, or leave it true"
            yield "model.residual_in_fp32", problem
        least = 0 if self.data.path or self.data.paths else self.data.corpus_vocab_size
        if self.model.vocab_size and self.model.vocab_size < least:
            problem = f"is below data.corpus_vocab_size = {least}; leave it unset, or lower that"
            yield "model.vocab_size", problem


SECTIONS: dict[str, Any] = {f.name: f.type for f in fields(TrainConfig)}
for _name, _cls in SECTIONS.items():
    _cls.section = _name
