"""Fixtures of the tests of runs."""

from pathlib import Path

import pytest

from tests.support.toy import write_config


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config of a small run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)
