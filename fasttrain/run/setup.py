"""What one run needs, made in the order in which it is needed: read `make_loop` first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fasttrain import checkpoint
from fasttrain.config import TrainConfig, UserError, config_to_toml
from fasttrain.data.dataset import TokenDataset, join
from fasttrain.data.format import SPLITS, open_dataset
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.data.remote import ShardCache
from fasttrain.data.tokenizer import encode, end_of_text_id, load_tokenizer
from fasttrain.distributed.sharding import cut, make_sharded
from fasttrain.distributed.world import World, choose_mode, facts_of_rank
from fasttrain.engine.loop import Sampler, TaskScorer, TrainingLoop
from fasttrain.engine.optim import build_optimizers, state_bytes
from fasttrain.engine.sampling import generate
from fasttrain.model.transformer import Transformer
from fasttrain.redact import redact
from fasttrain.resolve import Resolved, resolve, resolve_compile, step_shape
from fasttrain.run import resume as resuming
from fasttrain.run.folder import RunFolder, check_disk
from fasttrain.run.provenance import provenance
from fasttrain.storage import cache_folder, write_atomically

N_BEGINNINGS = 4  # prompts that samples begin with, if the config names none
BEGINNING_TOKENS = 8


@dataclass(frozen=True)
class Splits:
    """The dataset of a run, and the tokenizer where the run decodes or encodes text."""

    train: TokenDataset
    val: TokenDataset
    tokenizer: Tokenizer | None = None

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What identifies the content of each split."""
        return {"train": self.train.facts, "val": self.val.facts}


def make_loop(
    config: TrainConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    allow_change: Sequence[str],
    stop_at_step: int | None,
) -> TrainingLoop:
    """Make the loop of a run, restored from the checkpoint that it continues.

    Raises:
        UserError: something is missing or does not fit, on this rank or another.
    """
    # The checkpoint to continue, the data and the settings
    config, source = find_checkpoint(config, world, folder)
    config, splits = open_data(config, world, folder)
    if world.size > 1:  # before any collective, which a rank with other settings might skip
        world.agree(facts_of_rank(config, splits.facts, {"--stop-at-step": stop_at_step}))
    config = choose_micro_batch(config, source, world, device, folder)
    with world.failing_together():
        config, splits = open_tokenizer(config, splits)
        history = check_resumable(config, source, splits, world, folder, allow_change)
        recorded = {"data": splits.facts, "history": history}
        if world.leads:
            recorded |= origin_of(config, device, source, folder)

    # The model, how it computes, and its optimizers
    model, world = make_model(config, world, device)
    resolved = resolve(config, device, world)
    with world.failing_together():
        if source is None and config.model.init_from is not None:
            load_initial_parameters(model, config)
    optimizers = build_optimizers(model, config.optim, resolved.precision.compute)
    if world.rank:  # from here on each rank draws its own numbers, for dropout
        torch.manual_seed(config.run.seed + world.rank)

    # Its folder, its batches and its samples
    with world.failing_together():
        if world.leads:
            prepare_folder(config, model, optimizers, splits, folder)
        score_tasks = make_task_scorer(resolved, splits.tokenizer, folder.warn)
        loader = make_loader(resolved, splits, position=source.state["position"] if source else 0)
    loop = TrainingLoop(
        model,
        optimizers,
        resolved,
        train_loader=loader,
        val_dataset=splits.val,
        run_dir=folder.path,
        console=folder.console,
        sampler=make_sampler(config, splits.tokenizer),
        score_tasks=score_tasks,
        recorded=recorded,
        mirror=folder.mirror,
    )

    # Its state
    if source is not None:
        restore(loop, source, folder)
    elif not folder.new:  # drop the log of an earlier start that ended before its first checkpoint
        loop.reporter.drop_after(0)
    if world.leads:
        folder.drop_newer()
        write_atomically(folder.path / "config.toml", config_to_toml(config, redact).encode())
        folder.begin_record(loop.state.step)
    return loop


# ---- the checkpoint that a run continues ---------------------------------------------------------


def find_checkpoint(
    config: TrainConfig, world: World, folder: RunFolder
) -> tuple[TrainConfig, checkpoint.Checkpoint | None]:
    """Return the checkpoint that the run continues or branches from, and the config it gives."""
    path = folder.source or folder.origin
    if path is None:
        return config, None
    with world.failing_together():
        source = checkpoint.parse(path)
        config = resuming.settle_decay(config, source, decays=folder.decays)
    return config, source


def check_resumable(
    config: TrainConfig,
    source: checkpoint.Checkpoint | None,
    splits: Splits,
    world: World,
    folder: RunFolder,
    allow_change: Sequence[str],
) -> list[dict[str, Any]]:
    """Refuse settings and data that differ from the checkpoint's; return the changes allowed."""
    if source is None:
        return []
    allowed = [*allow_change, *(resuming.DECAY_MAY_CHANGE if folder.decays else ())]
    n_samples = step_shape(config.train, config.data.seq_len, world.size).samples
    return resuming.check_resumable(source, config, splits.facts, allowed, n_samples)


# ---- data ----------------------------------------------------------------------------------------


