"""R26: secrets of the environment, the config and URLs stay out of what a run writes and prints."""

import base64
import json
import logging
import os
import tomllib
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain import report
from fasttrain.__main__ import COMMANDS
from fasttrain.command import command
from fasttrain.config import (
    EvalConfig,
    LoopConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    config_to_toml,
)
from fasttrain.redact import redact
from fasttrain.run import setup as session
from fasttrain.train import main
from tests.support.toy import module_of, write_config

SECRET = "s3cr3t-0123456789abcdef"
SECRETS = {
    "plain": SECRET,
    "quotes": "hunter2\"quoted'9",
    "backslashes": "C0rrect\\horse\\9\\",
    "lines": "-----BEGIN KEY-----\nMIIEvQIBADANBg/x+9=\n-----END KEY-----\n",
    "letters": "pässwörd & 1é😀\t\x7f",
}
NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD"),
    *(
        "MYSQL_PWD",
        "DB_PASS",
        "OPENAI_KEY",
        "AZURE_STORAGE_KEY",
        "HF_AUTH",
        "PGPASSWORD",
        "SSHPASS",
    ),
    *("SMTP_PASSWD", "GPG_PASSPHRASE", "githubToken", "StripeApiKey", "APIKEY", "MY_CREDENTIAL"),
    *("GOOGLE_CREDENTIALS", "CLIENT_SECRETS", "KEY2", "HTTP_AUTHORIZATION"),
)
HARMLESS = {
    "TOKENS": "10000000", "MAX_TOKENS": "1e12345678", "TOKEN_BUDGET": "10_000_000",
    "TOKENIZER_DIR": "/data/tok", "TOKENIZER": SECRET, "KEYBOARD": "us", "KEYBOARD_LAYOUT": SECRET,
    "SSH_AUTH_SOCK": "/tmp/ssh-XXXX/agent.123", "XAUTHORITY": "/home/a/.Xauthority",
    "KEY_FILE": "~/keys/id_rsa.pem", "TOKEN_PATH": "../secrets/token", "WINDOWS_KEY": "C:\\keys\\a",
    "USE_AUTH": "true", "COMPASS": SECRET, "MONKEY": SECRET, "MODE_TOKEN": "adamw",
    "AUTH_METHOD": "interactive", "KEY_TYPE": "Certificate", "HF_AUTH": "DISABLED",
    "GIT_AUTHOR_NAME": SECRET,
}  # fmt: skip


def forms(secret: str) -> list[str]:
    """Return a secret as it is and escaped in the ways in which files and messages hold it."""
    toml = config_to_toml(
        TrainConfig(train=LoopConfig(steps=1), eval=EvalConfig(prompts=(secret,)))
    ).partition("prompts = [")[2].partition("]\n")[0]  # fmt: skip
    quoted = [json.dumps(secret), toml, repr(secret), ascii(secret), json.dumps(toml[1:-1])]
    urls = [quote(secret), quote(secret, safe=""), quote_plus(secret)]
    return [secret, *urls, *(form[1:-1] for form in quoted)]


def leaks(secret: str, text: str) -> list[str]:
    parts = [secret, *(line for line in secret.splitlines() if len(line) > 7)]
    return [form for part in parts for form in forms(part.strip("\n\\")) if form in text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pa55@host/x", "https://***@host/x"),
        ("s3://key@bucket/x", "s3://***@bucket/x"),
        ("https://host/x?token=abc&n=1", "https://host/x?token=***&n=1"),
        ("https://host/x?n=1&X-Amz-Signature=ab/cd", "https://host/x?n=1&X-Amz-Signature=***"),
        ("https://host/x?sig=ab%2F&se=2", "https://host/x?sig=***&se=2"),
        ('path = "https://a:b@host/?access_key=c"', 'path = "https://***@host/?access_key=***"'),
        ("s3://AK:wJal/K7/b@bucket/x", "s3://***@bucket/x"),
        ("memory://me:pa'ss/word@h/m", "memory://***@h/m"),
        ('a = ["s3://k:p/q@h", "b@c"]', 'a = ["s3://***@h", "b@c"]'),
        ('a = "s3://k:p\\"/q@h"', 'a = "s3://***@h"'),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("hf://datasets/a/b@main/x", "hf://datasets/a/b@main/x"),
        ("//me:pa55@host/x", "//***@host/x"),
        ("https://host/x?code=abc&n=1", "https://host/x?code=***&n=1"),
        ("https://host/x?access_code=abc", "https://host/x?access_code=***"),
        ("https://host/x?p%61ssword=abc&n=1", "https://host/x?p%61ssword=***&n=1"),
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


@pytest.mark.parametrize("name", NAMES)
def test_R26_names_that_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"{SECRET}-{name}")
    assert redact(f"error: {SECRET}-{name}!") == "error: ***!"


