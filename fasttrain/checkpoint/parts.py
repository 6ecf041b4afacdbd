"""What a checkpoint consists of, parsed as a resume parses it: before its commit and ever after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.checkpoint import files as disk
from fasttrain.checkpoint.files import CheckpointError, state_type
from fasttrain.checkpoint.ranks import Slices, read_slices
from fasttrain.config import ConfigError, TrainConfig, load_config
from fasttrain.config.untrusted import misfit

__all__ = ["Parts", "parse", "verify"]


class Parts(NamedTuple):
    """Config and state of a checkpoint, and where its tensors lie, none of which was read."""

    step: int
    files: dict[str, Any]  # those of tensors, with their bytes and hashes
    config: TrainConfig
    state: dict[str, Any]
    layouts: dict[str, disk.Layout]  # by file
    slices: Slices  # by file, of the tensors that are not whole in it

    def group(self, stem: str) -> dict[str, Tensor]:
        """Return the whole tensors of a group on the device ``meta``, where they have no values."""
        return {
            name: torch.empty(
                slices[name].shape if name in slices else shape, dtype=dtype, device="meta"
            )
            for file, layout in self.layouts.items()
            if file.partition(".")[0] == stem
            for slices in [self.slices.get(file, {})]
            for name, (dtype, shape, _, _) in layout.items()
        }


def verify(path: Path) -> Parts:
    """Read every byte of a checkpoint folder; CheckpointError names the file that is off."""
    parts = parse(path)
    for name, entry in parts.files.items():
        disk.read_file(Path(path) / name, entry, keep=False)
    return parts


def parse(path: Path) -> Parts:
    """Return the parts of a checkpoint folder; of the files of tensors no more than the headers.

    Raises:
        CheckpointError: one cannot be parsed, or they contradict each other; names the file.
    """
    path = Path(path)
    manifest = disk.read_manifest(path)
    files = {name: e for name, e in manifest["files"].items() if name.endswith(".safetensors")}
    for name in sorted(manifest["files"].keys() - files.keys()):
        disk.read_file(path / name, manifest["files"][name], keep=False)
    layouts = {name: disk.read_header(path / name) for name in files}
    slices = read_slices(path, manifest)
    for name, parts in slices.items():
        if lost := parts.keys() - layouts.get(name, {}).keys():
            raise CheckpointError(f"{path / name}: malformed: {min(lost)} is not in it")
    file = path / "config.toml"
    try:
        config = load_config(file)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error
    file = path / "state.json"
    state, _ = disk.read_json(file)
    problem = misfit(state_type(state), state) or _contradiction(state, manifest["step"], config)
    if problem is not None:
        raise CheckpointError(f"{file}: malformed: {problem}")
    return Parts(manifest["step"], files, config, state, layouts, slices)


def _contradiction(state: Mapping[str, Any], step: int, config: TrainConfig) -> str | None:
    """Return how the counts of a run contradict each other, if they do.

    Each step of a regular run takes the same number of samples, and so does a batch that a rollback
    passed over.
    """
    if state.get("step", step) != step:
        return f"step is {state['step']}, and the manifest is of step {step}"
    if state.get("total_steps") == 0:
        return "total_steps is 0, and a run has one"
    known = {"position", "tokens", "samples_per_step"} <= state.keys()
    if not (known and state.get("regular")):
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
