"""Files of measured figures: ``results/<processor>/<suite>.json``.

A file holds ``suite``, ``date`` (UTC), ``commit`` (with ``+`` where the checkout had changes),
``machine``, ``ceilings`` and ``benchmarks``: for each its ``name`` and either ``skipped``, the
reason, or what was measured. Seconds are in ``times_s`` (a list over rounds for each rival, ours
first), ``median_s`` and ``speedup``. Nothing here imports torch.
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
PATHS = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENV = {"PYTHONPATH": os.pathsep.join(PATHS), "PYTHONUNBUFFERED": "1"}  # of child processes
Document = Mapping[str, Any]


def slug(text: str) -> str:
    """Return ``text`` as a folder's name: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def processor_of(machine: Document) -> str:
    """Return what was measured: ``AMD EPYC, AVX2``, as torch saw it; ``NVIDIA H200``."""
    return machine["device"] + (f", {machine['isa']}" if machine["kind"] == "cpu" else "")


def folder_of(machine: Document) -> str:
    """Return the name of a processor's folder: ``amd-epyc-avx512``, ``nvidia-h100-80gb-hbm3``."""
    return slug(processor_of(machine).replace("AVX-", "AVX"))


def commit() -> str | None:
    """Return the short hash of the checkout's commit, ``+`` where it has changes; None: no git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        changes = git("status", "--porcelain", "--", "fasttrain", "kernels", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def document(
    suite: str, benchmarks: Iterable[Document], machine: Document, ceilings: Mapping[str, float]
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
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def write(path: Path, data: Document) -> None:
    """Write a file, in one piece or not at all: a run may be cut off at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(data), indent=1, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line.
    text = re.sub(r"\[\s+([-\d.e+,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def save(results: Path, document: Document) -> None:
    """Write a document to its place below ``results``."""
    write(results / folder_of(document["machine"]) / f"{document['suite']}.json", document)


def read_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return every file of every processor, in the order of their paths."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/*.json"))]
