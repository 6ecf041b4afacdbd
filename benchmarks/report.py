"""Figures as tables: the benchmarks' last lines, and the part of docs/benchmarks.md that is
measured (``make report``).

Nothing in that part is written by hand: what has no file is "not measured".
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from benchmarks import gpu_model
from benchmarks.store import ROOT, Document, processor_of, read_all

PAGE = ROOT / "docs/benchmarks.md"
PART = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.S)
KINDS = {"cpu": "On a CPU", "cuda": "On a GPU"}
# Whole runs and steps are in sight; ops and parts are folded away.
FIRST = ("chars", "run-base", "run-speedrun", "trainers", "busy", "step", "loop", "startup")
# What an entry may hold beside times, and how it reads.
SHOWN = {
    "wall_s": "{:.0f} s in all",
    "steps": "{:,.0f} steps",
    "val_loss": "validation loss {:.4f}",
    "val_bpb": "{:.3f} bits per byte",
    "gb_per_s": "{:,.1f} GB/s",
    "tflop_per_s": "{:,.2f} TFLOP/s",
    "mfu_of_measured_ceiling": "{:.1%} of the measured ceiling",
    "mfu_of_datasheet": "{:.1%} of the datasheet's peak",
    "launches_per_step": "{:,.0f} launches a step",
    "idle_fraction": "idle {:.2%}",
    "data_wait_ms": "{:.2f} ms waiting for data",
    "mb_per_s": "{:.1f} MB/s",
    "overhead": "overhead {:.1%}",
    "share_of_best": "{:.0%} of the best",
    "first_step_s": "{:.1f} s from `python` to its end",
    "peak_memory_gib": "{:.2f} GiB at the most",
}
# A CPU's caches and its copies that read what they overwrite make no ceilings of these.
CUDA_CEILINGS = {
    "gb_per_s": ("copy_gb_per_s", "{:.0%} of a copy"),
    "tflop_per_s": ("matmul_tflop_per_s", "{:.0%} of a matrix product"),
}


class Row(NamedTuple):
    """What a table has of one benchmark."""

    suite: str
    what: str
    processor: str
    ours: list[str]
    others: list[tuple[str, str, str]]  # name, time and its ratio to ours


def time_text(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _own(value: Any) -> float:
    """Return ours of a figure for each rival, and the worst of several."""
    if isinstance(value, Mapping):
        return _own(next(iter(value.values())))
    return float(max(value) if isinstance(value, list) else value)


def row_of(document: Document, entry: Document) -> Row | None:
    """Return the row for an entry; None for one that was skipped, failed or has no figure."""
    if "skipped" in entry or "failed" in entry:
        return None
    ours: list[str] = []
    losses, times = entry.get("val_loss"), entry.get("median_s", {})
    others = []
    for name, ratio in entry.get("speedup", {}).items():
        loss = f" (loss {_own(losses[name]):.4f})" if losses else ""
        others.append((name, time_text(times[name]), f"{ratio:.2f}{loss}"))
    if times:
        ours.append(time_text(_own(times)))
    if entry.get("tokens_per_s"):
        ours.append(f"{_own(entry['tokens_per_s']):,.0f} tokens/s")
    if entry.get("peak_bytes"):
        (_, own), *rest = entry["peak_bytes"].items()
        ours.append(f"{own / 1e6:,.0f} MB")
        others = [(k, f"{n / 1e6:,.0f} MB", f"{n / own:.1f} times the memory") for k, n in rest]
    ours += [f"{part} {share:.1%}" for part, share in entry.get("share_of_step", {}).items()]
    ours += [f"{module} {time_text(s)}" for module, s in entry.get("import_s", {}).items()]
    for key, text in SHOWN.items():
        if entry.get(key) is not None:
            value = _own(entry[key])
            ours.append(text.format(value))
            if key in CUDA_CEILINGS and document["machine"]["kind"] == "cuda":
                ceiling, text = CUDA_CEILINGS[key]
                ours.append(text.format(value / document["ceilings"][ceiling]))
    if not ours:
        return None
    name, _, arguments = entry["name"].rstrip("]").partition("[")
    what = name.replace("_", " ")
    if arguments:
        sizes = arguments.replace("-", "").isdigit()
        what += f", {arguments.replace('-', ' × ') if sizes else arguments}"
    return Row(document["suite"], what, processor_of(document["machine"]), ours, others)


def rows_of(documents: Iterable[Document]) -> list[Row]:
    """Return the rows of all entries, whole runs and steps first, processors side by side."""
    found = (row_of(document, entry) for document in documents for entry in document["benchmarks"])
    rows = [row for row in found if row is not None]
    places = {key: n for n, key in reversed([*enumerate((r.suite, r.what) for r in rows)])}
    return sorted(rows, key=lambda row: (rank(row.suite), places[row.suite, row.what]))


def rank(suite: str) -> int:
    """Return where a suite stands among all."""
    exact = (i for i, name in enumerate(FIRST) if suite == name or suite.startswith(f"{name}-"))
    return next(exact, len(FIRST))


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| what | processor | fasttrain | the others take … times as long |",
        "|---|---|---|---|",
    ]
    for row in rows:
        others = ", ".join(f"{name} {ratio}" for name, _, ratio in row.others)
        lines.append(f"| {row.what} | {row.processor} | {', '.join(row.ours)} | {others} |")
    return "\n".join(lines) + "\n"


def _processor_text(processor: str, documents: Sequence[Document]) -> str:
    machines = [document["machine"] for document in documents]
    cuda = machines[0]["kind"] == "cuda"

    def seen(key: str) -> str:
        return " and ".join(sorted({str(machine[key]) for machine in machines}))

    threads = "" if cuda else f", {seen('threads')} threads"
    toolkit = f", CUDA {seen('cuda')}" if cuda else ""
    peers = {k: v for machine in machines for k, v in machine.get("peers", {}).items()}
    listed = "".join(f", {name} {version}" for name, version in sorted(peers.items()))
    copies = sorted(d["ceilings"]["copy_gb_per_s"] for d in documents)
    products = sorted(d["ceilings"]["matmul_tflop_per_s"] for d in documents)
    dates = sorted(document["date"][:10] for document in documents)
    commits = ", ".join(sorted({d["commit"] for d in documents if d["commit"]}))
    return (
        f"**{processor}**{threads}: PyTorch {seen('torch')}{toolkit}, Triton {seen('triton')}, "
        f"Python {seen('python')}{listed}. In the same runs a copy "
        f"moved {copies[0]:,.0f} to {copies[-1]:,.0f} GB/s, reads and writes counted, and a "
        f"{'bf16' if cuda else 'fp32'} matrix product made {products[0]:.3g} to "
        f"{products[-1]:.3g} TFLOP/s; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"
        + (f"; commits {commits}.\n" if commits else ".\n")
    )


def _compiled(document: Document) -> str:
    """Return what `benchmarks.gpu_dry` counted: of a layer, and of what is around the layers."""
    machine = document["machine"]
    lines = [
        "<details><summary>Compiled for an H100 without one: what forward and backward of a "
        f"micro-batch launch and move. PyTorch {machine['torch']}, Triton {machine['triton']}; "
        f"{document['date'][:10]}</summary>\n",
        "| config | tokens | GB a layer | launches a layer | other kernels a layer "
        "| GB of the rest | launches of the rest | spills |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in (entry for entry in document["benchmarks"] if "skipped" not in entry):
        layer, rest = entry["layer"], entry["rest"]
        names = {name: re.sub(r".*\.|_scaled_dot_product_", "", name) for name in layer["extern"]}
        calls = ", ".join(f"{n} {names[name]}" for name, n in layer["extern"].items())
        spilling = [k for k in entry["kernels"] if k["spills"]]
        spills = ", ".join(f"{k['spills']} in {k['name'].split('_fused_')[-1]}" for k in spilling)
        lines.append(
            f"| {entry['name']} | {entry['rows']} × {entry['seq_len']} | {layer['bytes'] / 1e9:.4g}"
            f" | {layer['launches']} | {calls} | {rest['bytes'] / 1e9:.4g} | {rest['launches']} |"
            f" {spills or 'none'} |"
        )
    return "\n".join([*lines, "\n</details>\n"])


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the measured part of docs/benchmarks.md."""
    parts: list[str] = []
    for kind, title in KINDS.items():
        found = [d for d in documents if d["machine"]["kind"] == kind]
        if not found:
            parts.append(f"{title}: not measured.\n")
        for processor in dict.fromkeys(processor_of(d["machine"]) for d in found):
            own = [d for d in found if processor_of(d["machine"]) == processor]
            parts.append(f"{title}: {_processor_text(processor, own)}")
        rows = rows_of(found)
        if first := [row for row in rows if rank(row.suite) < len(FIRST)]:
            parts.append(_table(first))
        if rest := rows[len(first) :]:
            summary = "<details><summary>Ops, loader, checkpoints</summary>"
            parts.append(f"{summary}\n\n{_table(rest)}\n</details>\n")
    parts += [_compiled(d) for d in documents if d["machine"]["kind"] == "compiled"]
    if predicted := gpu_model.table(documents):
        parts.append(predicted)
    return "\n".join(parts)


