"""The README's figures and its chart, from the files in ``benchmarks/results``: ``make report``.

Nothing in the README's measured part is written by hand: what has no file is "not measured".
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.store import RESULTS, ROOT, read_all

README = ROOT / "README.md"
CHART = RESULTS / "training-step.png"
PART = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.S)
KINDS = {"cpu": "On a CPU", "cuda": "On a GPU"}
# Whole runs and steps are in sight; ops and parts are folded away.
FIRST = ("chars", "run-base", "run-speedrun", "trainers", "step", "loop", "startup")
# What an entry may hold beside times, and how it reads.
SHOWN = {
    "wall_s": "{:.0f} s in all",
    "steps": "{:,.0f} steps",
    "val_loss": "validation loss {:.4f}",
    "val_bpb": "{:.3f} bits per byte",
    "gb_per_s": "{:,.1f} GB/s",
    "fraction_of_copy": "{:.0%} of a copy",
    "tflop_per_s": "{:,.2f} TFLOP/s",
    "fraction_of_matmul": "{:.0%} of a matrix product",
    "mfu_of_measured_ceiling": "{:.1%} of the measured ceiling",
    "mfu_of_datasheet": "{:.1%} of the datasheet's peak",
    "launches_per_step": "{:,.0f} launches a step",
    "idle_fraction": "idle {:.2%}",
    "data_wait_ms": "{:.2f} ms waiting for data",
    "mb_per_s": "{:.1f} MB/s",
    "overhead": "overhead {:.1%}",
    "first_step_s": "{:.1f} s from `python` to its end",
    "peak_memory_gib": "{:.2f} GiB at the most",
}
# A CPU's caches and its copies that read what they overwrite make no ceiling of these.
OF_A_CEILING = ("fraction_of_copy", "fraction_of_matmul")


class Row(NamedTuple):
    """A line of a table."""

    suite: str
    what: str
    ours: str
    others: str
    date: str


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


def row_of(document: Mapping[str, Any], entry: Mapping[str, Any]) -> Row | None:
    """Return the line for an entry; None for one that was skipped, failed or has no figure."""
    if "skipped" in entry or "failed" in entry:
        return None
    ours: list[str] = []
    losses = entry.get("val_loss")
    others = [
        f"{name} {ratio:.2f}" + (f" (loss {_own(losses[name]):.4f})" if losses else "")
        for name, ratio in entry.get("speedup", {}).items()
    ]
    if entry.get("median_s"):
        ours.append(time_text(next(iter(entry["median_s"].values()))))
    if entry.get("tokens_per_s"):
        ours.append(f"{next(iter(entry['tokens_per_s'].values())):,.0f} tokens/s")
    if entry.get("peak_bytes"):
        (_, own), *rest = entry["peak_bytes"].items()
        ours.append(f"{own / 1e6:,.0f} MB")
        others = [f"{name} {theirs / own:.1f} times the memory" for name, theirs in rest]
    ours += [f"{part} {share:.1%}" for part, share in entry.get("share_of_step", {}).items()]
    ours += [f"{module} {time_text(s)}" for module, s in entry.get("import_s", {}).items()]
    cuda = document["machine"]["kind"] == "cuda"
    ours += [
        text.format(_own(entry[key]))
        for key, text in SHOWN.items()
        if entry.get(key) is not None and (cuda or key not in OF_A_CEILING)
    ]
    if not ours:
        return None
    name, _, arguments = entry["name"].rstrip("]").partition("[")
    what = name.replace("_", " ") + (f", {arguments.replace('-', ' × ')}" if arguments else "")
    if arguments and not arguments.replace("-", "").isdigit():
        what = f"{name.replace('_', ' ')}, {arguments}"
    return Row(document["suite"], what, ", ".join(ours), ", ".join(others), document["date"][:10])


def rows_of(documents: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return the lines of all entries, whole runs and steps first."""
    found = (row_of(document, entry) for document in documents for entry in document["benchmarks"])
    rows = [row for row in found if row is not None]
    return sorted(rows, key=lambda row: (_rank(row.suite), row.suite))


def _rank(suite: str) -> int:
    exact = [i for i, name in enumerate(FIRST) if suite == name or suite.startswith(f"{name}-")]
    return exact[0] if exact else len(FIRST)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| what | fasttrain | the others take … times as long | date |", "|---|---|---|---|"]
    lines += [f"| {what} | {ours} | {others} | {date} |" for _, what, ours, others, date in rows]
    return "\n".join(lines) + "\n"


