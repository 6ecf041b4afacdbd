"""R26: secrets of the environment, the config and URLs stay out of what a run writes and prints."""

import importlib
import logging
import tomllib
from pathlib import Path

import pytest

from fasttrain import session
from fasttrain.__main__ import COMMANDS
from fasttrain.command import command, redacted
from fasttrain.config import (
    EvalConfig,
    LoopConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    config_to_toml,
)
from fasttrain.redact import redact
from fasttrain.train import main
from tests.toy import write_config

SECRET = "s3cr3t-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pa55@host/x", "https://***@host/x"),
        ("s3://key@bucket/x", "s3://***@bucket/x"),
        ("https://host/x?token=abc&n=1", "https://host/x?token=***&n=1"),
        ("https://host/x?n=1&X-Amz-Signature=ab/cd", "https://host/x?n=1&X-Amz-Signature=***"),
        ("https://host/x?sig=ab%2F&se=2", "https://host/x?sig=***&se=2"),
        ('path = "https://a:b@host/?access_key=c"', 'path = "https://***@host/?access_key=***"'),
        ("git@host:x, 3 @ 4, a?b=1", "git@host:x, 3 @ 4, a?b=1"),
        ("tokens=5 key=3", "tokens=5 key=3"),
    ],
)
def test_urls(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize("prompt", ['get("/x?key=abc")', '<a href="/?token=x">', "a\\?key=\\"])
def test_what_is_left_of_a_config_is_toml(prompt: str) -> None:
    config = TrainConfig(
        train=LoopConfig(steps=1), eval=EvalConfig(prompts=(prompt,)), run=RunConfig(seed=3)
    )
    left = config_from_dict(tomllib.loads(redact(config_to_toml(config))))
    assert left.run.seed == 3
    assert len(left.eval.prompts or ()) == 1


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
        assert redact(f"error: {SECRET}-{name}!") == "error: ***!"
    monkeypatch.setenv("MODE_TOKEN", "adamw")  # too short to be one
    assert redact("optim.name = adamw") == "optim.name = adamw"
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Grace Hopper")
    assert redact("by Grace Hopper") == "by Grace Hopper"


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_R26_no_secret_reaches_logs_checkpoints_and_tracebacks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "fasttrain")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    in_url = "url-secret-42"
    data = write_config(tmp_path).parent / "data"
    odd = tmp_path / f"https:/me:{in_url}@host" / "data"
    odd.parent.mkdir(parents=True)
    data.rename(odd)
    url = f"https://me:{in_url}@host/data"  # a path that exists, as well as a URL
    prompts = f'eval.prompts=["{SECRET}"]'
    run = [str(tmp_path / "toy.toml"), f"data.path={url}", prompts, "train.steps=3"]
    assert main([*run, "--stop-at-step", "2"]) == 75
    assert main([*run, "--resume", "auto"]) in (0, 2)  # 2: with another prompt than was written
    failures = [f"data.path={url}-gone", f"run.out_dir=/dev/null/{SECRET}", f"optim.lr={SECRET}"]
    for failure in failures:
        assert main([*run, failure]) == 2

    def fails(*_: object) -> None:
        raise RuntimeError(f"cannot reach {url}?token={in_url} with {SECRET}")

    monkeypatch.setattr(session, "open_splits", fails)
    assert main(run) == 1
    out, err = capfd.readouterr()
    assert "Traceback" in err
    assert "cannot reach https://***@host" in err
    written = everything_in(tmp_path / "runs")
    assert b"data.path" not in written or b"***" in written
    for secret in (SECRET, in_url):
        assert secret not in out + err + caplog.text
        assert secret.encode() not in written


URL = "https://me:url-secret-42@host/x?token=url-secret-42"
ARGUMENTS = {  # of each command, such that its error names them
    "train": [f"{URL}.toml"],
    "prepare": ["out", "--input", URL],
    "preflight": [f"{URL}.toml"],
    "generate": [URL, "--prompt", "a"],
    "report": [URL],
    "checkpoint": [URL],
    "hf": ["export", URL, "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_R26_no_command_tells_a_secret_in_its_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f"fasttrain.{name}").main(ARGUMENTS[name]) == 2
    out, err = capsys.readouterr()
    assert "***@host" in err
    assert "url-secret-42" not in out + err


def test_R26_nor_does_a_traceback_or_what_torchrun_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def fails() -> int:
        try:
            raise KeyError(URL)
        except KeyError as error:
            raise RuntimeError(f"cannot reach {URL}") from error

    assert fails() == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "RuntimeError: cannot reach https:" in shown
    assert "url-secret-42" not in shown
    monkeypatch.setenv("RANK", "3")
    assert fails() == 1
    assert capsys.readouterr().err.startswith("rank 3: Traceback")
    told = redacted(RuntimeError(f"cannot reach {URL}"))
    assert str(told) == "RuntimeError: cannot reach https://***@host/x?token=***"
