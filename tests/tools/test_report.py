"""The report page and picture, from run folders as the trainer writes them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttrain.config import (
    LogConfig,
    LoopConfig,
    TrainConfig,
    UserError,
    config_to_toml,
    load_config,
)
from fasttrain.library import Trainer
from fasttrain.report import main
from fasttrain.report.page import (
    differences,
    facts,
    moving_average,
    page,
    panels,
    provenance,
    read_run,
)
from tests.support.toy import write_config

pytest.importorskip("plotly", reason="needs the extra report")
pytest.importorskip("matplotlib", reason="needs the extra report")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def make_run(
    folder: Path, *overrides: str, loss: float = 3.0, communication_ms: float | None = None
) -> Path:
    folder.mkdir(parents=True)
    config = load_config(write_config(folder), ["model.vocab_size=320", *overrides])
    (folder / "config.toml").write_text(config_to_toml(config))
    lines = []
    for step in (1, 10, 20):
        row = {"step": step, "tokens": 64 * step, "loss": loss / step, "loss_ema": loss, "lr": 1e-3}
        row |= {"grad_norm": 0.5, "tokens_per_s": 640.0, "step_ms": 100.0, "data_wait_ms": 0.1}
        row |= {"forward_backward_ms": 70.0, "optimizer_ms": 20.0}
        row |= {"communication_ms": communication_ms, "progress": step / 80}
        row |= {"time": f"2026-11-22T23:59:{step:02}+00:00"}
        lines.append(json.dumps(row | {"mfu": None, "peak_memory_gib": 0.25}))
    lines.append(json.dumps({"step": 10, "val_loss": None, "val_bpb": None}))  # it was nan
    best = {"step": 20, "val_loss": 2.5, "val_bpb": 1.25, "val_ppl": 12.182, "val_accuracy": 0.416}
    lines.append(json.dumps(best | {"time": "2026-11-23T00:01:00+00:00"}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "lo')  # killed
    (folder / "samples.txt").write_text("--- step 20\n<b>while</b> & so on\n")
    return folder


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one"))
    assert [row["step"] for row in run.train] == [1, 10, 20]
    assert run.train[-1]["minutes"] == pytest.approx(20 * 0.1 / 60)
    assert run.train[-1]["flops"] == 64 * 20 * (run.train[0]["flops"] // 64)
    assert [row["val_loss"] for row in run.evals] == [None, 2.5]
    assert run.evals[-1]["tokens"] == 64 * 20
    assert run.samples == ["20\n<b>while</b> & so on\n"]


def test_the_page_needs_nothing_else_and_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "one")),
        read_run(make_run(tmp_path / "two", "optim.lr=0.5", communication_ms=40.0)),
    ]
    text = page(runs)
    assert not re.search(r"<script[^>]*\ssrc=|<link\b|<img\b", text)
    assert "&lt;b&gt;while&lt;/b&gt; &amp; so on" in text
    assert "<b>while" not in text
    assert "optim.lr" in text
    assert "communication" in text
    assert "communication" not in page(runs[:1]), "one process sends nothing: nothing shows it"


def test_the_page_says_what_made_a_run_and_what_went_on_with_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    assert 'class="made"' not in page([read_run(folder)]), "a run from before this was noted"
    log = folder / "metrics.jsonl"
    first = {"kind": "run", "step": 0, "fasttrain": "0.1.0", "commit": "ab" * 20, "torch": "2.13.0"}
    first |= {"uncommitted_changes": False, "triton": None, "python": "3.11.7", "parent": None}
    first |= {"device": "NVIDIA H200", "cuda": "12.8", "driver": "570.86", "command": "train <b>"}
    second = first | {"step": 10, "commit": "cd" * 20, "uncommitted_changes": True, "parent": "a/b"}
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*map(json.dumps, (first, second)), *lines]))
    run = read_run(folder)
    assert [row["step"] for row in run.train] == [1, 10, 20]
    assert provenance(run) == {
        "fasttrain": "0.1.0",
        "commit": f"{'ab' * 20}; from step 10 on: {'cd' * 20}",
        "uncommitted_changes": "False; from step 10 on: True",
        "python": "3.11.7",
        "torch": "2.13.0",
        "device": "NVIDIA H200",
        "cuda": "12.8",
        "driver": "570.86",
        "command": "train <b>",
        "parent": "from step 10 on: a/b",
    }
    assert 'class="made"' in page([run])
    assert "<td>train &lt;b&gt;</td>" in page([run])


def test_differences_are_as_in_a_config(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    keys = ["train.max_grad_norm=none", "optim.betas=[0.8, 0.9]", "model.bias=true"]
    keys += ["schedule.context_fractions=[0.25, 0.5]", "train.ema_decay=0.5"]
    before, after = differences([load_config(path), load_config(path, keys)])
    assert before.keys() == after.keys()
    assert {key: (before[key], after[key]) for key in after} == {
        "model.bias": ("false", "true"),
        "optim.betas": ("[0.9, 0.95]", "[0.8, 0.9]"),
        "schedule.context_fractions": ("[]", "[0.25, 0.5]"),
        "train.ema_decay": ("none", "0.5"),
        "train.max_grad_norm": ("1.0", "none"),
    }


def test_the_smoothed_loss_is_a_mean_over_the_last_steps(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one"))
    run.train = [{"step": step, "loss": float(step)} for step in range(10, 110, 10)]
    run.train[6]["loss"] = None  # it was not finite
    # Steps 10 to 40 reach back by a quarter of them and find no line but their own.
    assert moving_average(run, 20) == [10, 20, 30, 40, 45, 55, 60, 80, 85, 95]
    assert moving_average(run, 1000)[-1] == (80 + 90 + 100) / 3 == 90


def test_the_table_has_dates_perplexity_and_accuracy(tmp_path: Path) -> None:
    shown = facts(read_run(make_run(tmp_path / "one")), n_steps=1)
    assert (shown["started"], shown["ended"]) == ("2026-11-22 23:59", "2026-11-23 00:01")
    assert shown["steps"] == "20 (25% of the run)"
    assert shown["train loss, smoothed"] == shown["train loss, last logged"] == "0.1500"
    best = ["best validation loss", "… at step", "… perplexity", "… bits per byte", "… accuracy"]
    assert [shown[key] for key in best] == ["2.5000", "20", "12.18", "1.2500", "41.6%"]


def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one", communication_ms=40.0))
    run.train[0]["first_step_s"] = 2.0  # it compiled
    time = next(panel for panel in panels([run]) if "time" in panel.title)
    assert {curve.kind for curve in time.curves} == {"area"}
    assert [curve.y[0] for curve in time.curves] == pytest.approx([0.1, 30.0, 40.0, 20.0, 9.9])
    assert [row["step"] for row in time.curves[0].rows] == [10, 20]


@pytest.mark.parametrize(("last", "scale"), [(340.0, "normal"), (24.5, "log")])
def test_an_axis_is_logarithmic_where_it_then_has_ticks(
    tmp_path: Path, last: float, scale: str
) -> None:
    run = read_run(make_run(tmp_path / "one"))
    run.evals = [{**run.evals[0], "val_ppl": 474.0}, {**run.evals[-1], "val_ppl": last}]
    (panel,) = (panel for panel in panels([run]) if "perplexity" in panel.title)
    assert panel.scale == scale


def test_a_run_of_the_library_can_be_reported(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    config = TrainConfig(train=LoopConfig(steps=3), log=LogConfig(every_steps=1))
    tokens = torch.arange(32).reshape(4, 8) % 8
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in tokens], batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, config=config, run_dir=tmp_path / "own").train(loader, loader)
    assert main([str(tmp_path / "own")]) == 0
    text = (tmp_path / "own/report.html").read_text("utf-8")
    assert "train loss, smoothed" in text
    assert "over minutes" in text
    assert "over tokens" not in text, "this trainer counts no tokens"
    assert main([str(tmp_path / "own"), "--axis", "tokens"]) == 2


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(make_run(tmp_path / name / "same")) for name in ("a", "b")]
    out = tmp_path / "out" / "page.html"
    assert main([*runs, "--out", str(out)]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = out.read_text("utf-8")
    assert all(run in text for run in runs), "two runs of one name are told apart by their paths"
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([runs[0]]) == 0
    told = rf"{runs[0]}/report\.html .*report\.png\b.*\b1 run\n"
    assert re.fullmatch(told, capsys.readouterr().out)
    own = Path(runs[0], "report.html").read_bytes()
    other = make_run(tmp_path / "other")
    assert main([runs[0], str(other)]) == 0
    told = r"report-same-other\.html .*report-same-other\.png\b.*\b2 runs\n"
    assert re.fullmatch(told, capsys.readouterr().out)
    assert Path("report-same-other.png").is_file()
    assert Path(runs[0], "report.html").read_bytes() == own, "the report of one run was overwritten"
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_as_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert main([str(run)]) == 2
    told = r"error: .*plotly.*pip install plotly matplotlib\n"
    assert re.fullmatch(told, capsys.readouterr().err)
    assert not (run / "report.html").exists()


def test_nothing_logged_yet_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*step"):
        read_run(run)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_without_network_draws_every_curve(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one"))
    text = page([run]) + "<script>over('FLOPs'); show(0, false)</script>"
    (tmp_path / "page.html").write_text(page([run]), "utf-8")
    (tmp_path / "chosen.html").write_text(text, "utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900"]
    whole, chosen = (
        subprocess.run(
            [*command, (tmp_path / name).as_uri()],
            capture_output=True,
            text=True,
            timeout=400,
            check=True,
        ).stdout
        for name in ("page.html", "chosen.html")
    )
    # loss as it is, smoothed and of the validation; perplexity, accuracy, lr, norm, throughput;
    # and of a step's time four parts
    assert len(re.findall(r'class="trace scatter', whole)) == 12
    assert "over FLOPs" in whole
    assert whole.count(">steps</text>") == 7, "the axes are named"
    assert "</b> data wait" in whole, "so are the parts of a step's time"
    assert chosen.count(">FLOPs</text>") == 7
    assert 'class="trace scatter' not in chosen, "the run was unticked"


def test_a_branch_is_drawn_with_what_its_parents_logged_before_it(tmp_path: Path) -> None:
    make_run(tmp_path / "base")
    branch, last = make_run(tmp_path / "fork"), make_run(tmp_path / "last")
    for folder, parent, step in ((branch, "base", 10), (last, "fork", 20)):
        log = folder / "metrics.jsonl"
        source = f"gone/{parent}/checkpoints/step-{step:08d}"
        lines = log.read_text().splitlines(keepends=True)
        if folder is branch:
            lines = [line for line in lines if '"step": 20' in line]
        head = json.dumps({"kind": "run", "step": step, "parent": source})
        log.write_text("".join([head + "\n", *lines]))
    run = read_run(branch)
    assert [row["step"] for row in run.before] == [1, 10]
    assert run.parent == "base at step 10"
    assert facts(run, 1)["branch of"] == "base at step 10"
    assert "base at step 10" in page([run])
    names = [curve.name for curve in panels([run])[0].curves]
    assert names == ["parent", "", "smoothed", "validation"]
    # Time counts from where the branch began.
    assert run.train[-1]["minutes"] == pytest.approx(0.1 * 10 / 60)
    assert [row["step"] for row in read_run(last).before] == [1, 10, 20]
    # A run that claims to be its own parent, or whose parent is gone, is drawn alone.
    for parent in ("fork", "nowhere"):
        log = branch / "metrics.jsonl"
        log.write_text(log.read_text().replace("gone/base/", f"gone/{parent}/"))
        assert read_run(branch).before == []
    assert main([str(branch)]) == 0


def test_a_page_is_not_named_as_the_picture_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    assert main([str(make_run(tmp_path / "a")), "--out", str(out)]) == 2
    assert re.search(rf"--out {out}: .*PNG.*\.html", capsys.readouterr().err)
    assert not out.exists()


def test_a_parent_that_no_path_names_is_passed_over(tmp_path: Path) -> None:
    log = make_run(tmp_path / "a") / "metrics.jsonl"
    head = {"kind": "run", "step": 10, "parent": "a\0b/c/checkpoints/step-00000010"}
    log.write_text(json.dumps(head) + "\n" + log.read_text())
    assert read_run(tmp_path / "a").parent == ""
