"""Small checkpoints for tests: how to save one, and how an attacker would."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fasttrain.checkpoint import CheckpointWriter
from fasttrain.checkpoint import files as disk

Groups = dict[str, dict[str, torch.Tensor]]
CONFIG = '[run]\nname = "toy"\n[train]\nsteps = 1\n'


def groups(step: int = 1) -> Groups:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(12, 5, generator=generator)
    return {
        "model": {
            "weight": weight.requires_grad_(),
            "transposed": weight.detach().T,
            "half": torch.randn(7, generator=generator).bfloat16(),
            "flags": torch.tensor([True, False, True]),
            "scalar": torch.tensor(step),
            "empty": torch.empty(0, 4),
        },
        "optimizer": {"exp_avg": torch.randn(12, 5, generator=generator)},
        "rng": {"cpu": torch.randint(256, (33,), generator=generator, dtype=torch.uint8)},
    }


def save(folder: Path, *steps: int, keep_last: int = 3, metric: float | None = None) -> Path:
    writer = CheckpointWriter(folder, keep_last=keep_last)
    for step in steps:
        path = writer.save(step, groups(step), {"step": step}, CONFIG, metric=metric)
    writer.close()
    return path


def world_of(rank: int, size: int, session: str) -> Any:
    """One of several ranks in this process, which can only agree on the name of their session."""
    return SimpleNamespace(rank=rank, size=size, share=lambda value: session)


def reseal(path: Path, **changes: Any) -> None:
    """Makes the manifest fit what now lies in the folder, as an attacker would."""
    file = path / disk.MANIFEST
    manifest = json.loads(file.read_text())
    manifest.pop("sha256")
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"][name] = entry
    file.write_bytes(disk.seal({**manifest, **changes}))
