"""The size of a run, from its config and data alone, and warnings about it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fasttrain.config import TrainConfig, counted
from fasttrain.data.dataset import FEW_VAL_TOKENS, TokenDataset
from fasttrain.data.order import LoaderOptions, SampleOrder
from fasttrain.data.remote import in_gib, n_bytes
from fasttrain.engine.schedule import n_steps
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import step_shape


@dataclass
class RunSize:
    """A run of ``n_ranks`` processes and its size, which follows from config and data alone."""

    config: TrainConfig
    model: Transformer  # perhaps without its numbers
    train: TokenDataset | None  # None: missing
    val: TokenDataset | None
    n_ranks: int

    def __post_init__(self) -> None:
        loop, per_epoch, self.dropped_tokens = self.config.train, 0, 0  # left over: in no sequence
        self.shape = step_shape(loop, self.config.data.seq_len, self.n_ranks)
        if self.train is not None:
            order = SampleOrder(self.train, LoaderOptions.of(self.config))
            per_epoch, self.dropped_tokens = order.samples_per_epoch, order.dropped_tokens
        self.steps: int | None = None  # with ``train.hours``, or ``train.epochs`` of missing data
        if per_epoch or loop.epochs is None:
            self.steps = n_steps(loop, self.shape, per_epoch)
        self.epochs: float | None = None  # passes over the training split; None: likewise
        if self.steps is not None and per_epoch:
            self.epochs = self.steps * self.shape.samples / per_epoch

    @property
    def tokens(self) -> int | None:
        return None if self.steps is None else self.steps * self.shape.tokens


def warnings_at_start(run_size: RunSize) -> Iterator[str]:
    """Yield what to look at before a run begins, each with the remedy."""
    config, train, val, n_ranks = run_size.config, run_size.train, run_size.val, run_size.n_ranks
    loop, tokens = config.train, run_size.shape.tokens
    if loop.tokens_per_step is None and n_ranks > 1:
        yield (
            f"train.tokens_per_step is unset: with {n_ranks} ranks a step has {tokens:,} tokens, "
            "more than on one rank, so the losses differ; set it"
        )
    elif loop.tokens_per_step not in (None, tokens):
        yield (
            f"train.tokens_per_step = {loop.tokens_per_step} is not a whole number of sequences of "
            f"data.seq_len = {config.data.seq_len} on each rank: a step has {tokens:,} tokens"
        )
    rows, used = config.model.vocab_size or 0, train.max_token + 1 if train else math.inf
    if train and used < rows / 2 and rows - used > 64:  # more than from rounding up
        yield (
            f"{rows - used:,} of the {rows:,} rows of the embedding are never used, because no "
            f"token is above {train.max_token:,}: leave model.vocab_size out (none), or use data "
            "that was prepared with this vocabulary"
        )
    if val and val.n_tokens < FEW_VAL_TOKENS:
        yield (
            f"only {counted(val.n_tokens, 'validation token')}: the validation loss, and with it "
            "the choice of the best checkpoint, is mostly chance; add text, or prepare it with a "
            "larger --val-fraction"
        )
    limit = config.data.cache_gib
    if (needed := n_bytes(*(d.shards for d in (train, val) if d))) > limit * 2**30:
        yield (
            f"data.cache_gib = {limit:g} does not hold all shards, but samples come from all of "
            f"them in random order: every {-(-config.data.prefetch // 2)} micro-batches fetch up "
            f"to {in_gib(needed)} GiB. Set it to {in_gib(needed)}, or raise data.prefetch, the "
            "number of micro-batches prepared ahead"
        )
    if n_ranks == 1 and (mode := config.distributed.mode) != "auto":
        how = "torchrun --nproc-per-node N -m fasttrain.train …"
        yield f"distributed.mode = {mode} has no effect in one process; start several: {how}"
