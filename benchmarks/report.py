"""Tables: the benchmarks' last lines, and what ``make report`` writes into the pages.

Nothing in those parts is written by hand: what has no file is "not measured".
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fasttrain_kernels

from benchmarks import gpu_model
from benchmarks.harness import ROOT, Document, folded, processor_of, read_all, table
from fasttrain.config import config_reference

PAGE = ROOT / "docs/benchmarks.md"
KERNELS = ROOT / "kernels/README.md"
COMPILED = ROOT / "docs/kernels-compiled.md"
RELIABILITY = ROOT / "docs/reliability.md"
PART = "(?<=<!-- {0} -->\n).*?(?=<!-- /{0} -->)"  # of a page, that this writes
KINDS = {"cpu": "On a CPU", "cuda": "On a GPU"}
# Whole runs and steps are in sight; ops and parts are folded away.
FIRST = ("chars", "run", "trainers", "busy", "step", "loop", "startup")
# What an entry may hold beside times, and how it reads.
SHOWN = {
    "tokens_per_s": "{:,.0f} tokens/s",
    "wall_s": "{:.0f} s in total",
    "steps": "{:,.0f} steps",
    "val_loss": "validation loss {:.4f}",
    "val_bpb": "{:.3f} bits per byte",
    "gb_per_s": "{:,.1f} GB/s",
    "tflop_per_s": "{:,.2f} TFLOP/s",
    "mfu": "{:.1%} of the datasheet's peak",
    "data_wait_ms": "{:.2f} ms waiting for data",
    "mb_per_s": "{:.1f} MB/s",
    "overhead": "overhead {:.1%}",
    "share_of_best": "{:.0%} of the best",
    "first_step_s": "{:.1f} s from `python` to its end",
    "peak_memory_gib": "{:.2f} GiB peak memory",
}
HEAD = ("what", "processor", "fasttrain", "the others take … times as long")


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


def row_of(document: Document, entry: Document) -> list[str]:
    """Return what `HEAD` names, and the suite; ours is empty where it was skipped or failed."""
    losses, times = entry.get("val_loss"), entry.get("median_s")
    ours, others = [time_text(_own(times))] if times else [], []
    for name, ratio in entry.get("speedup", {}).items():
        others.append(f"{name} {ratio:.2f}")
        others[-1] += f" (loss {_own(losses[name]):.4f})" if losses else ""
    if peaks := entry.get("peak_bytes"):
        (_, own), *rest = peaks.items()
        ours.append(f"{own / 1e6:,.0f} MB")
        others = [f"{name} {peak / own:.1f} times the memory" for name, peak in rest]
    ours += [f"{part} {share:.1%}" for part, share in entry.get("share_of_step", {}).items()]
    ours += [f"{module} {time_text(s)}" for module, s in entry.get("import_s", {}).items()]
    found = ((entry.get(key), text) for key, text in SHOWN.items())
    ours += [text.format(_own(value)) for value, text in found if value is not None]
    name, _, arguments = entry["name"].rstrip("]").partition("[")
    if arguments.replace("-", "").isdigit():
        arguments = arguments.replace("-", " × ")
    what = ", ".join(filter(None, (name.replace("_", " "), arguments)))
    shown = () if {"skipped", "failed"} & entry.keys() else ours
    processor = processor_of(document["machine"])
    return [what, processor, ", ".join(shown), ", ".join(others), document["suite"]]


def rows_of(documents: Iterable[Document]) -> list[list[str]]:
    """Return the rows of all entries, whole runs and steps first, processors side by side."""
    found = [row_of(document, entry) for document in documents for entry in document["benchmarks"]]
    rows = [row for row in found if row[2]]
    names = [(row[-1], row[0]) for row in rows]
    return sorted(rows, key=lambda row: (rank(row[-1]), names.index((row[-1], row[0]))))


def rank(suite: str) -> int:
    """Return where a suite stands among all."""
    name = suite.split("-")[0]
    return FIRST.index(name) if name in FIRST else len(FIRST)


def _processor_text(processor: str, documents: Sequence[Document]) -> str:
    machines = [document["machine"] for document in documents]
    cuda = machines[0]["kind"] == "cuda"

    def seen(key: str) -> str:
        return " and ".join(sorted({str(machine[key]) for machine in machines}))

    def span(key: str, digits: str) -> str:
        values = sorted(document["ceilings"][key] for document in documents)
        return " to ".join(dict.fromkeys(f"{v:{digits}}" for v in (values[0], values[-1])))

    threads = "" if cuda else f", {seen('threads')} threads"
    toolkit = f", CUDA {seen('cuda')}" if cuda else ""
    peers = {k: v for machine in machines for k, v in machine.get("peers", {}).items()}
    listed = "".join(f", {name} {version}" for name, version in sorted(peers.items()))
    dates = sorted(document["date"][:10] for document in documents)
    commits = ", ".join(sorted({d["commit"] for d in documents if d["commit"]}))
    return (
        f"**{processor}**{threads}: PyTorch {seen('torch')}{toolkit}, Triton {seen('triton')}, "
        f"Python {seen('python')}{listed}. In the same runs, a copy "
        f"reached {span('copy_gb_per_s', ',.0f')} GB/s (reads plus writes), and "
        f"{'a bf16' if cuda else 'an fp32'} matmul {span('matmul_tflop_per_s', '.3g')} "
        f"TFLOP/s; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"
        + (f"; commits {commits}.\n" if commits else ".\n")
    )


def kernels_table(document: Document) -> str:
    """Return our kernels beside others', and where another is better than ours."""
    head = ("op", "library", "options", "dtypes", "memory", "bytes", "instructions")
    costs = ("programs", "registers", "shared", "spills")
    rows, better, ours = [], [], {}
    for entry in document["benchmarks"]:
        op, peer, kernels = entry["op"], entry["peer"], entry["kernels"]
        figures = {key: entry.get(key) for key in ("memory", "bytes")}
        figures["instructions"] = sum(kernel["instructions"] for kernel in kernels)
        for key, own in ours.setdefault(op, figures).items():
            if own and figures[key] and figures[key] < 0.98 * own:
                better.append(f"{peer}, {key} of {op} ({figures[key]:.3g}, ours {own:.3g})")
        shown = [op, peer, ", ".join(entry["options"]), ", ".join(entry["dtypes"])]
        shown += ["" if value is None else f"{value:.3g}" for value in figures.values()]
        rows.append([*shown, *(" / ".join(str(k[cost]) for k in kernels) for cost in costs)])
    made = document["machine"]
    versions = {name: made[name] for name in ("torch", "triton")}
    versions |= {name: made["peers"][name] for name in ("liger-kernel", "flash-attn")}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = table((*head, "programs per SM", *costs[1:]), rows)
    return f"{text}\nBetter than ours: {'; '.join(better)}.\n\nCompiled with {listed}.\n"


