"""Compile every kernel ahead of time, without a GPU, and report what it costs."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import BEGIN, END, TARGETS, issue_table, reports, table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or what the options ask for."""
    parser = argparse.ArgumentParser(prog="aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--no-bytes", action="store_true", help="do not count bytes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print one object per row")
    form.add_argument("--write", type=Path, metavar="FILE", help=f"replace what follows {BEGIN!r}")
    chosen = parser.parse_args(arguments)
    rows = reports(chosen.target, chosen.jobs, count=not chosen.no_bytes)
    if chosen.json:
        json.dump([asdict(row) for row in rows], sys.stdout)
    elif chosen.write is not None:
        text = chosen.write.read_text("utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        filled = f"{before}{BEGIN}\n{table(rows, markdown=True)}\n{END}{after}"
        chosen.write.write_text(filled, "utf-8")
    else:
        print(table(rows, markdown=chosen.markdown), "", sep="\n")
        print(issue_table(rows, markdown=chosen.markdown))


if __name__ == "__main__":
    main()