def _machine_text(machine: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]) -> str:
    threads = f", {machine['threads']} threads" if machine["kind"] == "cpu" else ""
    cuda = f", CUDA {machine['cuda']}" if machine.get("cuda") else ""
    peers = {k: v for d in documents for k, v in d["machine"].get("peers", {}).items()}
    listed = "".join(f", {name} {version}" for name, version in sorted(peers.items()))
    copies = sorted(d["ceilings"]["copy_gb_per_s"] for d in documents)
    products = sorted(d["ceilings"]["matmul_tflop_per_s"] for d in documents)
    commits = ", ".join(sorted({d["commit"] for d in documents if d["commit"]}))
    kind = "bf16" if machine["kind"] == "cuda" else "fp32"
    return (
        f"**{machine['device']}**{threads}: PyTorch {machine['torch']}{cuda}, "
        f"Triton {machine['triton']}, Python {machine['python']}{listed}. In the same runs a copy "
        f"moved {copies[0]:,.0f} to {copies[-1]:,.0f} GB/s, reads and writes counted, and a {kind} "
        f"matrix product made {products[0]:.3g} to {products[-1]:.3g} TFLOP/s"
        + (f"; commits {commits}.\n" if commits else ".\n")
    )


def _groups(
    documents: Iterable[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Return the documents by machine; one that differs in a version is another machine."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for document in documents:
        machine = document["machine"]
        keys = ("kind", "device", "threads", "torch", "triton", "python")
        groups.setdefault(tuple(machine[k] for k in keys), []).append(document)
    return [(found[0]["machine"], found) for found in groups.values()]


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the README's measured part."""
    parts: list[str] = []
    for kind, title in KINDS.items():
        groups = _groups(d for d in documents if d["machine"]["kind"] == kind)
        if not groups:
            parts.append(f"{title}: not measured.\n")
        for machine, found in groups:
            rows = rows_of(found)
            first = [row for row in rows if _rank(row.suite) < len(FIRST)]
            rest = [row for row in rows if _rank(row.suite) == len(FIRST)]
            parts.append(f"{title}: {_machine_text(machine, found)}")
            if first:
                parts.append(_table(first))
            if rest:
                summary = "<details><summary>Ops, loader, checkpoints</summary>"
                parts.append(f"{summary}\n\n{_table(rest)}\n</details>\n")
    if chart_bars(documents):
        path = CHART.relative_to(ROOT)
        parts.append(f"![How many times as long a training step of the others takes]({path})\n")
    return "\n".join(parts)


def plain_text(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures as lines for a terminal."""
    lines = []
    for row in rows_of(documents):
        others = f"; others ×: {row.others}" if row.others else ""
        lines.append(f"{row.suite:22} {row.what}: {row.ours}{others}")
    return "\n".join(lines) + "\n"


def chart_bars(documents: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what the chart shows: of each training step, the others' time over ours."""
    bars: dict[str, dict[str, float]] = {}
    for document in documents:
        if not document["suite"].startswith(("step", "trainers")):
            continue
        for entry in document["benchmarks"]:
            row = row_of(document, entry)
            if row is not None and entry.get("speedup"):
                label = f"{row.what}\n{document['machine']['device']}"
                rivals = {
                    k: v for k, v in entry["speedup"].items() if not k.startswith("fasttrain")
                }
                bars.setdefault(label, {}).update(rivals)
    return bars


def draw(bars: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw the bars and write them as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rivals = list(dict.fromkeys(name for ratios in bars.values() for name in ratios))
    n_bars = sum(map(len, bars.values())) + len(bars)
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.28 * n_bars), layout="constrained")
    colours = dict(zip(rivals, pyplot.get_cmap("tab10").colors, strict=False))
    y, ticks = 0.0, []
    for label, ratios in bars.items():
        ticks.append((y + (len(ratios) - 1) / 2, label))
        for rival, ratio in ratios.items():
            axes.barh(y, ratio, color=colours.get(rival, "grey"))
            axes.text(ratio, y, f" {rival} {ratio:.2f}", va="center", fontsize=8)
            y += 1
        y += 0.7
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(ratio for ratios in bars.values() for ratio in ratios.values()))
    axes.set_xlabel("time of a step, as a multiple of fasttrain's")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    """Rewrite the README's part and the chart."""
    documents = read_all()
    text = README.read_text("utf-8")
    if not PART.search(text):
        print("error: README.md has no part between <!-- measured --> and <!-- /measured -->")
        return 2
    README.write_text(PART.sub(lambda _: render(documents), text), "utf-8")
    bars = chart_bars(documents)
    if bars:
        draw(bars, CHART)
    else:
        CHART.unlink(missing_ok=True)
    print(f"README.md and {CHART.relative_to(ROOT)} from {len(documents)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
