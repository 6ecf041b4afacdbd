"""Toy trainers, closed after each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import toy_trainer
from tests.support.toy import write_config


@pytest.fixture(autouse=True)
def _close_trainers() -> Iterator[None]:
    before, toy_trainer.opened = toy_trainer.opened, []
    yield
    while toy_trainer.opened:
        toy_trainer.opened.pop().close()
    toy_trainer.opened = before


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_config(tmp_path)
