"""The README's two pictures, of one run of base.toml: ``python -m benchmarks.images [RUNS]``.

``docs/images/terminal.svg`` is what the run prints on a terminal, with some log lines left out;
``docs/images/report.png`` is the top of the picture that `fasttrain.report` draws of it. RUNS is a
folder for the run, by default a temporary one. Look at both before you commit them.
"""

import io
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image
from rich.console import Console as RichConsole
from rich.text import Text

from fasttrain.log import console
from fasttrain.report import picture, read_run
from fasttrain.train import main as train

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
COMMAND = "$ python -m fasttrain.train configs/base.toml"
WIDTH = 96  # characters
KEPT_LINES = 6  # log lines shown at the beginning, and at the end
PIXELS = (1000, 976)  # of the top of the report
LOG_LINE = re.compile(r"^ *\d+ +\d+\.\d{4} ")
ESCAPES = re.compile(r"\x1b\[[\d;]*m")


def shortened(lines: list[str]) -> list[str]:
    """Leave out what is between the first and the last log lines."""
    numbers = [n for n, line in enumerate(lines) if LOG_LINE.match(ESCAPES.sub("", line))]
    begin, end = numbers[KEPT_LINES], numbers[-KEPT_LINES]
    return [*lines[:begin], "         ⋮", *lines[end:]]


def main(folder: Path) -> None:
    """Run base.toml in ``folder``, and write both pictures."""
    screen = io.StringIO()
    recorded = partial(
        RichConsole, file=screen, force_terminal=True, width=WIDTH, color_system="standard"
    )
    console.RichConsole = lambda **_: recorded()  # type: ignore[assignment, misc]
    console.Console.progress = lambda *_: None  # type: ignore[assignment, method-assign]
    train([str(ROOT / "configs/base.toml"), f"run.out_dir={folder}"])
    text = screen.getvalue().replace(str(folder), "runs")
    picture_of_screen = RichConsole(record=True, width=WIDTH, file=io.StringIO())
    picture_of_screen.print(COMMAND, highlight=False)
    for line in shortened(text.rstrip().splitlines()):
        picture_of_screen.print(Text.from_ansi(line), no_wrap=True, crop=True)
    picture_of_screen.save_svg(str(IMAGES / "terminal.svg"), title="fasttrain")

    whole = io.BytesIO()
    picture([read_run(folder / "base")], whole)
    image = Image.open(whole).convert("RGB")
    image = image.resize((PIXELS[0], round(image.height * PIXELS[0] / image.width)))
    image.crop((0, 0, *PIXELS)).quantize(64).save(IMAGES / "report.png", optimize=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
