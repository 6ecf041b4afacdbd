"""README.md and docs/ against the code: what they list is all there is, what they show works."""

import importlib.util
import math
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.report import promises
from fasttrain import Callback, evaluate, hf, prepare, report
from fasttrain.checkpoint.__main__ import main as checkpoint_main
from fasttrain.command import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from fasttrain.config import config_reference, load_config
from fasttrain.generate import main as generate
from fasttrain.preflight import __main__ as preflight
from fasttrain.train import main as train
from tests.support.toy import ROOT, write_config

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
COMMANDS = {
    "fasttrain.train": train,
    "fasttrain.prepare": prepare.main,
    "fasttrain.generate": generate,
    "fasttrain.checkpoint": checkpoint_main,
    "fasttrain.preflight": preflight.main,
    "fasttrain.evaluate": evaluate.main,
    "fasttrain.report": report.main,
    "fasttrain.hf": hf.main,
}


def part(page: str, name: str) -> str:
    """Return what stands in a page between ``<!-- name … -->`` and ``<!-- /name -->``."""
    found = re.findall(
        rf"^<!-- {name}\b[^\n]*-->\n(.*?)^<!-- /{name} -->$", PAGES[page], re.S | re.M
    )
    assert len(found) == 1, f"{page} must have one part marked <!-- {name} -->"
    return str(found[0])


def run_snippet(page: str, name: str, tmp_path: Path, **given: Any) -> dict[str, Any]:
    """Run the Python block that follows ``<!-- name -->`` as a script; return its variables."""
    found = re.findall(rf"^<!-- {name} -->\n```python\n(.*?)^```$", PAGES[page], re.S | re.M)
    assert len(found) == 1, f"{page} must have one Python block marked <!-- {name} -->"
    script = tmp_path / "snippet.py"
    script.write_text(found[0], "utf-8")
    return runpy.run_path(str(script), given)


def commands() -> list[list[str]]:
    """Return every ``python -m fasttrain…`` of the pages' shell blocks, as arguments."""
    text = "".join(PAGES.values())
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.S | re.M))
    shell = shell.replace("\\\n", " ")
    found = re.findall(r"python -m (fasttrain\.[^\n]*)", shell)
    return [shlex.split(line, comments=True) for line in found]


def test_readme_names_every_page() -> None:
    for page in PAGES.keys() - {"README.md"}:
        assert f"({page})" in PAGES["README.md"], page


def test_config_reference_is_up_to_date() -> None:
    given = part("docs/config.md", "config reference").strip()
    assert given == config_reference().strip(), "run make report"


def test_architecture_names_every_package_and_module_of_the_top_folder() -> None:
    top = ROOT / "fasttrain"
    names = {f"{path.parent.relative_to(top).as_posix()}/" for path in top.rglob("*.py")} - {"./"}
    names |= {path.name for path in top.glob("*.py") if not path.name.startswith("__")}
    tree = PAGES["docs/architecture.md"].partition("```text\nfasttrain/")[2].partition("```")[0]
    for name in names:
        assert re.search(rf"\b{re.escape(name)}(?=\W)", tree), name


def test_recipes_name_files_that_exist() -> None:
    text = PAGES["docs/contributing.md"]
    for path in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text):
        assert any((top / path).exists() for top in (ROOT, ROOT / "fasttrain")), path
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert any(ROOT.glob(f"tests/**/{name}")), name


def test_figures_are_those_of_the_benchmarks() -> None:
    """Every row of the README's table has its numbers from one row of docs/benchmarks.md."""

    def numbers(row: str) -> set[str]:
        return set(re.findall(r"(?<![\w.])\d[\d,.]*\d", row.partition("|")[2]))

    measured = part("docs/benchmarks.md", "measured").splitlines()
    rows = part("README.md", "figures").strip().splitlines()[2:]
    assert rows
    for row in rows:
        assert any(numbers(row) <= numbers(line) for line in measured), row


def test_the_table_of_promises_names_the_tests_of_each() -> None:
    table = part("docs/reliability.md", "reliability")
    assert table == promises(table), "run make report"


def test_exit_statuses_are_those_of_the_code() -> None:
    table = PAGES["docs/checkpoints.md"].partition("| exit status |")[2].partition("\n\n")[0]
    listed = [int(status) for status in re.findall(r"^\| (\d+) \|", table, re.M)]
    assert sorted(listed) == sorted([EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED])


