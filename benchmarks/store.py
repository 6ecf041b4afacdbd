"""Files of measured figures: ``results/<processor>/<suite>.json``.

A file holds ``suite``, ``date`` (UTC), ``commit`` (with ``+`` where the checkout had changes),
``machine``, ``ceilings`` and ``benchmarks``: for each its ``name`` and either ``skipped``, the
reason, or what was measured. Seconds are in ``times_s`` (a list over rounds for each rival, ours
first), ``median_s`` and ``speedup``.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def slug(text: str) -> str:
    """Return ``text`` as a folder's name: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def processor_of(machine: Mapping[str, Any]) -> str:
    """Return what was measured: ``AMD EPYC, AVX2``, as torch saw it; ``NVIDIA H200``."""
    device: str = machine["device"]
    return f"{device}, {machine['isa']}" if machine["kind"] == "cpu" else device


def folder_of(machine: Mapping[str, Any]) -> str:
    """Return the name of a processor's folder: ``amd-epyc-avx512``, ``nvidia-h100-80gb-hbm3``."""
    return slug(processor_of(machine).replace("AVX-", "AVX"))


def commit() -> str | None:
    """Return the short hash of the checkout's commit, ``+`` where it has changes; None: no git."""
    try:
        head, status = (
            subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--", "fasttrain", "kernels", "benchmarks/*.py"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if status else "")


def document(
    suite: str,
    benchmarks: Iterable[Mapping[str, Any]],
    machine: Mapping[str, Any],
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    """Return the contents of a file."""
    return {
        "suite": suite,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "machine": dict(machine),
        "ceilings": dict(ceilings),
        "benchmarks": list(benchmarks),
    }


def _rounded(value: Any) -> Any:
    """Five significant digits: more is noise, and makes the files' differences unreadable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file, in one piece or not at all: a run may be cut off at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(data), indent=1, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line.
    text = re.sub(r"\[\s+([-\d.e+,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return every file of every processor, in the order of their paths."""
    paths = sorted(folder.glob("*/*.json"))
    return [json.loads(path.read_text("utf-8")) for path in paths]
