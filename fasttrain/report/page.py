"""Curves of one or several runs: ``python -m fasttrain.report RUN [RUN …]``.

One self-contained HTML page (no network, no server) with interactive curves over steps, tokens,
time or FLOPs, the configs and their differences, and samples; and the same curves as a PNG.
Needs the extra ``report``: plotly for the page, matplotlib for the picture.
"""

import contextlib
import html
import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

import numpy as np

from fasttrain.config import TrainConfig, UserError, config_difference, config_to_toml, load_config
from fasttrain.config.keys import show
from fasttrain.config.untrusted import can_be_path, misfit, parse_json, read_regular
from fasttrain.printing import printable
from fasttrain.run.record import parent_folder

SAMPLES_SHOWN = 4
MAX_BYTES = 512 << 20  # of metrics.jsonl: a million rows
COLOURS = ("#1f6fb4", "#d1495b", "#2e933c", "#8b5fbf", "#e08e0b", "#3b8ea5", "#6b6b6b", "#a2673f")
# x axis: title, and the key of a row that it shows
AXES = {"steps": "step", "tokens": "tokens", "minutes": "minutes", "FLOPs": "flops"}
# Parts of a step's time, from the bottom of the stack to its top.
PARTS = {
    "data wait": "#d1495b",
    "forward and backward": "#1f6fb4",
    "communication, with what is computed meanwhile": "#8b5fbf",
    "optimizer": "#2e933c",
    "the rest": "#a0a0a0",
}
_Number = float | None  # a value of a row; all else in it is not shown


class _Row(TypedDict):
    step: int


