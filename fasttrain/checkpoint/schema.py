"""What the JSON of a checkpoint holds, and whether some JSON is that. Standard library only.

A seal keeps out accidents, not people: what these types do not say may be anything.
"""

from typing import Any, Literal, NotRequired, TypedDict

from fasttrain.config.untrusted import misfit

__all__ = ["Manifest", "RankRecord", "misfit", "state_type"]


Kind = Literal["overflow", "nonfinite", "spike", "transient", "persistent"]
Number = float | Literal["nan", "inf", "-inf"]  # JSON has none that is not finite


class Entry(TypedDict):
    """A file in the manifest."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """``manifest.json``."""

    step: int
    commit: int
    metric: float | None
    files: dict[str, Entry]
    ranks: NotRequired[int]


class RankRecord(TypedDict):
    """``rank-00000.json``: which slices of tensors lie in the files of a rank."""

    slices: dict[str, dict[str, list[int]]]


class Change(TypedDict):
    """A setting that was changed on purpose when the run was resumed."""

    when: str
    step: int
    key: str
    old: str
    new: str


class Faults(TypedDict):
    """What `fasttrain.faults.FaultPolicy` keeps."""

    skipped_steps: int
    spikes: int
    rollbacks: int
    passed_over: list[int]
    row: list[tuple[int, int, Kind, Number, Number]]


class ModelState(TypedDict):
    """``state.json`` of parameters that belong to no run."""

    step: NotRequired[int]
    history: NotRequired[list[Change]]


class RunState(TypedDict):
    """``state.json`` of `fasttrain.train`."""

    step: int
    position: int
    total_steps: int | None
    eval_due: bool
    trained_s: float
    best_val_loss: float | None
    loss_ema: float | None
    faults: Faults
    tokens: NotRequired[int]  # this and those below are not in all checkpoints of version 1
    samples_per_step: NotRequired[int]
    regular: NotRequired[bool]
    val_losses: NotRequired[list[float | None]]
    data: NotRequired[dict[str, dict[str, Any]]]
    history: NotRequired[list[Change]]
    provenance: NotRequired[dict[str, str | bool | None]]


class LibraryState(TypedDict):
    """``state.json`` of `fasttrain.Trainer`, as far as it does not depend on torch's classes."""

    step: int
    epoch: int
    batch_in_epoch: int
    skipped_steps: int
    library: dict[str, Any]
    history: NotRequired[list[Change]]
    provenance: NotRequired[dict[str, str | bool | None]]


def state_type(state: dict[str, Any]) -> type:
    """Return what a state claims to be."""
    if "position" in state:
        return RunState
    return LibraryState if "epoch" in state else ModelState