def test_every_command_names_an_existing_module_and_config() -> None:
    found = commands()
    assert len(found) >= 8
    for module, *arguments in found:
        assert module in COMMANDS
        configs = [a for a in arguments if a.startswith("configs/")]
        overrides = [a for a in arguments if re.match(r"\w+\.\w+=", a)]
        if module == "fasttrain.train":
            assert len(configs) == 1
            load_config(ROOT / configs[0], overrides)


def test_relative_links_lead_somewhere() -> None:
    """To a file and, in a page, to a heading, by the name that GitHub gives it."""
    for page, text in PAGES.items():
        for target, heading in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
                names = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
                assert heading in names, f"{page}: {target}#{heading}"


def test_kernels_snippet_runs_and_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = run_snippet("README.md", "kernels snippet", tmp_path)
    assert names["loss"].item() < math.log(1000) - 0.5


def test_trainer_snippets_run_and_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run_snippet("README.md", "trainer snippet", tmp_path)
    assert names["metrics"].last()["val_loss"] < 0.5 * math.log(100)
    loaders = {"train_loader": [names["rows"][:16]] * 4, "val_loader": [names["rows"][:16]]}
    given = {
        "scheduler": torch.optim.lr_scheduler.ConstantLR(names["optimizer"]),
        "criterion": torch.nn.CrossEntropyLoss(),
        "config": {"train": {"steps": 1}},
        "accuracy": lambda logits, targets: (logits.argmax(-1) == targets).float().mean(),
        "MyCallback": Callback,
    }
    of_readme = {name: names[name] for name in ("model", "optimizer", "Trainer")}
    names = run_snippet(
        "docs/library.md", "trainer options", tmp_path, **of_readme, **loaders, **given
    )
    assert names["metrics"].last()["val_accuracy"] > 0.9


def foreign(folder: Path, header: bool) -> None:
    """Token files as nanoGPT or llm.c write them."""
    folder.mkdir(parents=True)
    for split, n in (("train", 3000), ("val", 300)):
        tokens = (np.arange(n) % 60).astype("<u2").tobytes()
        head = np.array([20240520, 1, n, *[0] * 253], "<i4").tobytes() if header else b""
        (folder / f"{'fineweb_' * header}{split}{'_000001' * header}.bin").write_bytes(
            head + tokens
        )


def test_every_command_runs_and_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands as they stand, with smaller models.

    Two that take long have their own tests, and so have those with addresses.
    """
    for package in ("plotly", "matplotlib"):
        pytest.importorskip(package, reason="needs the extra report")
    monkeypatch.chdir(tmp_path)
    text = write_config(tmp_path).read_text("utf-8").replace("steps = 12", "steps = 4")
    gpt2 = 'positions = "learned"\nnorm = "layer"\nmlp = "gelu"\nvocab_size = 512\n'
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.toml").write_text(text, "utf-8")
    (tmp_path / "configs/gpt2-124m.toml").write_text(text.replace("[data]", gpt2 + "[data]"))
    (tmp_path / "texts").mkdir()
    for path in (ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")):
        shutil.copy(path, tmp_path / "texts")
    foreign(tmp_path / "nanoGPT/data/shakespeare_char", header=False)
    foreign(tmp_path / "fineweb10B", header=True)
    runs = [line for line in commands() if not {"--kernels", "--verify-resume"} & set(line)]
    shutil.copytree(ROOT / "examples/tasks", tmp_path / "examples/tasks")
    if importlib.util.find_spec("lm_eval") is None:  # the extra eval
        runs = [line for line in runs if "python_words" not in " ".join(line)]
    runs = [line for line in runs if "://" not in " ".join(line) and "--merge" not in line]
    runs.sort(key=lambda line: line[0] not in ("fasttrain.prepare", "fasttrain.train"))
    for module, *arguments in runs:
        if arguments[0] == "import":  # what is downloaded is what was exported
            Path("exported").rename("downloaded")
        assert COMMANDS[module](arguments) == 0, capsys.readouterr().err
    assert "You may" in capsys.readouterr().out
    assert Path("runs/base/report.html").is_file()
    names = run_snippet("docs/library.md", "library snippet", tmp_path)
    assert isinstance(names["model"], torch.nn.Module)
    assert names["logits"].shape == (1, 4, names["model"].config.vocab_size)
    assert names["longer"].shape == (1, 12)
    assert names["config"].optim.lr == 1e-4
