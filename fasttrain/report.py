"""Curves of one or several runs: ``python -m fasttrain.report RUN [RUN …]``.

One self-contained HTML page (no network, no server) with interactive curves over steps, tokens,
time or FLOPs, the configs and their differences, and samples; and the same curves as a PNG.
Needs the extra ``report``: plotly for the page, matplotlib for the picture.
"""

import argparse
import html
import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.command import command, prog
from fasttrain.config import TrainConfig, UserError, config_difference, load_config
from fasttrain.config_keys import counted

__all__ = ["Run", "main", "page", "picture", "read_run"]

SAMPLES_SHOWN = 4
COLOURS = ("#1f6fb4", "#d1495b", "#2e933c", "#8b5fbf", "#e08e0b", "#3b8ea5", "#6b6b6b", "#a2673f")
DASHES = ("solid", "dot", "dash", "dashdot", "longdash")
# x axis: title, and the key of a row that it shows
AXES = {"steps": "step", "tokens": "tokens", "minutes": "minutes", "FLOPs": "flops"}
# panel: title, keys of a train line (several: parts of one quantity), logarithmic
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss (nats a token): train; validation dotted", ("loss",), False),
    ("learning rate", ("lr",), False),
    ("gradient norm", ("grad_norm",), True),
    ("tokens a second", ("tokens_per_s",), False),
    # Every key ending in _ms that has a value. Not stacked: communication lies beneath the others.
    ("where a step's time goes (ms)", (), True),
)


@dataclass(slots=True)
class Run:
    """What a run folder holds, as the report needs it."""

    name: str
    config: TrainConfig
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    samples: list[str] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Read a run folder: config.toml, metrics.jsonl, samples.txt.

    Raises:
        UserError: it is no run folder, or nothing was logged yet.
    """
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{path}: no metrics.jsonl in it; give a run folder, such as runs/base")
    config = load_config(path / "config.toml")
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed, or is being written
            continue
    run = Run(path.resolve().name, config, [], [])
    per_token = _flops_per_token(config)
    minutes, before = 0.0, 0
    for row in rows:
        if "loss" in row:
            # A line's step_ms is the mean over the steps since the line before.
            minutes += (row["step_ms"] or 0.0) * max(row["step"] - before, 0) / 60_000
            before = row["step"]
            row |= {"minutes": minutes, "flops": row["tokens"] * per_token}
            run.train.append(row)
        elif "val_loss" in row and run.train:
            run.evals.append(row | {k: run.train[-1][k] for k in ("tokens", "minutes", "flops")})
    if not run.train:
        raise UserError(f"{file}: no training step is logged yet")
    samples = path / "samples.txt"
    if samples.is_file():
        parts = samples.read_text(encoding="utf-8", errors="replace").split("--- step ")
        run.samples = [part for part in parts if part.strip()][-SAMPLES_SHOWN:]
    return run


def _flops_per_token(config: TrainConfig) -> float:
    import torch

    from fasttrain.metrics import flops_per_token
    from fasttrain.model import Transformer, flops_constants

    with torch.device("meta"):  # shapes alone: nothing is allocated
        model = Transformer(config.model, seq_len=config.data.seq_len)
    return flops_per_token(**flops_constants(model), seq_len=config.data.seq_len)


def _keys(panel: int, runs: Sequence[Run]) -> tuple[str, ...]:
    if PANELS[panel][1]:
        return PANELS[panel][1]
    items = (item for run in runs for row in run.train for item in row.items())
    found = {key for key, value in items if key.endswith("_ms") and value is not None}
    return tuple(sorted(found, key=lambda k: (k != "step_ms", k)))


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return one key of all rows; what is not finite was logged as null and leaves a gap."""
    return [math.nan if (value := row.get(key)) is None else value for row in rows]


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the report needs {name.split('.')[0]}; pip install plotly matplotlib"
        ) from error


# ---- the page --------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .25em .8em; text-align: left;
       border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
