"""Checkpoints that are whole or absent, verified to the last byte, and never executed.

A checkpoint is a folder of safetensors and text files, sealed by `manifest.json`:

    step-00001000/  model.safetensors  optimizer.safetensors …   one file a group of tensors
                    state.json  config.toml                  (several ranks: checkpoint_ranks.py)
                    manifest.json   bytes and SHA-256 of each file, and of the manifest itself

Commit protocol: every file is written into `.tmp-…` beside its place and fsynced; so is the folder;
then it is renamed, the parent is fsynced, and only then do the pointers `latest` and `best` (text
files with a folder's name) move, each by write, fsync, rename, fsync. A step that is saved again
moves the older folder to `.old-…` for that moment; readers take it where its successor is missing.

The training thread is held for one copy of the tensors into reused host buffers that are laid out
as the files are, so that the background thread hashes and writes them as they lie.

`python -m fasttrain.checkpoint PATH` lists and verifies a checkpoint or all those of a run.
"""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain import checkpoint_files as disk
from fasttrain.checkpoint_files import CheckpointError
from fasttrain.checkpoint_parts import Parts, parse, verify
from fasttrain.checkpoint_ranks import put
from fasttrain.checkpoint_writer import CheckpointWriter
from fasttrain.command import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, command, prog, tell
from fasttrain.config import TrainConfig, config_to_toml

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "load",
    "main",
    "parse",
    "resolve",
    "verify",
]


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


# ---- the command ---------------------------------------------------------------------------------


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """List and verify; 0 if all is well, 1 if anything is damaged, 2 if there is nothing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"usage: {prog('checkpoint')} RUN_OR_CHECKPOINT_FOLDER")
        return EXIT_DONE if list(arguments) in (["-h"], ["--help"]) else EXIT_BAD_INPUT
    shown = damaged = 0
    for path in disk.candidates(Path(arguments[0])):
        print(path)
        try:
            parts = verify(path)
            _print_files(path, parts.layouts)
            print("  verified: every byte is as it was written; config and state can be resumed")
            if not shown:
                _print_origin(parts)
            shown += 1
        except CheckpointError as error:
            damaged += 1
            _print_files(path, {})
            print(f"  DAMAGED: {error}")
    return EXIT_FAILED if damaged else EXIT_DONE


def _print_files(path: Path, layouts: Mapping[str, disk.Layout]) -> None:
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        line = f"  {file.name:<24} {file.lstat().st_size:>15,} bytes"
        if (layout := layouts.get(file.name)) is not None:
            parameters = sum(math.prod(shape) for _, shape, _, _ in layout.values())
            line += f" {len(layout):>7,} tensors {parameters:>15,} parameters"
        print(line)


def _print_origin(parts: Parts) -> None:
    """Print what was changed on purpose when the run was resumed, and the config."""
    for change in parts.state.get("history", []):
        print(
            f"  changed at step {change['step']}: {change['key']}: {change['old']} → "
            f"{change['new']} ({change['when']})"
        )
    print(config_to_toml(parts.config))


if __name__ == "__main__":
    sys.exit(main())
