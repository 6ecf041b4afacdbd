"""What the benchmarks are read by: figures to files, files to tables, old against new."""

import ast
import json
import math
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, report
from benchmarks.compare import change_of
from benchmarks.compare import main as compare

MACHINE = {
    "device": "Some CPU", "kind": "cpu", "isa": "AVX2", "threads": 2, "python": "3.12.0",
    "torch": "2.11.0", "triton": "3.6.0", "peers": {},
}  # fmt: skip
CEILINGS = {"copy_gb_per_s": 20.0, "matmul_tflop_per_s": 0.2}


def entry_of(
    scale: float = 1.0, machine: float = 1.0, n: int = 20, seed: int = 0
) -> dict[str, Any]:
    """A benchmark in which ours takes ``scale`` and everything ``machine`` times as long."""
    rng = random.Random(seed)
    load = [machine * math.exp(rng.gauss(0, 0.2)) for _ in range(n)]  # what the rivals share
    ours = [1e-3 * scale * x * math.exp(rng.gauss(0, 0.01)) for x in load]
    theirs = [2e-3 * x * math.exp(rng.gauss(0, 0.01)) for x in load]
    return {"name": "op[8]", **harness.comparison({"fasttrain": ours, "torch": theirs})}


def write(path: Path, *entries: dict[str, Any], suite: str = "op", **machine: str) -> str:
    harness.write(path, harness.document(suite, entries, MACHINE | machine, CEILINGS))
    return str(path)


# ---- old against new -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "verdict", "status"),
    [
        (entry_of(seed=1), "same", 0),
        (entry_of(1.1, seed=1), "SLOWER", 1),
        (entry_of(0.8, seed=1), "faster", 0),
        (entry_of(machine=3.0, seed=1), "same", 0),  # the rivals took as much longer
        (entry_of(1.1, machine=0.5, seed=1), "SLOWER", 1),  # hidden by a machine that is faster
    ],
)
def test_a_regression_is_what_the_rivals_do_not_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: Any, verdict: str, status: int
) -> None:
    old_path, new_path = write(tmp_path / "old.json", entry_of()), write(tmp_path / "new.json", new)
    assert compare([old_path, new_path]) == status
    assert capsys.readouterr().out.split()[0] == verdict


def test_noise_grows_with_the_spread_of_the_rounds() -> None:
    def noise(spread: float) -> float:
        rng = random.Random(0)
        times = [math.exp(rng.gauss(0, spread)) for _ in range(15)]
        entry = {"times_s": {"fasttrain": times}}
        change = change_of(entry, entry)
        assert change is not None
        assert change.change == 0
        return change.noise

    assert noise(1e-6) == pytest.approx(0.05)  # its floor
    assert noise(0.1) > 0.05
    assert noise(0.4) == pytest.approx(4 * noise(0.1), rel=0.2)
    once = {"times_s": {"fasttrain": [1.0]}}
    alone = change_of(once, {"times_s": {"fasttrain": [9.0]}})
    assert alone is not None
    assert alone.verdict == "same"  # one round tells nothing of the noise


def test_what_cannot_be_compared_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.json", entry_of())
    other = write(tmp_path / "other.json", entry_of() | {"name": "another"})
    elsewhere = write(tmp_path / "elsewhere.json", entry_of(), device="Another CPU")
    newer = write(tmp_path / "newer.json", entry_of(), isa="AVX-512")
    (tmp_path / "bad.json").write_text("[]", "utf-8")
    for new in (
        other,
        elsewhere,
        newer,
        str(tmp_path / "bad.json"),
        str(tmp_path / "missing.json"),
    ):
        assert compare([good, new]) == 2
        assert "error: " in capsys.readouterr().err