def _compiled(document: Document) -> str:
    """Return what `benchmarks.gpu_dry` counted: of a layer, and of what is around the layers."""
    rows = []
    for entry in (entry for entry in document["benchmarks"] if "skipped" not in entry):
        layer, rest = entry["layer"], entry["rest"]
        names = {name: re.sub(r".*\.|_scaled_dot_product_", "", name) for name in layer["extern"]}
        calls = ", ".join(f"{n} {names[name]}" for name, n in layer["extern"].items())
        spilling = [k for k in entry["kernels"] if k["spills"]]
        spills = ", ".join(f"{k['spills']} in {k['name'].split('_fused_')[-1]}" for k in spilling)
        row = [entry["name"], f"{entry['rows']} × {entry['seq_len']}"]
        casts = [k["bytes"] * k["a_layer"] for k in entry["kernels"] if "_scaled_mm" in k["name"]]
        row += [f"{layer['bytes'] / 1e9:.4g}", f"{sum(casts) / 1e9:.4g}", layer["launches"], calls]
        rows.append([*row, f"{rest['bytes'] / 1e9:.4g}", rest["launches"], spills or "none"])
    head = ("config", "tokens", "GB per layer", "GB per layer in casts to fp8")
    head += ("launches per layer", "library calls per layer")
    head += ("GB outside the layers", "launches outside the layers", "spills")
    machine = document["machine"]
    summary = (
        "Compiled for an H100, without a GPU: launches and traffic of one micro-batch, forward and "
        f"backward. PyTorch {machine['torch']}, Triton {machine['triton']}; {document['date'][:10]}"
    )
    return folded(summary, head, rows)


