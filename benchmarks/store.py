"""Files of measured figures: ``results/<processor>/<suite>.json``.

A file holds ``suite``, ``date`` (UTC), ``commit`` (with ``+`` where the checkout had changes),
``machine``, ``ceilings`` and ``benchmarks``: for each its ``name`` and either ``skipped``, the
reason, or what was measured. Seconds are in ``times_s`` (a list over rounds for each rival, ours
first), ``median_s`` and ``speedup``. Nothing here imports torch.
"""

import json
import os
import re
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


def document(
    suite: str, benchmarks: Iterable[Document], machine: Document, ceilings: Document
) -> dict[str, Any]:
    """Return the contents of a file; ``machine`` is what `harness.machine` says."""
    return {
        "suite": suite,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": machine.get("commit"),
        "machine": {key: value for key, value in machine.items() if key != "commit"},
        "ceilings": dict(ceilings),
        "benchmarks": list(benchmarks),
    }


def write(path: Path, data: Document) -> None:
    """Write a file, in one piece or not at all: a run may be cut off at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Five significant digits: more is noise, and makes the files' differences unreadable.
    exact = json.dumps(data, allow_nan=False)
    rounded = json.loads(exact, parse_float=lambda digits: float(f"{float(digits):.5g}"))
    text = json.dumps(rounded, indent=1, ensure_ascii=False)
    # Lists of numbers on one line.
    text = re.sub(r"\[\s+([-\d.e+,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def save(results: Path, suite: str, benchmarks: Iterable[Document], *facts: Document) -> None:
    """Write the figures of a suite to their place below ``results``: see `document`."""
    data = document(suite, benchmarks, *facts)
    write(results / folder_of(data["machine"]) / f"{suite}.json", data)


def read_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return every file of every processor, in the order of their paths."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/*.json"))]
