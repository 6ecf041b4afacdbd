"""What is decided about bad steps, and what is written down of them."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.config.schema import LoopConfig
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.data.tokenizer import load_tokenizer
from fasttrain.engine.faults import (
    MAX_REPORTS,
    MAX_SKIPPED_IN_A_ROW,
    Recovery,
    write_report,
)
from fasttrain.engine.state import Fault, RunState, StateGuard
from fasttrain.engine.step import FINE, NONFINITE, OVERFLOW, SPIKE, StepNumbers
from tests.support.toy import write_dataset


def judged(policy: Recovery, *verdicts: int, first: int = 1) -> tuple[str, list[int], list[int]]:
    """Return the action, the offending steps and the reported ones; a step has four samples."""
    steps = [StepNumbers(3.0 if v in (FINE, SPIKE) else math.nan, 1.0, v) for v in verdicts]
    positions = [4 * (first - 1 + i) for i in range(len(steps))]
    decision = policy.judge(first, positions, steps)
    offending = [fault.step for fault in decision.offending]
    return decision.action, offending, [fault.step for fault in decision.reported]


def policy(**keys: Any) -> Recovery:
    config = SimpleNamespace(train=LoopConfig(steps=1, **keys))
    state = RunState(samples_per_step=4, total_steps=None, position=0, regular=True)
    saver: Any = SimpleNamespace(config=config, state=state, train_step=None, reporter=None)
    return Recovery(saver, StateGuard(torch.device("cpu")))


@pytest.mark.parametrize(
    ("keys", "verdict", "action"),
    [
        ({}, NONFINITE, "go on"),
        ({"on_nonfinite": "rollback"}, NONFINITE, "roll back"),
        ({"on_nonfinite": "rollback", "max_rollbacks": 0}, NONFINITE, "stop"),
        ({"on_nonfinite": "stop"}, NONFINITE, "stop"),
        ({"on_nonfinite": "stop", "on_spike": "skip"}, SPIKE, "go on"),
        ({"on_spike": "rollback"}, SPIKE, "roll back"),
        ({"on_nonfinite": "stop"}, OVERFLOW, "go on"),
    ],
)
def test_R18_the_config_decides(keys: dict[str, object], verdict: int, action: str) -> None:
    bad = policy(**keys)
    offending = [] if action == "go on" else [2]
    reported = [] if verdict == OVERFLOW else [2]
    assert judged(bad, FINE, verdict, FINE) == (action, offending, reported)
    assert (bad.state.faults.skipped_steps, bad.state.faults.spikes) == (1, int(verdict == SPIKE))


ODD = [*[0.5] * 19, 0.02, *[0.5] * 10]


def test_an_exploding_gradient_is_told_of() -> None:
    watched = policy()

    def told(*norms: float, verdict: int = FINE) -> str:
        steps = [StepNumbers(3.0, norm, verdict) for norm in norms]
        return watched.judge(1, [0] * len(steps), steps).warning

    assert not told(9.0, *[0.5, 0.6, 0.4] * 40), "no run begins with its usual norm"
    assert re.search(r"\bnorm\b.*\b6\.5\b.*\b0\.5\b", told(0.5, 6.5))
    one_small = policy().judge(1, [0] * 30, [StepNumbers(3.0, n, FINE) for n in ODD]).warning
    assert not one_small, "what is usual is an average from the first on"
    assert not told(0.5, math.inf), "what is not finite is a bad step, reported as such"
    assert not told(6.5, verdict=SPIKE)
    assert told(*[50.0] * 30)
    assert not told(*[50.0] * 10), "the new level is the usual one"


def test_R18_a_row_of_bad_steps_rolls_back_once_then_stops() -> None:
    bad = policy()
    assert judged(bad, *[NONFINITE] * 5)[0] == "go on"
    assert judged(bad, FINE, *[NONFINITE] * (MAX_SKIPPED_IN_A_ROW - 1), first=6)[0] == "go on"
    first = 7
    bad.state.faults.load(
        json.loads(json.dumps(bad.state.faults.saved()))
    )  # a row goes on after a resume
    action, offending, _ = judged(bad, OVERFLOW, first=26)
    assert (action, offending) == ("roll back", list(range(first, 27)))
    bad.state.faults.rolled_back(bad.state.faults.row.copy())
    assert bad.state.faults.rollbacks == 1
    assert bad.state.faults.row == []
    assert judged(bad, *[NONFINITE] * MAX_SKIPPED_IN_A_ROW)[0] == "stop"


def test_R18_rollbacks_are_limited_and_counted_over_resumes() -> None:
    bad = policy(on_spike="rollback", max_rollbacks=2)
    for n in (1, 2):
        decision = bad.judge(5 * n, [20 * n], [StepNumbers(9.0, 1.0, SPIKE)])
        assert decision.action == "roll back"
        bad.state.faults.rolled_back(decision.offending)
        bad.state.faults.load(json.loads(json.dumps(bad.state.faults.saved())))
    assert bad.state.faults.passed_over == [20, 40]
    assert judged(bad, SPIKE)[0] == "stop"


def test_positions_jump_over_what_is_passed_over() -> None:
    bad = policy()
    bad.state.faults.rolled_back(
        [Fault(n, at, "spike", 9.0, 1.0) for n, at in ((6, 20), (3, 8), (4, 12))]
    )
    found = []
    for bad.state.position in (0, 7, 8, 11, 12, 15, 16, 20, 24):
        found.append(bad.state.next_position)
    assert found == [0, 7, 16, 16, 16, 16, 16, 24, 24]


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    data = open_dataset(write_dataset(tmp_path / "data"), "train")
    options = LoaderOptions(seq_len=16, micro_batch=2, seed=7, rank=1, world_size=2)
    return Loader(data, options, device="cpu")


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_R18_the_samples_of_a_bad_step_are_written_down(
    loader: Loader, tmp_path: Path, with_tokenizer: bool
) -> None:
    if with_tokenizer:
        (tmp_path / "tokenizer.json").write_bytes((tmp_path / "data/tokenizer.json").read_bytes())
    with loader:
        fault = Fault(9, 64, "nonfinite", math.nan, math.inf)
        path = write_report(fault, loader, 2, tmp_path)
        assert path == tmp_path / "faults/step-00000009-rank-1.jsonl"
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert [line["position"] for line in lines] == [66, 67, 70, 71]  # those of rank 1
        for line in lines:
            assert (line["step"], line["kind"]) == (9, "nonfinite")
            assert (line["loss"], line["norm"]) == ("nan", "inf")
            assert line["sample"] == loader.sample_ids(line["position"], 1)[0]
            tokens = loader.dataset.read(line["sample"] * 16, 16).tolist()
            if with_tokenizer:
                tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
                assert line["text"] == tokenizer.decode(tokens)
            else:
                assert line["tokens"] == tokens
        assert loader.position == 0


def test_reports_do_not_fill_the_disk(loader: Loader, tmp_path: Path) -> None:
    with loader:
        paths = [
            write_report(Fault(n, 0, "spike", 9.0, 1.0), loader, 1, tmp_path)
            for n in range(MAX_REPORTS + 2)
        ]
        assert paths[-3:-1] == [tmp_path / f"faults/step-{MAX_REPORTS - 1:08d}-rank-1.jsonl", None]
        again = write_report(Fault(0, 0, "spike", 9.0, 1.0), loader, 1, tmp_path)
    assert again == paths[0]
    assert len(list((tmp_path / "faults").iterdir())) == MAX_REPORTS


def test_the_reason_to_stop_names_samples_and_remedy(loader: Loader) -> None:
    with loader:
        bad = policy(on_nonfinite="stop")
        decision = bad.judge(1, [0, 4], [StepNumbers(math.nan, 1.0, NONFINITE)] * 2)
        reason = bad.reason(decision, loader)
        ids = ", ".join(map(str, loader.sample_ids(0, 4)))
    assert f"samples {ids}" in reason
    assert re.search(r"step 1: nonfinite\b.*\bnan\b.*\b1 more\b.*\bstep 2\b", reason)
    assert "train.on_nonfinite = 'stop'" in reason
    assert "optim.lr" in reason
    assert "\n" not in reason