def render(documents: Sequence[Document]) -> str:
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
        if first := [row for row in rows if rank(row[-1]) < len(FIRST)]:
            parts.append(table(HEAD, first))
        if rest := rows[len(first) :]:
            parts.append(folded("Ops, loader, checkpoints", HEAD, rest))
    parts += [_compiled(d) for d in documents if d["suite"] == "gpu_dry"]
    if predicted := gpu_model.table(documents):
        parts.append(predicted)
    return "\n".join(parts)


def plain_text(documents: Sequence[Document]) -> str:
    """Return the figures of one processor as a table for a terminal, and what has none."""
    machine = documents[0]["machine"]
    lines = [(what, ours, others) for what, _, ours, others, *_ in (HEAD, *rows_of(documents))]
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


def signatures() -> str:
    """Return what the kernels' package exports beside references, with its arguments."""
    lines = ["| name | signature |", "|---|---|"]
    for name in fasttrain_kernels.__all__:
        if not name.endswith("_reference") and name not in ("GradNorm", "triton_on_cpu"):
            given = inspect.signature(getattr(fasttrain_kernels, name)).parameters.values()
            bare = inspect.Signature([p.replace(annotation=p.empty) for p in given])
            lines.append(f"| `{name}` | `{bare}` |")
    return "\n".join(lines) + "\n"


def promises(page: str) -> str:
    """Return the page's table of promises, with the files of the tests that hold each of them.

    A test whose name begins with ``test_R4_R7_`` holds R4 and R7.

    Raises:
        ValueError: a test names a promise that is not in the table, or no test holds one that is.
    """
    files: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for numbers in re.findall(r"^def test_((?:R\d+_)+)", path.read_text("utf-8"), re.M):
            for number in numbers.strip("_").split("_"):
                files.setdefault(number, set()).add(path.name)
    rows = re.findall(r"^\| (R\d+) \| (.*) \|.*\|$", page, re.M)
    if missing := files.keys() ^ {number for number, _ in rows}:
        raise ValueError(f"promises without a row or without a test: {', '.join(sorted(missing))}")
    lines = ["| | promise | tests |", "|---|---|---|"]
    for number, promise in rows:
        names = ", ".join(f"`{name}`" for name in sorted(files[number]))
        lines.append(f"| {number} | {promise} | {names} |")
    return "\n".join(lines) + "\n"


def replace_part(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a page."""
    before, after = re.split(PART.format(name), page.read_text("utf-8"), flags=re.S)
    page.write_text(before + text + after, "utf-8")


if __name__ == "__main__":
    documents = read_all()
    (compared,) = (d for d in documents if d["suite"] == "kernel_peers")
    replace_part(PAGE, "measured", render(documents))
    replace_part(COMPILED, "peers", kernels_table(compared))
    replace_part(KERNELS, "signatures", signatures())
    replace_part(ROOT / "docs/config.md", "config reference", config_reference())
    replace_part(RELIABILITY, "reliability", promises(RELIABILITY.read_text("utf-8")))
    print(f"{PAGE.relative_to(ROOT)} from {len(documents)} files")
