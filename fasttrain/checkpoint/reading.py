"""Finding, verifying and loading checkpoints."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import CheckpointError
from fasttrain.checkpoint.parts import parse, verify
from fasttrain.checkpoint.ranks import put
from fasttrain.command import tell
from fasttrain.config import TrainConfig, UserError
from fasttrain.model.transformer import outline


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint. `tensors` are named `group.name`, as in `model.head.weight`."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    config: TrainConfig

    def group(self, stem: str) -> dict[str, Tensor]:
        """The tensors of one file, by the names they were saved under."""
        prefix = f"{stem}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def load(
    path: Path, *, map_location: str | torch.device = "cpu", only: Collection[str] | None = None
) -> Checkpoint:
    """Reads a checkpoint folder, verifying every byte as it is read; nothing in it is executed.

    Args:
        path: a checkpoint folder, as `resolve` returns it.
        map_location: the device of the tensors.
        only: the groups to keep (all are verified); all of them if None.

    Raises:
        CheckpointError: anything in the folder is missing, additional, damaged or malformed.

    Memory: CPU tensors are views into one buffer a file, which lives as long as any of them.
    """
    path = Path(path)
    parts = parse(path)
    tensors: dict[str, Tensor] = {}
    for name, entry in parts.files.items():
        stem = name.partition(".")[0]
        data = disk.read_file(path / name, entry, keep=only is None or stem in only)
        if data is None:
            continue
        slices = parts.slices.get(name, {})
        for key, tensor in disk.as_tensors(path / name, data).items():
            put(tensors, f"{stem}.{key}", tensor.to(map_location), slices.get(key), path / name)
    return Checkpoint(
        path=path,
        step=parts.step,
        tensors=tensors,
        state=parts.state,
        config=parts.config,
    )


def resolve(
    run_or_checkpoint: Path, which: str = "auto", *, report: Callable[[str], None] = tell
) -> Path:
    """The verified checkpoint folder that a run folder, its `checkpoints` or a checkpoint names.

    Args:
        run_or_checkpoint: a checkpoint folder is taken as it is, whatever `which` says.
        which: `auto`: the newest that verifies; `latest`, `best`: that one or an error.
        report: called with a line for each checkpoint that `auto` passes over.

    Raises:
        CheckpointError: there is none, or the one that was named does not verify.
    """
    path = Path(run_or_checkpoint)
    if which not in ("auto", "latest", "best"):
        raise CheckpointError(f"checkpoint: which must be auto, latest or best, got {which!r}")
    found = disk.candidates(path)
    if found == [path]:
        verify(path)
        return path
    if which != "auto":
        name = disk.pointed(found[0].parent / which)
        named = next((p for p in found if p.name.removeprefix(".old-") == name), None)
        if named is None:
            raise CheckpointError(f"{path}: has no {which!r} checkpoint; use 'auto' for the newest")
        verify(named)
        return named
    for candidate in found:
        try:
            verify(candidate)
        except CheckpointError as error:
            why = f"its only checkpoint does not verify: {error}"
            if len(found) > 1:
                report(f"WARNING: passing over a damaged checkpoint: {error}")
                why = f"none of its {len(found)} checkpoints verifies"
        else:
            return candidate
    raise CheckpointError(
        f"{path}: {why}; restore one from a copy, or start a new run under another name"
    )


def saved_parameters(path: Path, which: str = "best") -> tuple[Checkpoint, dict[str, Tensor]]:
    """Return a checkpoint and the parameters in it that were evaluated: averaged ones, if any.

    Args:
        path: a run folder, or one checkpoint of it.
        which: of a run, the ``best`` checkpoint (the newest where none was evaluated) or the
            ``latest``.

    Raises:
        UserError: there is no such folder, no checkpoint in it, or it is damaged.
    """
    if which not in ("best", "latest"):
        raise UserError(f"which must be 'best' or 'latest', got {which!r}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder, such as runs/base")
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    evaluated = (checkpoints / "best").exists()
    folder = resolve(path, which if which == "latest" or evaluated else "auto")
    loaded = load(folder, only=("model", "ema"))
    return loaded, loaded.group("model") | loaded.group("ema")


def check_model(config: TrainConfig, found: Mapping[str, Tensor], source: Path) -> None:
    """Refuse a config whose model is not that of a checkpoint, before any of the model is made.

    Args:
        config: its vocabulary settled; where it is the checkpoint's own it may say anything.
        found: the parameters there, on any device.
        source: the checkpoint's folder.

    Raises:
        UserError: the parameters have other shapes, or what is made beside them is out of
            proportion.
    """
    problem = f"model.n_layers = {config.model.n_layers}"
    if len({n.split(".")[1] for n in found if n.startswith("blocks.")}) == config.model.n_layers:
        model = outline(config, sum(tensor.numel() for tensor in found.values()), source)
        problem = misfits_of(model.state_dict(), found)
    if problem:
        raise UserError(
            f"{source}: its tensors do not fit [model] and data.seq_len: {problem}; use the "
            "config.toml that the run was trained with"
        )


def misfits_of(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return which parameters have other shapes there than here, at most three of them."""
    misfits = [
        f"{name} is {_shape(found.get(name))} there and {_shape(wanted.get(name))} here"
        for name in sorted(wanted.keys() | found.keys())
        if _shape(found.get(name)) != _shape(wanted.get(name))
    ]
    more = f", and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    return "; ".join(misfits[:3]) + more


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