pre { background: #f6f6f4; padding: .8em 1em; overflow: auto; white-space: pre-wrap }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1b1b1b } pre { background: #282828 }
  td, th { border-color: #444 } #curves, .swatch { filter: invert(.9) hue-rotate(180deg) }
}
"""


def _figure(runs: Sequence[Run]) -> Any:
    graph = _extra("plotly.graph_objects")
    subplots = _extra("plotly.subplots")
    figure = subplots.make_subplots(
        rows=3,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}], [{}, {}]],
        row_heights=[0.44, 0.28, 0.28],
        subplot_titles=[title for title, _, _ in PANELS],
        vertical_spacing=0.1,
    )
    cells = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2))
    xs: dict[str, list[list[Any]]] = {key: [] for key in AXES.values()}

    def add(
        run: Run, rows: Sequence[Mapping[str, Any]], key: str, panel: int, **options: Any
    ) -> None:
        for axis, columns in xs.items():
            columns.append(_column(rows, axis))
        hover = f"{key} %{{y:.5g}}<extra>{html.escape(run.name)}</extra>"
        options = {"name": run.name, "legendgroup": run.name, "hovertemplate": hover} | options
        trace = graph.Scatter(x=_column(rows, "step"), y=_column(rows, key), **options)
        figure.add_trace(trace, row=cells[panel][0], col=cells[panel][1])

    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        for panel in range(len(PANELS)):
            for i, key in enumerate(_keys(panel, runs)):
                # One entry a run in the legend hides and shows all of its curves; the parts of a
                # step's time have a legend of their own.
                parts = panel == len(PANELS) - 1
                add(
                    run,
                    run.train,
                    key,
                    panel,
                    line={"color": colour, "dash": DASHES[i % len(DASHES)]},
                    mode="lines",
                    name=key.removesuffix("_ms").replace("_", " ") if parts else run.name,
                    showlegend=number == 0 if parts else panel == 0,
                    legend="legend2" if parts else "legend",
                )
        dotted = {"color": colour, "dash": "dot"}
        add(run, run.evals, "val_loss", 0, line=dotted, mode="lines+markers", showlegend=False)
    axes = ["xaxis", *(f"xaxis{n}" for n in range(2, len(PANELS) + 1))]
    buttons = [
        {
            "label": f"over {title}",
            "method": "update",
            "args": [{"x": xs[key]}, {f"{axis}.title.text": title for axis in axes}],
        }
        for title, key in AXES.items()
    ]
    for panel, (_, _, logarithmic) in enumerate(PANELS):
        if logarithmic:
            figure.update_yaxes(type="log", row=cells[panel][0], col=cells[panel][1])
    figure.update_xaxes(title_text="steps", title_standoff=4, rangemode="tozero")
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    clear = "rgba(0,0,0,0)"  # the page's colour, light or dark
    figure.update_layout(
        template="plotly_white",
        height=1060,
        margin={"t": 90, "l": 60, "r": 20, "b": 70},
        font={"family": "system-ui, sans-serif", "color": "#333"},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        modebar={"bgcolor": clear, "color": "#999", "activecolor": "#333"},
        hovermode="x",
        updatemenus=[
            {"buttons": buttons, "type": "buttons", "direction": "right", "xanchor": "left",
             "x": 0, "y": 1.1}
        ],
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.09},
        legend2={"orientation": "h", "x": 0.55, "y": -0.06, "groupclick": "toggleitem"},
    )  # fmt: skip
    return figure


def _number(value: float | None, digits: str = ".4f") -> str:
    return "n/a" if value is None else format(value, digits)


def _summary_table(runs: Sequence[Run]) -> str:
    head = ("run", "steps", "tokens", "minutes in steps", "train loss", "best val loss", "bpb",
            "tokens/s", "MFU", "peak memory, GiB")  # fmt: skip
    lines = []
    for number, run in enumerate(runs):
        last = run.train[-1]
        finite = [row for row in run.evals if row["val_loss"] is not None]
        best = min(finite, key=lambda row: row["val_loss"], default={})
        colour = COLOURS[number % len(COLOURS)]
        cells = (
            f'<span class="swatch" style="background:{colour}"></span>{html.escape(run.name)}',
            f"{last['step']:,}",
            f"{last['tokens']:,}",
            _number(last["minutes"], ".1f"),
            _number(last.get("loss")),
            _number(best.get("val_loss")),
            _number(best.get("val_bpb")),
            _number(last.get("tokens_per_s"), ",.0f"),
            _number(last.get("mfu"), ".1%"),
            _number(last.get("peak_memory_gib"), ".2f"),
        )
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    heads = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the config keys in which runs differ, with the value of each run."""
    keys = {key for run in runs[1:] for key, _, _ in config_difference(runs[0].config, run.config)}
    return {
        key: [getattr(getattr(r.config, key.split(".")[0]), key.split(".")[1]) for r in runs]
        for key in sorted(keys)
    }


def _difference_table(runs: Sequence[Run]) -> str:
    rows = [
        f"<tr><th>{key}</th>{''.join(f'<td>{html.escape(str(v))}</td>' for v in values)}</tr>"
        for key, values in differences(runs).items()
    ]
    heads = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    if not rows:
        return "<p>The runs have the same config.</p>"
    return f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"


def page(runs: Sequence[Run]) -> str:
    """Return the report as one HTML page that needs nothing else.

    Raises:
        UserError: plotly is not installed.
    """
    from fasttrain.config import config_to_toml

    settings = {"displaylogo": False, "responsive": True}
    plot = _figure(runs).to_html(
        full_html=False, include_plotlyjs=True, div_id="curves", config=settings
    )
    title = html.escape(", ".join(run.name for run in runs))
    parts = [f"<h1>{title}</h1>", _summary_table(runs), plot]
    if len(runs) > 1:
        parts += ["<h2>Where the configs differ</h2>", _difference_table(runs)]
    for run in runs:
        name = html.escape(run.name)
        if run.samples:
            parts.append(f"<h2>Samples: {name}</h2>")
            parts += [f"<pre>step {html.escape(sample.strip())}</pre>" for sample in run.samples]
        config = html.escape(config_to_toml(run.config))
        parts.append(f"<details><summary>Config: {name}</summary><pre>{config}</pre></details>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


# ---- the picture -----------------------------------------------------------------------------


def picture(runs: Sequence[Run], path: Path, *, axis: str = "steps") -> None:
    """Write the curves as a PNG.

    Args:
        runs: what `read_run` returned.
        path: the file.
        axis: ``steps``, ``tokens``, ``minutes`` or ``FLOPs``.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = _extra("matplotlib.figure").Figure(figsize=(12, 10), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1.6, 1, 1))
    cells = (grid[0, :], grid[1, 0], grid[1, 1], grid[2, 0], grid[2, 1])
    for panel, (title, _, logarithmic) in enumerate(PANELS):
        plot = figure.add_subplot(cells[panel])
        for number, run in enumerate(runs):
            colour = COLOURS[number % len(COLOURS)]
            x = _column(run.train, AXES[axis])
            for i, key in enumerate(_keys(panel, runs)):
                label = run.name if panel == 0 else None
                if panel == len(PANELS) - 1 and number == 0:
                    label = key.removesuffix("_ms").replace("_", " ")
                style = ("-", ":", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))[i % 5]
                plot.plot(x, _column(run.train, key), color=colour, ls=style, label=label)
            if panel == 0 and run.evals:
                values = _column(run.evals, "val_loss")
                plot.plot(_column(run.evals, AXES[axis]), values, ":o", color=colour, ms=4)
        if panel in (0, len(PANELS) - 1):
            plot.legend(frameon=False, fontsize=8)
        plot.set_title(title, fontsize=10)
        plot.set_xlabel(axis, fontsize=9)
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            plot.set_yscale("log")
            plot.yaxis.set_major_formatter("{x:g}")
            low, high = plot.get_ylim()
            if high < 10 * low:  # else powers of ten are labels enough
                plot.yaxis.set_minor_formatter("{x:g}")
    figure.savefig(path, dpi=110)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; return 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog=prog("report"), description="Curves of one or several runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, help="the page; the PNG lies beside it (default: RUN/report.html)"
    )
    parser.add_argument("--axis", choices=AXES, default="steps", help="x axis of the PNG")
    options = parser.parse_args(argv)
    out: Path = options.out or options.runs[0] / "report.html"
    try:
        runs = [read_run(path) for path in options.runs]
        if len({run.name for run in runs}) < len(runs):
            for run, path in zip(runs, options.runs, strict=True):
                run.name = str(path)
        text = page(runs)
        out.parent.mkdir(parents=True, exist_ok=True)
        picture(runs, out.with_suffix(".png"), axis=options.axis)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; set another --out") from error
    print(f"{out} and {out.with_suffix('.png').name}: {counted(len(runs), 'run')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