def data_paths(config: TrainConfig) -> Sequence[str]:
    """Return the dataset folders that a config names; none: it trains on the default text."""
    return config.data.paths or ([config.data.path] if config.data.path else [])


def open_splits(
    config: TrainConfig, report: Callable[[str], None]
) -> tuple[TrainConfig, TokenDataset, TokenDataset]:
    """Open or build the dataset; return the config with its vocabulary, and the splits."""
    data, vocab_size = config.data, config.model.vocab_size
    cache = cache_folder(data.cache_dir)
    paths: Sequence[str | Path] = data_paths(config)
    if not paths:
        from fasttrain.prepare.corpus import build_default_corpus

        size = data.corpus_vocab_size
        paths = [build_default_corpus(vocab_size=size, cache_dir=cache, report=report)]
    options: dict[str, Any] = {"dtype": data.dtype, "end_of_text": data.end_of_text}
    options |= {"vocab_size": vocab_size, "cache_dir": cache}
    options["shard_cache"] = ShardCache(cache, data.cache_gib)
    opened = [[open_dataset(path, split, **options) for path in paths] for split in SPLITS]
    train, val = (found[0] if len(found) == 1 else join(found) for found in opened)
    if vocab_size is None:
        if train.vocab_size is None:
            raise UserError(
                f"{paths[0]} does not say its vocabulary size; set model.vocab_size (GPT-2's is "
                "50257)"
            )
        rounded = -(-train.vocab_size // 64) * 64
        config = replace(config, model=replace(config.model, vocab_size=rounded))
    return config, train, val


def open_data(config: TrainConfig, world: World, folder: RunFolder) -> tuple[TrainConfig, Splits]:
    """Open the dataset; the first rank of each node builds it if there is none yet."""
    for first_of_node in (True, False):
        with world.failing_together():
            if (world.local_rank == 0) is first_of_node:
                config, train, val = open_splits(config, folder.note)
    return config, Splits(train, val)


def open_tokenizer(config: TrainConfig, splits: Splits) -> tuple[TrainConfig, Splits]:
    """Load the dataset's tokenizer if the run needs it; settle which prompts samples begin with."""
    needs_it = config.eval.tasks or config.eval.prompts != ()
    path = splits.train.tokenizer_path
    if not needs_it or path is None:
        return config, splits
    tokenizer = load_tokenizer(path)
    if config.eval.prompts is None:
        prompts = beginnings(splits.val, tokenizer)
        config = replace(config, eval=replace(config.eval, prompts=prompts))
    return config, replace(splits, tokenizer=tokenizer)


def make_loader(resolved: Resolved, splits: Splits, position: int) -> Loader:
    """Return the loader of this rank's micro-batches, from sample ``position`` of the run on."""
    world = resolved.world
    assert resolved.shape is not None
    options = LoaderOptions.of(
        resolved.config,
        micro_batch=resolved.shape.rows,
        rank=world.rank,
        world_size=world.size,
    )
    return Loader(splits.train, options, device=resolved.device, position=position)


# ---- settings ------------------------------------------------------------------------------------


def choose_micro_batch(
    config: TrainConfig,
    source: checkpoint.Checkpoint | None,
    world: World,
    device: torch.device,
    folder: RunFolder,
) -> TrainConfig:
    """Return the config with a number for ``train.micro_batch = "auto"``, the same on all ranks."""
    rows = config.train.micro_batch
    if not isinstance(rows, str):
        return config
    with world.failing_together():
        if source is not None:
            rows = source.config.train.micro_batch
        elif world.leads:
            from fasttrain.preflight.memory import best_micro_batch  # half a second of imports

            rows = best_micro_batch(config, world.size, device, report=folder.note)
    return replace(config, train=replace(config.train, micro_batch=world.share(rows)))


def origin_of(
    config: TrainConfig,
    device: torch.device,
    source: checkpoint.Checkpoint | None,
    folder: RunFolder,
) -> dict[str, Any]:
    """Return the provenance that this run's checkpoints record.

    Warn if it differs from that of the checkpoint that the run starts from.
    """
    made_by = provenance(device, source.path if source else None)
    threads = torch.get_num_threads() if device.type == "cpu" else None
    other = {"threads": threads, "run.compile": resolve_compile(config, device)}
    origin: dict[str, Any] = {"provenance": made_by, "torch": made_by["torch"], **other}
    state = source.state if source else {}
    lineage = state.get("lineage", [])
    if source is not None and folder.origin is not None:
        lineage = [*lineage, folder.parent(source.step)]
    if lineage:
        origin["lineage"] = lineage
    exact = source is None or device.type == "cpu" or config.run.deterministic
    if warning := resuming.made_otherwise(state, made_by | other, exact=exact):
        folder.warn(warning)
    return origin


# ---- model ---------------------------------------------------------------------------------------


def make_model(
    config: TrainConfig, world: World, device: torch.device
) -> tuple[Transformer, World]:
    """Return a new model, sharded if the mode says so, and the world with its mode."""
    torch.manual_seed(config.run.seed)
    make = partial(Transformer, config.model, seq_len=config.data.seq_len)
    if world.size > 1:
        with torch.device("meta"):
            n_parameters = make().num_parameters()
        world = choose_mode(config.distributed, world, n_parameters, device)
    if world.sharded:
        return make_sharded(make, world, config.distributed, device=device), world
    return make().to(device), world


def load_initial_parameters(model: Transformer, config: TrainConfig) -> None:
    """Give the model the parameters of the checkpoint that ``model.init_from`` names."""
    path = config.model.init_from
    assert path is not None
    _, saved = checkpoint.saved_parameters(Path(path))
    checkpoint.check_model(config, saved, f"model.init_from = {path}")
    own = model.state_dict()
    model.load_state_dict({name: cut(tensor, own[name]) for name, tensor in saved.items()})


# ---- the run folder ------------------------------------------------------------------------------


def prepare_folder(
    config: TrainConfig,
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    splits: Splits,
    folder: RunFolder,
) -> None:
    """Check that checkpoints will fit on the disk; take the run's name in the mirror."""
    copies = 1 if config.train.ema_decay is None else 2
    n_bytes = copies * sum(tensor.nbytes for tensor in model.state_dict().values())
    n_bytes += sum(map(state_bytes, optimizers))
    n_kept = config.checkpoint.keep_last + bool(folder.mirror)  # one is kept to be copied
    check_disk(folder.path, n_bytes, n_kept)
    if folder.mirror:
        folder.mirror.put("config.toml", config_to_toml(config, redact).encode())
    if splits.train.tokenizer_path is not None and folder.source is None:
        tokenizer_file = splits.train.tokenizer_path.read_bytes()
        write_atomically(folder.path / "tokenizer.json", tokenizer_file)


def restore(loop: TrainingLoop, source: checkpoint.Checkpoint, folder: RunFolder) -> None:
    """Load the checkpoint that the run continues; warn if the learning rate will jump."""
    try:
        loop.saver.load(source.path)
        if folder.decays:
            resuming.begin_decay(loop.state, loop.config, source.path)
        if folder.source is None:
            loop.saver.saved_at = None  # a branch: its own folder has no checkpoint yet
    except UserError:
        loop.close()
        raise
    jump = resuming.lr_jump(source, loop.config, loop.state.total_steps)
    if loop.world.leads and jump and not folder.decays:
        folder.warn(jump)


# ---- samples and tasks ---------------------------------------------------------------------------


def beginnings(dataset: TokenDataset, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the first words of some documents, evenly spread over a split, as distinct prompts."""
    ends = dataset.document_ends
    found = []
    for number in np.linspace(0, len(ends) - 1, N_BEGINNINGS).astype(int).tolist():
        begin = int(ends[number - 1]) if number else 0
        ids = dataset.read(begin, min(int(ends[number]) - begin, BEGINNING_TOKENS)).tolist()
        # The last character may be incomplete.
        found.append(tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}"))
    return tuple(dict.fromkeys(found))


def make_sampler(config: TrainConfig, tokenizer: Tokenizer | None) -> Sampler | None:
    """Return what continues one of ``eval.prompts``; None: there are none, or no tokenizer."""
    if not config.eval.prompts or tokenizer is None:
        return None
    prompts = config.eval.prompts
    sampling: dict[str, Any] = {
        "temperature": config.eval.temperature,
        "top_k": config.eval.top_k,
        "max_new_tokens": config.eval.sample_tokens,
    }

    def sample(model: Transformer, number: int) -> tuple[str, str]:
        device = model.embedding.weight.device
        prompt = prompts[number % len(prompts)]
        # A prompt that encodes to no tokens is replaced by the end-of-text token.
        ids = encode(tokenizer, prompt) or [end_of_text_id(tokenizer) or 0]
        generator = torch.Generator(device).manual_seed(config.run.seed + number)
        tokens = torch.tensor([ids], device=device)
        out = generate(model, tokens, generator=generator, **sampling)
        return prompt, tokenizer.decode(out[0, len(ids) :].tolist())

    return sample


def make_task_scorer(
    resolved: Resolved, tokenizer: Tokenizer | None, warn: Callable[[str], None]
) -> TaskScorer | None:
    """Return what scores a model on ``eval.tasks``; None: there are none."""
    config = resolved.config
    if not config.eval.tasks:
        return None
    if tokenizer is None:
        raise UserError("eval.tasks needs the dataset's tokenizer.json; there is none, so unset it")
    from fasttrain.evaluate.harness import HarnessModel, Stopped, load_tasks, scores

    tasks = load_tasks(config.eval.tasks, config.eval.tasks_path, quiet=True)
    batch_size = config.eval.batch_size or config.train.micro_batch

    def score(model: Transformer, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        lm = HarnessModel(
            model=model,
            tokenizer=tokenizer,
            should_stop=should_stop,
            batch_size=batch_size,
            precision=resolved.precision,
            world=resolved.world,
        )
        try:
            return scores(lm.run(tasks, config.eval.tasks_limit))
        except Stopped:
            return None
        except Exception as error:  # of a task; the run is worth more
            warn(f"eval.tasks: no scores: {error} (training goes on)")
            return {}

    return score
