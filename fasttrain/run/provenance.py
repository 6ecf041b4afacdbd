"""What made a run: code, packages, machine, command; for its log and for each of its checkpoints.

It takes some 20 ms: one call of git, and no import.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fasttrain import __version__
from fasttrain.command import redact

PACKAGES = ("triton", "numpy", "tokenizers", "safetensors")
_ROOT = Path(__file__).parents[2]  # of the checkout, where the package lies in one
_DRIVER = r"(\d+\.\d+(\.\d+)?)"
_GIT_S = 2.0  # on a file system that hangs; then the commit is read, and changes are not known


def provenance(device: torch.device, parent: Path | None = None) -> dict[str, str | bool | None]:
    """Return what makes a run on ``device``, for JSON; None: not known, or not there.

    ``parent`` is the checkpoint that it continues.
    """
    commit, changed = _checkout(_ROOT)
    on_gpu = device.type == "cuda"
    return {
        "fasttrain": __version__,
        "commit": commit,
        "uncommitted_changes": changed,  # of the code
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{package: _version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "cuda": (torch.version.cuda or torch.version.hip) if on_gpu else None,
        "driver": _first(_DRIVER, "/proc/driver/nvidia/version") if on_gpu else None,
        "command": redact(shlex.join(sys.orig_argv)),
        "parent": redact(str(parent)) if parent else None,
    }


def _processor() -> str:
    name = _first(r"model name\s*: (.+)", "/proc/cpuinfo")
    return name or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first(pattern: str, file: str) -> str | None:
    """Return what the group of ``pattern`` matches in a file, None where there is no such thing."""
    try:
        found = re.search(pattern, Path(file).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a checkout, and whether the code has changed since; None: not known."""
    if not (root / ".git").exists():
        return None, None
    # What a hook of git's sets would lead to another repository; the index is left as it is.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", "status", "--porcelain=v2"]
    command += ["--branch", "--no-ahead-behind", "--", "fasttrain", "kernels"]
    try:
        told = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_S,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no git, or it does not trust the folder's owner
        return _head(root), None
    head, *changes = (x for x in told.splitlines() if x[0] != "#" or "branch.oid" in x)
    return _hash(head.split()[-1]), bool(changes)


def _hash(text: str) -> str | None:
    return text if re.fullmatch("[0-9a-f]{40,64}", text) else None


def _head(root: Path) -> str | None:
    """Return the commit that a checkout is at, without git."""
    try:
        folder = root / ".git"
        if folder.is_file():  # a worktree
            folder = root / folder.read_text("utf-8").removeprefix("gitdir:").strip()
        common = folder / "commondir"
        common = folder / common.read_text("utf-8").strip() if common.exists() else folder
        head = (folder / "HEAD").read_text("utf-8").strip()
        if head.startswith("ref: "):
            name = head.removeprefix("ref: ")
            if (common / name).is_file():
                head = (common / name).read_text("utf-8").strip()
            else:
                packed = (common / "packed-refs").read_text("utf-8").splitlines()
                head = next((x.split()[0] for x in packed if x.endswith(f" {name}")), "")
    except (OSError, UnicodeDecodeError):
        return None
    return _hash(head)