@dataclass(slots=True)
class Run:
    """What a run folder holds, as the report needs it."""

    name: str
    config: TrainConfig | None  # None: the library's Trainer writes none
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    made_by: list[dict[str, Any]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    parent: str = ""  # of a branch: the run and the step that it starts from
    before: list[dict[str, Any]] = field(default_factory=list)  # its parent's lines up to there


class Curve(NamedTuple):
    """A curve as page and picture draw it."""

    run: int
    rows: Sequence[Mapping[str, Any]]  # which have its x
    y: Sequence[float]
    kind: str = "line"  # or "faint", "points", or "area" on top of the areas before it
    name: str = ""


class Panel(NamedTuple):
    """Curves that share their axes."""

    title: str
    curves: list[Curve]
    scale: str = "normal"  # of y; or "log", or "tozero", which begins there
    note: str = ""


def read_run(path: Path, descendants: frozenset[Path] = frozenset()) -> Run:
    """Read a run folder: metrics.jsonl and, where they are, config.toml and samples.txt.

    Of a branch, the lines of its parents are read as well; ``descendants`` are those that asked.
    """
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{path}: no metrics.jsonl in it; give a run folder, such as runs/base")
    toml = path / "config.toml"
    config = load_config(toml) if toml.is_file() else None
    rows, made_by = [], []
    for line in _content(file).splitlines():
        with contextlib.suppress(UserError):  # the run was killed, or is writing the line now
            row = parse_json(line, file, "")
            if row.get("kind") == "run":
                made_by.append({k: v for k, v in row.items() if type(v) in (str, int, bool)})
            known = row.get("kind") == "tasks" or row.keys() & {"loss", "val_loss"}
            row = {k: v for k, v in row.items() if k == "time" or not misfit(_Number, v)}
            rows += [row] if known else []
    if problem := misfit(list[_Row], rows, "lines"):
        raise UserError(f"{file}: of its {problem}; remove that line")
    run = Run(path.resolve().name, config, [], [], made_by)
    per_token = math.nan
    if config and config.model.vocab_size:
        import torch

        from fasttrain.model.transformer import Transformer

        with torch.device("meta"):  # shapes alone: nothing is allocated
            per_token = Transformer(config.model, seq_len=config.data.seq_len).flops_per_token()
    first = made_by[0] if made_by else {}
    begin, source = first.get("step"), first.get("parent")
    if type(begin) is int and begin > 0 and isinstance(source, str) and can_be_path(source):
        parent = Path(source).parent.parent  # its checkpoint lies in RUN/checkpoints
        run.parent = f"{parent.name} at step {begin:,}"
        run.before = _lines_before(path, parent, begin, descendants | {path.resolve()})
    else:
        begin = 0
    last: dict[str, Any] = {"step": begin, "minutes": 0.0}
    for row in rows:
        if "loss" in row:
            # A line's step_ms is the mean over the steps since the line before.
            spent_ms = (row.get("step_ms") or 0.0) * max(row["step"] - last["step"], 0)
            tokens = math.nan if row.get("tokens") is None else row["tokens"]
            row |= {"minutes": last["minutes"] + spent_ms / 60_000, "flops": tokens * per_token}
            run.train.append(last := row)
        elif run.train:
            row |= {k: last.get(k) for k in ("tokens", "minutes", "flops")}
            (run.evals if "val_loss" in row else run.tasks).append(row)
    if not run.train:
        raise UserError(f"{file}: no training step is logged yet")
    samples = path / "samples.txt"
    if samples.is_file():
        parts = _content(samples).decode(errors="replace").split("--- step ")
        run.samples = [part for part in parts if part.strip()][-SAMPLES_SHOWN:]
    return run


def _lines_before(
    path: Path, parent: Path, step: int, descendants: frozenset[Path]
) -> list[dict[str, Any]]:
    """Return what a branch's parents logged up to ``step``; nothing if they are gone."""
    folder = parent_folder(path.resolve(), parent)
    if folder.resolve() in descendants:
        return []
    with contextlib.suppress(UserError, OSError):
        run = read_run(folder, descendants)
        rows = [row for row in (*run.before, *run.train) if row["step"] <= step]
        return [row | {"minutes": None} for row in rows]  # the branch's begin at 0
    return []


def _content(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return one key of all rows; a value that was not finite is null and leaves a gap."""
    return [math.nan if (value := row.get(key)) is None else value for row in rows]


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"the report needs {package}; pip install plotly matplotlib") from error


def window_steps(runs: Sequence[Run]) -> int:
    """Return over how many steps losses are averaged: 5 % of a run, or more to have ten lines."""
    least = max(r.train[-1]["step"] * max(0.05, min(0.25, 10 / len(r.train))) for r in runs)
    return max(1, round(float(f"{least:.1g}")))


def moving_average(run: Run, n_steps: int) -> list[float]:
    """Return at each line the mean of the logged losses of the last steps.

    Of the last ``n_steps``, and never of more than the last quarter: at first the loss falls fast.
    """
    steps, losses = (np.array(_column(run.train, key)) for key in ("step", "loss"))
    finite = np.isfinite(losses)
    sums, counts = (np.append(0, np.cumsum(v)) for v in (np.where(finite, losses, 0), finite))
    first = np.searchsorted(steps, steps - np.minimum(n_steps, steps / 4), side="right")
    with np.errstate(invalid="ignore"):  # nan where there is none
        return list((sums[1:] - sums[first]) / (counts[1:] - counts[first]))


def _parts(row: Mapping[str, Any]) -> list[float]:
    """Return the milliseconds of `PARTS`; they add up to the step."""
    keys = ("data_wait_ms", "forward_backward_ms", "communication_ms", "optimizer_ms", "step_ms")
    wait, both, sent, optimizer, step = (row.get(key) or 0.0 for key in keys)
    sent = min(sent, both)  # it lies within
    return [wait, both - sent, sent, optimizer, max(step - wait - both - optimizer, 0.0)]


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels for which the runs logged something."""
    n_steps = window_steps(runs)
    note = (
        f"faint: the loss of each logged step; bold: smoothed, the mean over the last {n_steps:,} "
        f"steps (over the last quarter of fewer than {4 * n_steps:,}); dotted: validation"
    )
    loss: list[Curve] = []
    for n, run in enumerate(runs):
        if run.before:
            loss.append(Curve(n, run.before, _column(run.before, "loss"), "faint", "parent"))
        loss += (
            Curve(n, run.train, _column(run.train, "loss"), "faint"),
            Curve(n, run.train, moving_average(run, n_steps), name="smoothed"),
            Curve(n, run.evals, _column(run.evals, "val_loss"), "points", "validation"),
        )
    found = [Panel("loss, nats a token", loss, note=note)]
    train, evals = [run.train for run in runs], [run.evals for run in runs]
    # The first line of a session has the step that compiles: it would dwarf all others.
    steady = [[row for row in rows if "first_step_s" not in row] for rows in train]
    scored = [run.tasks for run in runs]
    tasks = dict.fromkeys(k for rows in scored for row in rows for k in row if "/" in k)
    for title, key, scale, lines in (
        ("validation perplexity", "val_ppl", "log", evals),
        ("validation accuracy", "val_accuracy", "normal", evals),
        ("learning rate", "lr", "tozero", train),
        ("gradient norm", "grad_norm", "log", train),
        ("tokens a second", "tokens_per_s", "tozero", steady),
        *((name, name, "normal", scored) for name in tasks),
    ):
        kind = "points" if lines is evals or lines is scored else "line"
        curves = [Curve(n, rows, _column(rows, key), kind) for n, rows in enumerate(lines)]
        known = [y for curve in curves for y in curve.y if math.isfinite(y)] or [0.0]
        if scale == "log" and max(known) < 3 * min(known):  # there would be a tick or none
            scale = "normal"
        found.append(Panel(title, curves, scale))
    for n, rows in enumerate(steady):
        if any(row.get("optimizer_ms") for row in rows):
            of = f": {runs[n].name}" if len(runs) > 1 else ""
            times = zip(PARTS, zip(*map(_parts, rows), strict=True), strict=True)
            areas = [Curve(n, rows, ms, "area", name) for name, ms in times if any(ms)]
            found.append(Panel(f"where a step's time goes, ms{of}", areas, "tozero"))
    return [p for p in found if any(math.isfinite(y) for curve in p.curves for y in curve.y)]


def axes(runs: Sequence[Run]) -> dict[str, str]:
    """Return those of `AXES` that all runs have; the library's Trainer counts no tokens."""
    logged = [{k for row in run.train for k in row if row[k] == row[k]} for run in runs]
    return {title: key for title, key in AXES.items() if all(key in keys for keys in logged)}


def _number(value: float | None, digits: str = ".4f") -> str:
    return "n/a" if value is None or math.isnan(value) else format(value, digits)


def facts(run: Run, n_steps: int) -> dict[str, str]:
    """Return a run's column of the table, losses smoothed over ``n_steps`` steps."""
    last, finite = run.train[-1], [row for row in run.evals if row["val_loss"] is not None]
    best = min(finite, key=lambda row: row["val_loss"], default=dict[str, Any]())
    rows = (*run.made_by, *run.train, *run.evals)
    times = [row["time"] for row in rows if isinstance(row.get("time"), str)]
    shown = [time[:16].replace("T", " ") for time in times] or ["n/a"]
    done = last.get("progress") or 1.0
    return {
        **({"branch of": run.parent} if run.parent else {}),
        "started": shown[0],
        "ended": max(shown),
        "steps": f"{last['step']:,}" + (f" ({done:.0%} of the run)" if done < 1 else ""),
        "tokens": _number(last.get("tokens"), ",.0f"),
        "minutes in steps": _number(last["minutes"], ".1f"),
        "train loss, smoothed": _number(moving_average(run, n_steps)[-1]),
        "train loss, last logged": _number(last["loss"]),
        "best validation loss": _number(best.get("val_loss")),
        "… at step": _number(best.get("step"), ",.0f"),
        "… perplexity": _number(best.get("val_ppl"), ".2f"),
        "… bits per byte": _number(best.get("val_bpb")),
        "… accuracy": _number(best.get("val_accuracy"), ".1%"),
        "tokens a second": _number(last.get("tokens_per_s"), ",.0f"),
        "MFU": _number(last.get("mfu"), ".1%"),
        "peak memory, GiB": _number(last.get("peak_memory_gib"), ".2f"),
    }


def provenance(run: Run) -> dict[str, str]:
    """Return the provenance of a run, by name, and the steps from which it changed."""
    found: dict[str, str] = {}
    last: dict[str, Any] = {}
    for row in run.made_by:
        since = f"; from step {row['step']} on: " if row.get("step") else ""
        for name in row.keys() - {"kind", "time", "step"}:
            if row[name] != last.get(name):
                found[name] = f"{found.get(name, '')}{since}{row[name]}".removeprefix("; ")
        last |= row
    return dict(sorted(found.items()))


def differences(configs: Sequence[TrainConfig]) -> list[dict[str, str]]:
    """Return of each config the values of the keys in which they differ."""
    keys = {key for other in configs[1:] for key, _, _ in config_difference(configs[0], other)}
    return [{key: show(attrgetter(key)(config)) for key in sorted(keys)} for config in configs]


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; overflow-wrap: anywhere } h2 { font-size: 1.15em; margin-top: 2em }
.wide { overflow-x: auto; margin-bottom: 1em } table { border-collapse: collapse }
td { padding: .2em .8em .2em 0; vertical-align: top; min-width: 5em;
     border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
.made td { overflow-wrap: anywhere; font-size: .9em }
pre { background: #f6f6f4; padding: .8em 1em; white-space: pre-wrap; overflow-wrap: anywhere }
label { margin-right: 1em; overflow-wrap: anywhere } small { opacity: .75 }
.plots { display: grid; gap: 1.5em; margin-top: 1em;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)) }
figure { margin: 0; min-width: 0 } figure:first-child { grid-column: 1 / -1 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1b1b1b } pre { background: #282828 } td { border-color: #444 }
  .plotly-graph-div, b { filter: invert(.9) hue-rotate(180deg) }
}
</style>
<script>
const plots = () => [...document.querySelectorAll('.plotly-graph-div')]
const over = axis => plots().forEach(plot => Plotly.update(plot,
  {x: plot.data.map(curve => curve.meta[axis])},
  {'xaxis.title.text': axis, 'xaxis.autorange': true}))
const show = (run, visible) => plots().forEach(plot => plot.data.forEach((curve, i) =>
  curve.meta.run === run && Plotly.restyle(plot, {visible}, [i])))
</script>
"""
_MARK = '<b style="color:{}">■</b> {}'
# How page and picture draw each kind of curve: arguments of plotly, and of matplotlib.
_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "line": ({}, {}),
    "faint": ({"opacity": 0.4, "line_width": 1, "hoverinfo": "skip"}, {"alpha": 0.4}),
    "points": ({"mode": "lines+markers", "line_dash": "dot"}, {"ls": ":", "marker": "."}),
    "area": ({"line_width": 0, "stackgroup": "time"}, {"alpha": 0.5, "lw": 0}),
}
_TICKS = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 3, 5, 7)]
_LOG = {"type": "log", "tickvals": _TICKS}
_GRID = {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False}
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "xaxis": {"title_text": "steps", "title_standoff": 4, "rangemode": "tozero", **_GRID},
    "margin": {"t": 10, "l": 45, "r": 10, "b": 40},
    "font": {"family": "system-ui, sans-serif", "color": "#333"},
    "showlegend": False,
    "hovermode": "x",
    **dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "rgba(0,0,0,0)"),  # as the page is
}


def _plot(panel: Panel, runs: Sequence[Run], number: int) -> str:
    """Return a panel as HTML; the first brings the library that draws all of them."""
    scale = _LOG if panel.scale == "log" else {"rangemode": panel.scale}
    layout = _LAYOUT | {"height": 280 if number else 420, "yaxis": _GRID | scale}
    figure = _extra("plotly.graph_objects").Figure(layout=layout)
    for curve in panel.curves:
        name = html.escape(", ".join(filter(None, (curve.name, runs[curve.run].name))))
        meta: dict[str, Any] = {x: _column(curve.rows, key) for x, key in axes(runs).items()}
        look = {"line_color": _colour(curve), "hovertemplate": f"%{{y:.5g}}<extra>{name}</extra>"}
        look |= {"mode": "lines", "meta": meta | {"run": curve.run}} | _KINDS[curve.kind][0]
        figure.add_scatter(x=meta["steps"], y=curve.y, **look)
    config = {"displayModeBar": False, "responsive": True}
    drawn = figure.to_html(full_html=False, include_plotlyjs=not number, config=config)
    areas = [curve for curve in reversed(panel.curves) if curve.kind == "area"]
    marks = " ".join(_MARK.format(_colour(area), html.escape(area.name)) for area in areas)
    caption = f"{html.escape(panel.title)}<br><small>{html.escape(panel.note)}{marks}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def _colour(curve: Curve) -> str:
    return PARTS.get(curve.name, COLOURS[curve.run % len(COLOURS)])


def _table(heads: Sequence[str], columns: Sequence[Mapping[str, str]]) -> str:
    """Return a table with a column a run, less rows without values; ``heads`` are HTML."""
    names = dict.fromkeys(name for cells in columns for name in cells)
    rows = [(name, *(cells.get(name, "n/a") for cells in columns)) for name in names]
    known = [row for row in rows if {*row[1:]} != {"n/a"}]
    lines = [["", *heads], *(map(html.escape, line) for line in known)]
    text = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table>{text}</table></div>'


def page(runs: Sequence[Run]) -> str:
    """Return the report as one HTML page that needs nothing else."""
    names = [html.escape(run.name) for run in runs]
    title = ", ".join(names)
    box = '<input type="checkbox" checked onchange="show({}, this.checked)">' * (len(runs) > 1)
    heads = [
        f"<label>{box.format(n)}{_MARK.format(COLOURS[n % len(COLOURS)], name)}</label>"
        for n, name in enumerate(names)
    ]
    columns = [facts(run, window_steps(runs)) for run in runs]
    choices = [
        f'<label><input type="radio" name="over" onchange="over(\'{axis}\')"'
        f"{' checked' if axis == 'steps' else ''}> over {axis}</label>"
        for axis in axes(runs)
    ]
    choices.append("<small>Drag to zoom in, double-click to zoom out.</small>")
    parts = [f"<h1>{title}</h1>", _table(heads, columns), *choices, '<div class="plots">']
    parts += [_plot(panel, runs, number) for number, panel in enumerate(panels(runs))]
    parts.append("</div>")
    if any(made := [provenance(run) for run in runs]):
        parts.append(f'<h2>Made by</h2><div class="made">{_table(names, made)}</div>')
    configs = {name: run.config for name, run in zip(names, runs, strict=True) if run.config}
    if len(configs) > 1:
        differing = differences(list(configs.values()))
        parts.append("<h2>Where the configs differ</h2>")
        parts.append(_table([*configs], differing) if any(differing) else "<p>In nothing.</p>")
    for name, run in zip(names, runs, strict=True):
        if run.samples:
            parts.append(f"<h2>Samples: {name}</h2>")
            parts += [f"<pre>step {html.escape(sample.strip())}</pre>" for sample in run.samples]
        if name in configs:
            config = html.escape(config_to_toml(configs[name]))
            parts.append(f"<details><summary>Config: {name}</summary><pre>{config}</pre></details>")
    return f"{_HEAD}<title>{title}</title>{''.join(parts)}\n"


def picture(runs: Sequence[Run], path: Path | BinaryIO, *, axis: str = "steps") -> None:
    """Write the curves over ``axis``, a key of `AXES`, as a PNG; no name in it is a formula.

    Raises:
        UserError: matplotlib is not installed, or a run does not have this axis.
    """
    if axis not in (known := axes(runs)):
        raise UserError(f"--axis {axis}: not logged in each of these runs; use {', '.join(known)}")
    shown = panels(runs)
    n_rows = 1 + len(shown) // 2
    figure = _extra("matplotlib.figure").Figure(figsize=(12, 3 + 3 * n_rows), layout="constrained")
    grid = figure.add_gridspec(n_rows, 2, height_ratios=(1.6, *[1] * (n_rows - 1)))
    for number, panel in enumerate(shown):
        plot = figure.add_subplot(grid[divmod(number + 1, 2)] if number else grid[0, :])
        below, stacked = np.zeros(1), panel.curves[0].kind == "area"
        for curve in panel.curves:
            x = _drawable(_column(curve.rows, AXES[axis]))
            y = _drawable(curve.y)
            look = {"color": _colour(curve)} | _KINDS[curve.kind][1]
            if stacked:
                plot.fill_between(x, below, below + y, label=curve.name, **look)
                below = below + y
            else:
                label = _drawn(runs[curve.run].name) if curve.name == "smoothed" else None
                plot.plot(x, y, label=label, **look)
        if stacked or not number:
            # Not "best": to search a place takes long, of which matplotlib warns on a slow machine.
            plot.legend(loc="upper right", fontsize=8, reverse=bool(number), edgecolor="none")
        plot.set_title(_drawn("\n".join(filter(None, (panel.title, panel.note)))), fontsize=10)
        plot.set_xlabel(axis, fontsize=9)
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
        if panel.scale == "tozero":
            plot.set_ylim(bottom=0)
        elif panel.scale == "log":
            plot.set_yscale("log", subs=())
            plot.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5, 7))
            plot.yaxis.set_major_formatter("{x:g}")
    with warnings.catch_warnings():  # of characters that its font lacks
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, dpi=110, format="png")


def _drawable(values: Sequence[float]) -> Any:
    """Return numbers as an array, with a gap where no axis of matplotlib goes."""
    array = np.array(values, float)
    array[~(np.abs(array) <= 1e30)] = math.nan
    array[np.abs(array) < 1e-30] = 0
    return array


def _drawn(text: str) -> str:
    """Escape a text so that matplotlib draws it literally: dollars would enclose a formula.

    A label that begins with an underscore would be left out.
    """
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