def test_R26_names_and_values_that_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys-1").mkdir()
    Path("keys-1/id_rsa").touch()
    for name, value in {**HARMLESS, "SSH_KEY": "keys-1/id_rsa"}.items():
        monkeypatch.setenv(name, value)
        assert redact(f"{name} = {value}!") == f"{name} = {value}!"


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_R26_every_escaped_form(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", secret)
    for form in forms(secret):
        left = redact(f"error: {form}!")
        assert left == "error: ***!"
    config = TrainConfig(
        train=LoopConfig(steps=1), eval=EvalConfig(prompts=("a", f"b{secret}c", "d"))
    )
    left = tomllib.loads(config_to_toml(config, redact))
    assert left["eval"]["prompts"] == ["a", "b***c", "d"]
    assert config_from_dict(left).train.steps == 1


@given(st.text(), st.text(min_size=1), st.text('ab*@:/?=key\\"', max_size=30))
def test_R26_redacting_twice_changes_nothing(before: str, secret: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("A_TOKEN", f"*{after}".replace("\0", "") + "***")
        value = secret.encode(errors="replace").decode().replace("\0", "")
        patched.setenv("B_TOKEN", f"abc*{value}")
        left = redact(f"{before}{os.environ['B_TOKEN']}{after}{after}**")
        assert redact(left) == left


def test_R26_no_choice_of_a_config_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIM_KEY", "adamw8bit")
    config = TrainConfig(train=LoopConfig(steps=1), optim=OptimConfig(name="adamw8bit"))
    assert config_from_dict(tomllib.loads(config_to_toml(config, redact))) == config


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_R26_no_secret_reaches_logs_checkpoints_and_tracebacks(
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "fasttrain")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    in_url = "url-secret-42"
    write_config(tmp_path)
    url = f"https://me:{in_url}@host/cache"  # a path that can be made, as well as a URL
    prompts = f"eval.prompts={json.dumps([secret], ensure_ascii=False)}".replace("\x7f", "\\u007f")
    run = [str(tmp_path / "toy.toml"), f"data.cache_dir={url}", prompts, "train.steps=3"]
    assert main([*run, "--stop-at-step", "2"]) == 75
    assert main([*run, "--resume", "auto"]) in (0, 2)  # 2: with another prompt than was written
    failures = [f"data.path=file-{url}", f"run.out_dir=/dev/null/{secret}", f"optim.lr={secret}"]
    for failure in failures:
        assert main([*run, failure]) == 2

    def fails(*_: object) -> None:
        raise RuntimeError(f"cannot reach {url}?token={in_url} with {secret}, {secret!r}")

    monkeypatch.setattr(session, "open_splits", fails)
    assert main(run) == 1
    assert report.main(["runs/toy"]) == 0
    assert {"report.html", "metrics.jsonl", "train.log", "samples.txt", "checkpoints"} <= set(
        os.listdir("runs/toy")
    )
    out, err = capfd.readouterr()
    assert "Traceback" in err
    assert "cannot reach https://***@host" in err
    written = everything_in(tmp_path / "runs")
    text = written.decode(errors="replace")
    for hidden in (secret, in_url):
        assert leaks(hidden, out + err + caplog.text) == []
        assert leaks(hidden, text) == []
    assert "***" in text


URL = "https://me:url-secret-42@host/x?token=url-secret-42"
ARGUMENTS = {  # of each command, such that its error names them
    "train": [f"{URL}.toml"],
    "prepare": ["out", "--input", URL],
    "preflight": [f"{URL}.toml"],
    "generate": [URL, "--prompt", "a"],
    "report": [URL],
    "checkpoint": [URL],
    "evaluate": [URL, "--tasks", "a"],
    "hf": ["export", URL, "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_R26_no_command_tells_a_secret_in_its_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "evaluate":
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fasttrain.storage.PAUSE_S", 0)
    assert module_of(name).main(ARGUMENTS[name]) == 2
    out, err = capsys.readouterr()
    assert "https://host/x" in err if name == "prepare" else "***@host" in err
    assert "url-secret-42" not in out + err


def test_R26_nor_does_a_traceback_or_what_torchrun_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert fails() == 1
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told.endswith("RuntimeError: cannot reach https://***@host/x?token=***")
    assert "url-secret-42" not in told


KEY = "/Xk3vQ9pLr7sTz1uYw5bNc8dMf2gHj4kA6eRi0oB"
SPELLINGS = {  # a variable, its value, a text that holds it in some spelling, and what is left
    "a slash in front": ("AWS_SECRET_ACCESS_KEY", KEY, f"key {KEY}.", "key ***."),
    "a dot and a slash": ("API_KEY", f".{KEY}", f"key .{KEY}", "key ***"),
    "a home of others": ("API_KEY", f"~{KEY}", f"key ~{KEY}", "key ***"),
    "digits alone": ("DB_PASSWORD", "20241125", "it is 20241125, that", "it is ***, that"),
    "digits with signs": ("CARD_PIN", "4929-1234-5678", "pin=4929-1234-5678", "pin=***"),
    "of a root": ("MYSQL_ROOT_PASSWORD", KEY, f"'{KEY}'", "'***'"),
    "of a home": ("HOME_ASSISTANT_TOKEN", KEY, f"'{KEY}'", "'***'"),
    "in a URL": ("API_KEY", KEY, f"https://h/{quote(KEY, safe='')}", "https://h/***"),
    "base64": ("API_KEY", SECRET, base64.b64encode(SECRET.encode()).decode(), "***Y="),
    # What of base64 depends on other bytes as well is left.
    "base64, inside": (
        "API_KEY",
        SECRET,
        base64.b64encode(f"me:{SECRET}".encode()).decode(),
        "bWU6***Y=",
    ),
    "base64 of URLs": ("API_KEY", "~~~???ÿÿÿ~~~", "fn5-Pz8_w7_Dv8O_fn5-", "***"),
    "hex": ("API_KEY", SECRET, SECRET.encode().hex(), "***"),
    "HEX": ("API_KEY", SECRET, SECRET.encode().hex().upper(), "***"),
    "in another's URL": ("DATABASE_URL", f"pg://me:{SECRET}@h/db", f"with {SECRET}", "with ***"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_R26_a_secret_is_hidden_however_it_begins_and_is_spelled(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value, text, left = SPELLINGS[case]
    assert redact(text) == text
    monkeypatch.setenv(name, value)
    assert redact(text) == left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("to=https%3A%2F%2Fme%3Apa55@h", "to=https%3A%2F%2F***@h"),
        ("to=https%3A%2F%2Fme%3Apa55%40host%2Fx", "to=https%3A%2F%2F***%40host%2Fx"),
        ("https://h/?to=%2Fx%3Ftoken%3Dabc%26n%3D1", "https://h/?to=%2Fx%3Ftoken%3D***%26n%3D1"),
        ("Authorization: Bearer abcdefgh12", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic bWU6cGE1NQ=='}", "{'authorization': 'Basic ***'}"),
        ("X-API-Key: abcdefgh12", "X-API-Key: ***"),
        ("authorization was refused; a basic understanding", None),
    ],
)
def test_R26_what_other_urls_and_headers_hold_is_hidden(text: str, expected: str | None) -> None:
    assert redact(text) == (text if expected is None else expected)
    assert redact(redact(text)) == redact(text)


def test_R26_numbers_that_hold_the_digits_of_a_secret_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "20241125")
    assert redact("1202411259 and 20241125") == "1202411259 and ***"
