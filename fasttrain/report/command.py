"""Command: the curves of runs as one HTML page and a PNG, ``python -m fasttrain.report RUN …``."""

import io
from collections.abc import Sequence
from pathlib import Path

from fasttrain.command import command, make_parser
from fasttrain.config import UserError
from fasttrain.config.keys import counted
from fasttrain.printing import say
from fasttrain.report.page import AXES, page, picture, read_run
from fasttrain.storage import write_atomically


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; return 0, or 2 on bad input."""
    parser = make_parser("report", "Draw the curves of one or more runs.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    where = "RUN/report.html; for several runs, report-RUN-RUN.html in the current folder"
    add("--out", type=Path, help=f"HTML page; the PNG is put beside it (default: {where})")
    add("--axis", choices=AXES, default="steps", help="x axis of the PNG")
    options = parser.parse_args(argv)
    runs = [read_run(path) for path in options.runs]
    if len({run.name for run in runs}) < len(runs):
        for run, path in zip(runs, options.runs, strict=True):
            run.name = str(path)
    names = "-".join(run.name.replace("/", "-").strip("-.") for run in runs)
    one = options.runs[0] / "report.html" if len(runs) == 1 else None
    out = options.out or one or Path(f"report-{names}.html")
    if out.suffix.lower() == ".png":
        raise UserError(f"--out {out}: is the page, and the PNG is put beside it; name it .html")
    text, image = page(runs).encode(errors="backslashreplace"), io.BytesIO()
    picture(runs, image, axis=options.axis)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((out.with_suffix(".png"), image.getvalue()), (out, text)):
            if options.out:
                path.write_bytes(content)
            else:  # a link in a run folder may lead anywhere: it is replaced
                write_atomically(path, content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: {reason}; set another --out") from error
    say(f"{out} and {out.with_suffix('.png').name}: {counted(len(runs), 'run')}")
    return 0
