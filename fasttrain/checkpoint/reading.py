"""Finding, verifying and loading checkpoints; a save is parsed like this before its commit."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import CheckpointError
from fasttrain.checkpoint.ranks import Pieces, read_slices
from fasttrain.command import tell
from fasttrain.config import ConfigError, TrainConfig, UserError, load_config, misfit
from fasttrain.model.transformer import Transformer

_SMALL_TABLE = 1 << 24  # numbers in the rotary tables of any model: 64 MB, 270 MB while computed


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, and where on the disk its tensors lie."""

    path: Path
    step: int
    tensors: dict[str, Tensor]  # by `group.name`, as in `model.head.weight`
    state: dict[str, Any]
    config: TrainConfig
    files: dict[str, Any]  # those of tensors, with their bytes and hashes
    pieces: dict[str, Pieces]  # of each tensor, read from the files when they are used

    def group(self, stem: str) -> dict[str, Tensor]:
        """Return the tensors of a group, by the names they were saved under."""
        prefix = f"{stem}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def parse(path: Path, written: Mapping[str, dict[str, Tensor]] | None = None) -> Checkpoint:
    """Read all but the tensors, which are on the device ``meta``.

    What was ``written`` by this process, by file, is not looked for on the disk. Raises
    CheckpointError, which names the file, if one cannot be parsed or contradicts another.
    """
    path = Path(path)
    manifest = disk.read_manifest(path)
    entries = manifest["files"]
    files = {name: e for name, e in entries.items() if name.endswith(".safetensors")}
    texts = {n: disk.read_file(path / n, e) for n, e in entries.items() if n not in files}
    stored = {n: (written or {}).get(n) or disk.map_tensors(path / n) for n in files}
    pieces = read_slices(path, manifest, texts, stored)
    tensors = {n: t.new_empty(s.shape, device="meta") for n, ((s, t), *_) in pieces.items()}
    file = path / "config.toml"
    try:
        config = load_config(file)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error
    file = path / "state.json"
    state = disk.parse_json(file, texts[file.name])
    kind = disk.SavedLibraryRun if "epoch" in state else disk.SavedModel
    problem = misfit(disk.SavedRun if "position" in state else kind, state)
    if problem := problem or _contradiction(state, manifest["step"], config):
        raise CheckpointError(f"{file}: malformed: {problem}")
    return Checkpoint(path, manifest["step"], tensors, state, config, files, pieces)


def _contradiction(state: Mapping[str, Any], step: int, config: TrainConfig) -> str | None:
    """Return how the counts of a run contradict each other, if they do.

    Each step of a regular run takes the same number of samples, as does a batch that was skipped.
    """
    if state.get("step", step) != step:
        return f"step is {state['step']}, and the manifest is of step {step}"
    if state.get("total_steps") == 0:
        return "total_steps is 0, and a run has one"
    if not (state.get("regular") and {"position", "tokens", "samples_per_step"} <= state.keys()):
        return None
    samples, passed = state["samples_per_step"], len(state["faults"]["passed_over"])
    first = step * samples
    if not first <= state["position"] <= first + passed * samples:
        return (
            f"position is {state['position']}, and {step} steps of {samples} samples with {passed} "
            f"passed over end at {first}"
        )
    tokens, most = state["tokens"], first * config.data.seq_len
    if not min(step, 1) <= tokens <= most:
        return f"tokens is {tokens}, and {first} samples of {config.data.seq_len} hold {most}"
    return None


def verify(path: Path) -> Checkpoint:
    """Read every byte of a checkpoint folder; CheckpointError names the file that is off."""
    return load(path, only=())


def load(path: Path, *, only: Collection[str] | None = None) -> Checkpoint:
    """Read a checkpoint folder and verify every byte; CheckpointError if anything is off.

    Groups that ``only`` does not name are verified and dropped.
    """
    found = parse(path)
    for name, entry in found.files.items():
        disk.read_file(found.path / name, entry)
    tensors: dict[str, Tensor] = {}
    for name, pieces in found.pieces.items():
        if only is None or name.partition(".")[0] in only:
            tensors[name] = torch.empty_like(found.tensors[name], device="cpu")
            for part, tensor in pieces:
                part.of(tensors[name]).copy_(tensor)  # the file may soon be removed
    return replace(found, tensors=tensors)


def resolve(
    run_or_checkpoint: Path, which: str = "auto", *, report: Callable[[str], None] = tell
) -> Path:
    """Return the verified checkpoint folder that a run folder or a checkpoint names.

    Of a run, `auto` is the newest that verifies, after a line to `report` for each that does not;
    `latest` and `best` are that one or a CheckpointError.
    """
    path = Path(run_or_checkpoint)
    found = disk.candidates(path)
    if found != [path] and which != "auto":
        name = disk.pointed(found[0].parent / which)
        found = [p for p in found if p.name.removeprefix(".old-") == name]
        if not found:
            raise CheckpointError(f"{path}: has no {which!r} checkpoint; use 'auto' for the newest")
    for candidate in found:
        try:
            return verify(candidate).path
        except CheckpointError as error:
            if candidate == path or which != "auto":
                raise
            why = f"its only checkpoint does not verify: {error}"
            if len(found) > 1:
                report(f"WARNING: passing over a damaged checkpoint: {error}")
                why = f"none of its {len(found)} checkpoints verifies"
    raise CheckpointError(
        f"{path}: {why}; restore one from a copy, or start a new run under another name"
    )


def saved_parameters(path: Path, which: str = "best") -> tuple[Checkpoint, dict[str, Tensor]]:
    """Return a checkpoint and its parameters as they were evaluated: averaged ones, if any.

    Of a run folder, ``which`` is the ``best`` checkpoint (the newest where none was evaluated) or
    the ``latest``. Raises UserError if there is none, or it is damaged.
    """
    if which not in ("best", "latest"):
        raise UserError(f"which must be 'best' or 'latest', got {which!r}")
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    evaluated = (checkpoints / "best").exists()
    folder = resolve(path, which if which == "latest" or evaluated else "auto")
    loaded = load(folder, only=("model", "ema"))
    return loaded, loaded.group("model") | loaded.group("ema")


def check_model(config: TrainConfig, found: Mapping[str, Tensor], source: object) -> None:
    """Refuse a config whose model is not that of a checkpoint, before any of the model is made.

    Raises UserError if parameters have other shapes, or buffers are out of proportion.
    """
    misfits = [f"model.n_layers = {config.model.n_layers}"]
    if len({n.split(".")[1] for n in found if n.startswith("blocks.")}) == config.model.n_layers:
        with torch.device("meta"):
            model = Transformer(config.model, seq_len=config.data.seq_len)
        sides = found, model.state_dict()
        there, here = ({n: tuple(t.shape) for n, t in side.items()} for side in sides)
        misfits = [
            f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        n_stored, n_table = sum(t.numel() for t in found.values()), 0  # tables are in no file
        if model.rope_cos is not None:
            n_table = config.data.seq_len * model.head_dim
        if n_table > max(_SMALL_TABLE, n_stored):
            misfits = [f"data.seq_len = {config.data.seq_len} with {n_stored:,} parameters"]
    if misfits:
        more = f", and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise UserError(
            f"{source}: its tensors do not fit [model] and data.seq_len: {'; '.join(misfits[:3])}"
            f"{more}; use the config that it was trained with"
        )
