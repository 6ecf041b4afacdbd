"""One run from a config: dataset, model, optimizers, run folder, resuming, signals, exit status."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels._torch import spare_compiler
from tokenizers import Tokenizer

from fasttrain import checkpoint
from fasttrain.command import EXIT_BAD_INPUT, EXIT_FAILED, record, redact
from fasttrain.config import TrainConfig, UserError, config_to_toml
from fasttrain.corpus import build_default_corpus
from fasttrain.data.dataset import TokenDataset, join
from fasttrain.data.files import cache_folder, write_atomically
from fasttrain.data.format import SPLITS, open_dataset
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.data.remote import ShardCache
from fasttrain.data.tokenizer import encode, end_of_text_id, load_tokenizer
from fasttrain.device import make_deterministic, resolve_device
from fasttrain.distributed.lockstep import die_with_parent
from fasttrain.distributed.sharding import cut, make_sharded
from fasttrain.distributed.world import SharedError, World, choose_mode, facts_of_rank, start, stop
from fasttrain.engine.optim import build_optimizers, state_bytes
from fasttrain.engine.trainer import TaskScorer, Trainer
from fasttrain.generate import beginnings, generate
from fasttrain.log.sinks import check_packages
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import apply, resolve, resolve_compile, step_shape
from fasttrain.run import resume as resuming
from fasttrain.run.ending import show_start, train_to_end
from fasttrain.run.folder import RunFolder, check_disk
from fasttrain.run.provenance import provenance
from fasttrain.run.signals import interruptible


def run(
    config: TrainConfig,
    *,
    name: str,
    resume: str | None = None,
    stop_at_step: int | None = None,
    allow_change: Sequence[str] = (),
    decay_from: str | None = None,
    config_path: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Train as ``config`` says and return the exit status.

    For ``name``, ``resume``, ``config_path`` and ``overwrite`` see `RunFolder`. ``allow_change``
    names keys that may differ from the resumed run's, beyond those that change no number.
    ``decay_from`` is a run or checkpoint folder: a new run continues from there, decaying.

    Raises:
        UserError: something is missing or does not fit; nothing was overwritten.
        KeyboardInterrupt: a signal came before the first step; nothing was overwritten.
    """
    started = time.perf_counter()
    folder: RunFolder | None = None
    try:
        if decay_from is not None and resume not in (None, "auto"):
            raise UserError(
                f"--decay-from begins a new run, and --resume {resume} goes on with another; "
                "leave one out (--resume auto goes on with the new run once it was saved)"
            )
        if config.run.deterministic:
            make_deterministic()
        with interruptible():
            # The process and its ranks
            world, device = start(config.distributed, resolve_device(config.run.device))
            if world.size > 1:
                die_with_parent()
            resolved = resolve(config, device, world)
            apply(resolved)
            if resolved.compile_mode in ("off", "c++"):
                spare_compiler()
            check_packages(config)
            # The run
            folder = RunFolder(
                config,
                name,
                resume,
                world,
                config_path=config_path,
                decay_from=Path(decay_from) if decay_from is not None else None,
                allow_change=allow_change,
                overwrite=overwrite,
            )
            config = folder.settled(config)
            trainer = _build(config, world, device, folder, allow_change, stop_at_step)
            if stop_at_step is not None:
                if stop_at_step <= (step := trainer.state.step):
                    problem = f"the run is at step {step}; name a later step"
                    raise UserError(f"--stop-at-step {stop_at_step}: {problem}")
                trainer.request_stop(stop_at_step)
            if folder.console:
                show_start(folder, trainer)
        status = train_to_end(trainer, folder, started)
        if status != EXIT_FAILED:
            stop(world)
        return status
    except SharedError as error:  # rank 0 raises what the command line prints
        record(f"error: {error}")
        return EXIT_BAD_INPUT
    finally:
        if folder is not None:
            folder.close()


# ---- building ------------------------------------------------------------------------------------


def data_paths(config: TrainConfig) -> Sequence[str]:
    """Return the dataset folders that a config names; none: it trains on the default text."""
    return config.data.paths or ([config.data.path] if config.data.path else [])


