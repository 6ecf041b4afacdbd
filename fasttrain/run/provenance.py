"""What made a run: code, packages, machine, command; for its log and for each of its checkpoints.

It takes some 20 ms: one call of git, and no import.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import torch

from fasttrain import __version__
from fasttrain.redact import redact

PACKAGES = ("triton", "numpy", "tokenizers", "safetensors")
_ROOT = Path(__file__).parents[2]  # of the checkout, where the package lies in one
_DRIVER = r"(\d+\.\d+(\.\d+)?)"


def provenance(device: torch.device, parent: Path | None = None) -> dict[str, str | bool | None]:
    """Return what makes a run on ``device``, for JSON; None: not known, or not there.

    ``parent`` is the checkpoint that it continues.
    """
    commit, changed = _checkout(_ROOT)
    on_gpu = device.type == "cuda"
    processor = _first(r"model name\s*: (.+)", "/proc/cpuinfo") or platform.processor()
    return {
        "fasttrain": __version__,
        "commit": commit,
        "uncommitted_changes": changed,  # of the code
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: next((d.version for d in distributions(name=name)), None) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if on_gpu else processor or platform.machine(),
        "cuda": (torch.version.cuda or torch.version.hip) if on_gpu else None,
        "driver": _first(_DRIVER, "/proc/driver/nvidia/version") if on_gpu else None,
        "command": redact(shlex.join(sys.orig_argv)),
        "parent": redact(str(parent)) if parent else None,
    }


def _first(pattern: str, file: str) -> str | None:
    """Return what the group of ``pattern`` matches in a file, None where there is no such thing."""
    with suppress(OSError):
        if found := re.search(pattern, Path(file).read_text(encoding="utf-8", errors="replace")):
            return found[1]
    return None


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a checkout, and whether the code has changed since; None: not known."""
    if not (root / ".git").exists():
        return None, None
    # Variables that a git hook sets would lead to another repository; the index is not refreshed.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    # A checkout of another user, as in a container, is read too: its code runs here anyway.
    command = ["git", "-C", str(root), "-c", "safe.directory=*", "-c", "core.fsmonitor=false"]
    command += ["--no-optional-locks", "status", "--porcelain=v2", "--branch", "--no-ahead-behind"]
    command += ["--", "fasttrain", "kernels"]
    with suppress(OSError, subprocess.SubprocessError):  # no git, or a file system that hangs
        shown = subprocess.check_output(
            command, timeout=2.0, env=environment, text=True, stderr=subprocess.DEVNULL
        )
        head, *changes = (x for x in shown.splitlines() if x[0] != "#" or "branch.oid" in x)
        commit = head.split()[-1]
        return None if commit == "(initial)" else commit, bool(changes)
    return None, None