def test_folders_are_compared_suite_by_suite_and_device_by_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, scale in (("old", 1.0), ("new", 1.2)):
        write(tmp_path / folder / "cpu" / "a.json", entry_of(), suite="a")
        write(tmp_path / folder / "cpu" / "b.json", entry_of(scale), suite="b")
        write(tmp_path / folder / "gpu" / "a.json", entry_of(1 / scale), suite="a", device="GPU")
    write(tmp_path / "old" / "cpu" / "c.json", entry_of(), suite="c")
    assert compare([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["same", "SLOWER", "lost", "faster", "3", "b"]
    assert lines[2].startswith("lost    c ")


@pytest.mark.parametrize(
    ("entries", "status", "first"),
    [
        ([{"name": "op[8]", "failed": "off by 1"}], 1, "FAILED  op op[8]: failed: off by 1"),
        ([{"name": "op[8]", "skipped": "no device"}], 2, "lost    op op[8]: skipped: no device"),
        ([], 2, "lost    op op[8]: skipped: "),
        ([{"name": "op[8]", "times_s": {"fasttrain": [1.0]}}], 2, "lost    op op[8]: no time"),
    ],
)
def test_what_is_no_longer_measured_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entries: Any, status: int, first: str
) -> None:
    old = write(tmp_path / "old.json", entry_of())
    assert compare([old, write(tmp_path / "new.json", *entries)]) == status
    assert capsys.readouterr().out.startswith(first)


# ---- bounds --------------------------------------------------------------------------------------


def test_the_committed_results_keep_their_bounds_but_for_four(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compare([]) == 1
    lines = capsys.readouterr().out.splitlines()
    held = "Intel(R) Xeon(R) Processor, AVX2  trainers trainers"
    # Above the floors that benchmarks/EXPERIMENTS.md states for them.
    assert {line.split(maxsplit=4)[4] for line in lines if line.startswith("BREAKS")} == {
        "AMD EPYC, AVX2  trainers trainers[gpt2-chars] nanoGPT",
        f"{held}[gpt2-chars] nanoGPT",
        f"{held}[llama-256] nanoGPT",
        f"{held}[llama-256] litgpt",
    }


def test_a_bound_holds_for_the_processors_that_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stall = {"name": "stall_of_a_save", "speedup": {"plain copy": 0.82}}
    start = write(tmp_path / "b.json", {"name": "first_step", "first_step_s": 7.5}, suite="startup")
    path = write(tmp_path / "a.json", stall, suite="checkpoint")
    assert compare([path]) == 1
    assert capsys.readouterr().out.split()[:3] == ["BREAKS", "0.82", ">="]
    assert compare([start]) == 0
    assert capsys.readouterr().out.split()[:3] == ["keeps", "7.5", "<="]
    peak = {"name": "peak_memory", "peak_bytes": {"fasttrain": 2e6, "torch": 15e6}}
    assert compare([write(tmp_path / "a.json", peak, suite="linear_cross_entropy")]) == 1
    failed = {"name": "stall_of_a_save", "failed": "off by 1"}
    assert compare([write(tmp_path / "a.json", failed, suite="checkpoint")]) == 1
    capsys.readouterr()
    newer = write(tmp_path / "a.json", stall, suite="checkpoint", isa="AVX-512")
    assert compare([newer]) == 2
    assert re.search(r"error: .*\bbound\b", capsys.readouterr().err)


def test_no_benchmark_fails_for_what_it_timed_but_that_of_the_rule_of_auto() -> None:
    timed, found = {"speedup", "median_s"}, []
    for path in sorted(Path(report.__file__).parent.glob("bench_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assert):
                words = set(re.findall(r"\w+", ast.unparse(node.test)))
                found += [ast.unparse(node)] * bool(words & timed)
    assert len(found) == 1
    assert "fastest" in found[0]


def test_the_benchmarks_end_with_a_table_and_do_not_mind_a_slow_machine(tmp_path: Path) -> None:
    (tmp_path / "bench_toy.py").write_text(
        """
import time
import pytest

def test_slower(compare):
    calls = {"fasttrain": lambda: time.sleep(0.02), "torch": lambda: time.sleep(0.001)}
    compare(calls, left_out={"liger": "needs a CUDA device"})

def test_wrong(compare):
    compare({"fasttrain": int})
    assert 1 == 2, "result 0 is off"

def test_absent(compare):
    pytest.skip("needs a peer")
""",
        "utf-8",
    )
    root = Path(report.__file__).parents[1]
    # In a worker of pytest-xdist, as this may be, there would be no benchmarks.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    options = ["-c", str(root / "benchmarks/pytest.ini"), "--rehearse", "--benchmark-only"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "benchmarks.conftest", "bench_toy.py"],
        cwd=tmp_path, env=env | {"PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    (start,) = [n for n, line in enumerate(lines) if " benchmarks ==" in line]
    processor, header, row, *rest, summary = lines[start + 1 :]
    assert processor.startswith(harness.processor_of(harness.machine()))
    assert processor.endswith(" at the start")
    assert re.split("  +", header) == ["what", "fasttrain", "the others take … times as long"]
    what, _, _, rival, ratio = row.split()
    assert (what, rival) == ("slower", "torch")
    assert float(ratio) >= 0
    assert rest[:3] == [
        "left out: needs a CUDA device: liger",
        "failed: result 0 is off: wrong",
        "skipped: needs a peer: absent",
    ]
    assert "1 failed, 1 passed, 1 skipped" in summary  # the slower one passed
    assert done.returncode == 1


def test_a_processor_is_named_as_torch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, capability, amx, name in (
        ("x86_64", "AVX2", True, "AVX2"),  # ATEN_CPU_CAPABILITY=avx2 on a newer one
        ("x86_64", "AVX512", False, "AVX-512"),
        ("x86_64", "AVX512", True, "AVX-512+AMX"),
        ("aarch64", "DEFAULT", False, "ARM"),
    ):
        monkeypatch.setattr(harness.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert harness.isa() == name


def test_a_busy_machine_is_given_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for load, expected in ((7.9, []), (8.1, [1])):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        harness.yield_to_others()
        assert chosen == expected
    assert os.environ["OMP_NUM_THREADS"] == "1"


# ---- timing --------------------------------------------------------------------------------------


def test_rivals_take_turns_and_speed_ups_are_medians_of_a_round() -> None:
    calls: list[str] = []
    callables = {name: lambda name=name: calls.append(name) for name in "abc"}
    timed = {name: partial(harness.seconds, call, 2) for name, call in callables.items()}
    times = harness.turns(timed, range(3))
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(values) for values in times.values()] == [3] * 3
    compared = harness.comparison({"ours": [1.0, 2.0, 10.0], "theirs": [2.0, 6.0, 10.0]})
    assert compared["speedup"] == {"theirs": 2.0}
    assert compared["median_s"] == {"ours": 2.0, "theirs": 6.0}


def test_rounds_end_with_their_budget_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)

    def n_rounds(round_s: float, budget_s: float) -> int:
        nonlocal now
        count = 0
        for _ in harness.rounds_within(budget_s):
            now, count = now + round_s, count + 1
        return count

    assert n_rounds(0.001, 3.0) == harness.MOST_ROUNDS
    assert n_rounds(0.5, 3.0) == 7
    assert n_rounds(1.4, 3.0) == n_rounds(2.9, 3.0) == harness.LEAST_ROUNDS
    assert n_rounds(3.1, 3.0) == n_rounds(90.0, 3.0) == n_rounds(0.1, 0.0) == 1


def test_a_wrong_or_missing_peer_is_left_out_and_ours_must_be_right() -> None:
    exact = [torch.arange(4.0)]

    def maker(name: str, factor: float) -> Any:
        harness.check(name, [exact[0] * factor], exact, 1e-3)
        return name.upper

    def missing() -> Any:
        raise ImportError("not installed")

    makers = {"fasttrain": partial(maker, "fasttrain", 1.0), "off": partial(maker, "off", 1.01)}
    calls, left_out = harness.gather(makers | {"none": missing})
    assert list(calls) == ["fasttrain"]
    assert "1.0e-02" in left_out["off"]
    assert left_out["none"] == "not installed"
    with pytest.raises(AssertionError, match=r"fasttrain: .*1\.0e-02"):
        harness.gather({"fasttrain": partial(maker, "fasttrain", 1.01)})
    nan = [torch.full((4,), math.nan)]
    with pytest.raises(AssertionError):
        harness.check("nan", nan, exact, 1e-3)


# ---- files and the page ------------------------------------------------------------------------


def test_a_file_is_written_whole_and_read_back(tmp_path: Path) -> None:
    names = {
        isa: harness.folder_of(MACHINE | {"device": "AMD EPYC 7B13 (64)", "isa": isa})
        for isa in ("AVX2", "AVX-512", "AVX-512+AMX")
    }
    assert names == {
        "AVX2": "amd-epyc-7b13-64-avx2",
        "AVX-512": "amd-epyc-7b13-64-avx512",
        "AVX-512+AMX": "amd-epyc-7b13-64-avx512-amx",
    }
    assert harness.folder_of({"device": "NVIDIA H200", "kind": "cuda"}) == "nvidia-h200"
    path = tmp_path / "cpu" / "op.json"
    write(path, {"name": "x", "times_s": {"fasttrain": [0.123456789, 1e-9 / 3]}})
    assert [p.name for p in path.parent.iterdir()] == ["op.json"]
    (document,) = harness.read_all(tmp_path)
    assert document["benchmarks"][0]["times_s"]["fasttrain"] == [0.12346, 3.3333e-10]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, {"name": "x", "speedup": {"torch": math.nan}})
    assert json.loads(path.read_text("utf-8")) == document


def test_the_page_is_what_the_files_say() -> None:
    found = re.search(report.PART.format("measured"), report.PAGE.read_text("utf-8"), re.S)
    assert found is not None
    assert found[0] == report.render(harness.read_all()), "run make report"


def test_report_shows_what_was_measured_and_nothing_else() -> None:
    assert report.render([]) == "On a CPU: not measured.\n\nOn a GPU: not measured.\n"
    step = entry_of() | {
        "name": "training_step[gpt2-chars]",
        "tokens_per_s": {"fasttrain": 12345.6},
    }
    memory = {"name": "peak_memory", "peak_bytes": {"fasttrain": 2e6, "torch": 3e7}}
    skipped = {"name": "muon", "skipped": "no device"}
    losses = {"fasttrain": [1.25, 1.5, 1.0], "torch": [1.75]}
    documents = [
        harness.document("chars", [entry_of() | {"val_loss": losses}], MACHINE, CEILINGS),
        harness.document("step", [step], MACHINE, CEILINGS),
        harness.document("linear_cross_entropy", [memory, skipped], MACHINE, CEILINGS),
    ]
    text = report.render(documents)
    date = documents[0]["date"][:10]
    assert "**Some CPU, AVX2**, 2 threads: PyTorch 2.11.0, Triton 3.6.0, Python 3.12.0." in text
    assert f" 0.2 TFLOP/s; {date}" in text
    ratio = f"torch {step['speedup']['torch']:.2f}"
    time = report.time_text(step["median_s"]["fasttrain"])
    row = f"| training step, gpt2-chars | Some CPU, AVX2 | {time}, 12,346 tokens/s | {ratio} |"
    assert row in text
    assert f"{time}, validation loss 1.5000 | {ratio} (loss 1.7500) |" in text
    assert "| peak memory | Some CPU, AVX2 | 2 MB | torch 15.0 times the memory |" in text
    assert "muon" not in text
    assert text.index("training step") < text.index("<details>") < text.index("peak memory")
    assert "On a GPU: not measured." in text
    assert "On a CPU: not measured." not in text


def test_processors_stand_side_by_side_in_one_table() -> None:
    documents = [
        harness.document(suite, [entry_of() | {"name": suite}], MACHINE | {"isa": isa}, CEILINGS)
        for isa in ("AVX2", "AVX-512")
        for suite in ("loop", "step")
    ]
    text = report.render(documents)
    assert text.count("| what |") == 1
    assert text.count("On a CPU: **Some CPU, AVX") == 2
    starts = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
    assert starts == [
        ["| what", "processor"],
        ["| step", "Some CPU, AVX2"],
        ["| step", "Some CPU, AVX-512"],
        ["| loop", "Some CPU, AVX2"],
        ["| loop", "Some CPU, AVX-512"],
    ]


def test_times_have_three_digits_and_a_unit() -> None:
    shown = [report.time_text(s) for s in (12.345, 0.0123456, 4.5e-5)]
    assert shown == ["12.3 s", "12.3 ms", "45 µs"]