def open_splits(
    config: TrainConfig, report: Callable[[str], None]
) -> tuple[TrainConfig, TokenDataset, TokenDataset]:
    """Open or build the dataset; return the config with its vocabulary, and the splits."""
    data, vocab_size = config.data, config.model.vocab_size
    cache = cache_folder(data.cache_dir)
    paths: Sequence[str | Path] = data_paths(config) or [
        build_default_corpus(vocab_size=data.corpus_vocab_size, cache_dir=cache, report=report)
    ]
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


def _build(
    config: TrainConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    allow_change: Sequence[str],
    stop_at_step: int | None,
) -> Trainer:
    run_dir, source = folder.path, None  # the checkpoint that is continued; its files are mapped
    with world.failing_together():
        if path := folder.source or folder.origin:
            source = checkpoint.parse(path)
            config = resuming.settle_decay(config, source, decays=folder.decays)
            allow_change = [*allow_change, *(resuming.DECAY_MAY_CHANGE if folder.decays else ())]
    # The data; if there are none yet, the first rank of each node builds them.
    for first_of_node in (True, False):
        with world.failing_together():
            if (world.local_rank == 0) is first_of_node:
                config, train, val = open_splits(config, folder.note)
    recorded: dict[str, Any] = {"data": {"train": train.facts, "val": val.facts}, "history": []}
    if world.size > 1:  # before any collective that one of them may have reason to skip
        world.agree(facts_of_rank(config, recorded["data"], {"--stop-at-step": stop_at_step}))
    # What "auto" stands for, and whether the checkpoint may be continued
    state = source.state if source else {}
    if isinstance(rows := config.train.micro_batch, str):
        with world.failing_together():
            if source is not None:
                rows = source.config.train.micro_batch
            elif world.leads:
                from fasttrain.engine.memory import best_micro_batch  # half a second of imports

                rows = best_micro_batch(config, world.size, device, report=folder.note)
        rows = world.share(rows)
        config = replace(config, train=replace(config.train, micro_batch=rows))
    with world.failing_together():
        path = train.tokenizer_path if config.eval.tasks or config.eval.prompts != () else None
        tokenizer = load_tokenizer(path) if path else None
        if config.eval.prompts is None and tokenizer is not None:
            prompts = beginnings(val, tokenizer)
            config = replace(config, eval=replace(config.eval, prompts=prompts))
        shape = step_shape(config.train, config.data.seq_len, world.size)
        if source is not None:
            recorded["history"] = resuming.check_resumable(
                source, config, recorded["data"], allow_change, shape.samples
            )
        if world.leads:
            made_by = provenance(device, source.path if source else None)
            threads = torch.get_num_threads() if device.type == "cpu" else None
            other = {"threads": threads, "run.compile": resolve_compile(config, device)}
            recorded |= {"provenance": made_by, "torch": made_by["torch"], **other}
            lineage = state.get("lineage", [])
            if source is not None and folder.origin is not None:
                lineage = [*lineage, folder.parent(source.step)]
            recorded |= {"lineage": lineage} if lineage else {}
            exact = source is None or device.type == "cpu" or config.run.deterministic
            if said := resuming.made_otherwise(state, made_by | other, exact=exact):
                folder.warn(said)
    # The model, as the ranks hold it, and its optimizers
    torch.manual_seed(config.run.seed)
    make = partial(Transformer, config.model, seq_len=config.data.seq_len)
    if world.size > 1:
        with torch.device("meta"):
            n_parameters = make().num_parameters()
        world = choose_mode(config.distributed, world, n_parameters, device)
    if world.sharded:
        model = make_sharded(make, world, config.distributed, device=device)
    else:
        model = make().to(device)
    resolved = resolve(config, device, world)
    with world.failing_together():
        if (other_run := config.model.init_from) is not None and source is None:
            _, found = checkpoint.saved_parameters(Path(other_run))
            checkpoint.check_model(config, found, f"model.init_from = {other_run}")
            own = model.state_dict()
            model.load_state_dict({name: cut(tensor, own[name]) for name, tensor in found.items()})
    optimizers = build_optimizers(model, config.optim, resolved.precision.compute)
    if world.rank:  # from here on each rank draws its own numbers, for dropout
        torch.manual_seed(config.run.seed + world.rank)
    # Room for checkpoints, samples, batches
    order = LoaderOptions.of(config, micro_batch=shape.rows, rank=world.rank, world_size=world.size)
    sampler = partial(_sample, config, tokenizer) if config.eval.prompts and tokenizer else None
    with world.failing_together():
        if world.leads:
            copies = 1 if config.train.ema_decay is None else 2
            n_bytes = copies * sum(tensor.nbytes for tensor in model.state_dict().values())
            n_bytes += sum(map(state_bytes, optimizers))
            held = config.checkpoint.keep_last + bool(folder.mirror)  # one is kept to be copied
            check_disk(run_dir, n_bytes, held)
            if folder.mirror:  # takes the name there, before the first step
                folder.mirror.put("config.toml", config_to_toml(config, redact).encode())
            if train.tokenizer_path is not None and folder.source is None:
                write_atomically(run_dir / "tokenizer.json", train.tokenizer_path.read_bytes())
        score_tasks = _task_scorer(
            config, tokenizer, folder.warn, precision=resolved.precision, world=world
        )
        loader = Loader(train, order, device=device, position=state.get("position", 0))
    trainer = Trainer(
        model,
        optimizers,
        resolved,
        train_loader=loader,
        val_dataset=val,
        run_dir=run_dir,
        console=folder.console,
        sampler=sampler,
        score_tasks=score_tasks,
        recorded=recorded,
        mirror=folder.mirror,
    )
    if source is not None:
        try:
            trainer.saver.load(source.path)
            if folder.decays:
                resuming.begin_decay(trainer.state, config, source.path)
            if folder.source is None:
                trainer.saver.saved_at = None  # in this folder
        except UserError:
            trainer.close()
            raise
        jump = resuming.lr_jump(source, config, trainer.state.total_steps)
        if world.leads and jump and not folder.decays:
            folder.warn(jump)
    elif not folder.new:  # what a run that was never saved has left
        trainer.reporter.drop_after(0)
    if world.leads:
        folder.drop_newer()
        write_atomically(run_dir / "config.toml", config_to_toml(config, redact).encode())
        folder.begin_record(trainer.state.step)
    return trainer


