"""The report page and picture, from run folders as the trainer writes them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.config import UserError, config_to_toml, load_config
from fasttrain.report import differences, main, page, read_run
from tests.toy import write_config

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
        row |= {"communication_ms": communication_ms}
        lines.append(json.dumps(row | {"mfu": None, "peak_memory_gib": 0.25}))
    lines.append(json.dumps({"step": 10, "val_loss": None, "val_bpb": None}))  # it was nan
    lines.append(json.dumps({"step": 20, "val_loss": 2.5, "val_bpb": 1.25}))
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
    assert differences(runs)["optim.lr"][1] == 0.5
    assert "optim.lr" in text
    curve = '"name":"communication"'
    assert curve in text
    assert curve not in page(runs[:1]), "one process sends nothing: there is no such curve"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / name / "same")) for name in ("a", "b")]
    out = tmp_path / "out" / "page.html"
    assert main([*runs, "--out", str(out)]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = out.read_text("utf-8")
    assert all(run in text for run in runs), "two runs of one name are told apart by their paths"
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_N18_a_package_that_is_missing_is_named_as_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert main([str(run)]) == 2
    error = "error: the report needs plotly; pip install plotly matplotlib\n"
    assert capsys.readouterr().err == error
    assert not (run / "report.html").exists()


def test_nothing_logged_yet_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training step is logged"):
        read_run(run)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_without_network_draws_every_curve(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one"))
    (tmp_path / "page.html").write_text(page([run]), "utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True).stdout
    # loss and validation, lr, norm, throughput, and the two times of a step
    assert len(re.findall(r'class="trace scatter', dom)) == 7
    assert "over FLOPs" in dom
    assert ">steps</text>" in dom, "the axes are named"
    assert ">data wait</text>" in dom, "so are the parts of a step's time"