def plain_text(documents: Sequence[Document]) -> str:
    """Return the figures of one processor as a table for a terminal, and what has none."""
    machine = documents[0]["machine"]
    lines = [("what", "fasttrain", "the others", "", "times as long")]
    for row in rows_of(documents):
        for n, (own, rival) in enumerate(zip_longest(row.ours, row.others)):
            lines.append((row.what if n == 0 else "", own or "", *(rival or ("", "", ""))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    load = f", load average {machine['load']:.1f} at the start" if "load" in machine else ""
    text = [
        f"{processor_of(machine)}: threads {machine['threads']}, torch {machine['torch']}{load}",
        *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines),
    ]
    missing: dict[str, dict[str, None]] = {}  # of each reason; names once and in order
    for entry in (entry for document in documents for entry in document["benchmarks"]):
        for why in {"skipped", "failed"} & entry.keys():
            missing.setdefault(f"{why}: {entry[why]}", {})[entry["name"]] = None
        for rival, reason in entry.get("left_out", {}).items():
            missing.setdefault(f"left out: {reason}", {})[rival] = None
    text += [f"{reason}: {', '.join(names)}" for reason, names in missing.items()]
    return "\n".join(text) + "\n"


def main() -> int:
    """Rewrite the part of docs/benchmarks.md."""
    documents = read_all()
    text = PAGE.read_text("utf-8")
    PAGE.write_text(PART.sub(lambda _: render(documents), text), "utf-8")
    print(f"{PAGE.relative_to(ROOT)} from {len(documents)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