def _sample(
    config: TrainConfig, tokenizer: Tokenizer, model: Transformer, number: int
) -> tuple[str, str]:
    wanted, device = config.eval, model.embedding.weight.device
    prompts = wanted.prompts or ("",)
    prompt = prompts[number % len(prompts)]
    # A prompt of which the tokenizer knows nothing starts like a new document.
    ids = encode(tokenizer, prompt) or [end_of_text_id(tokenizer) or 0]
    options: dict[str, Any] = {"temperature": wanted.temperature, "top_k": wanted.top_k}
    options["generator"] = torch.Generator(device).manual_seed(config.run.seed + number)
    tokens = torch.tensor([ids], device=device)
    out = generate(model, tokens, max_new_tokens=wanted.sample_tokens, **options)
    return prompt, tokenizer.decode(out[0, len(ids) :].tolist())


def _task_scorer(
    config: TrainConfig, tokenizer: Tokenizer | None, warn: Callable[[str], None], **options: Any
) -> TaskScorer | None:
    if not config.eval.tasks:
        return None
    if tokenizer is None:
        raise UserError("eval.tasks needs the dataset's tokenizer.json; there is none, so unset it")
    from fasttrain.harness import HarnessModel, Stopped, load_tasks, scores

    tasks = load_tasks(config.eval.tasks, config.eval.tasks_path, quiet=True)
    options["batch_size"] = config.eval.batch_size or config.train.micro_batch

    def score(model: Transformer, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        lm = HarnessModel(model=model, tokenizer=tokenizer, should_stop=should_stop, **options)
        try:
            return scores(lm.run(tasks, config.eval.tasks_limit))
        except Stopped:
            return None
        except Exception as error:  # of a task; the run is worth more
            warn(f"eval.tasks: no scores: {error} (training goes on)")
            return {}

    return score
