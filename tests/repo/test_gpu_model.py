"""The model of a GPU's step: what a review found by hand, and what is beside it once measured."""

from typing import Any

import pytest

from benchmarks import bench_trainers, gpu_model
from benchmarks.gpu_model import DEVICES, model_of, parts_ms, table, tokens_per_s

# What gpu_dry counted of gpt2-124m at 7e4341b, the code that the review is of.
BEFORE: dict[str, Any] = {
    "name": "gpt2-124m", "rows": 32, "seq_len": 1024, "layers": 12,
    "layer": {"bytes": 3_667_645_952, "launches": 29, "extern": {"mm": 12, "attention": 2}},
    "rest": {"bytes": 1_085_288_456, "launches": 5, "extern": {"linear_cross_entropy": 1}},
}  # fmt: skip
DOCUMENT = {
    "suite": "gpu_dry", "machine": {"device": "NVIDIA H100, compiled"}, "benchmarks": [BEFORE],
}  # fmt: skip


def test_the_assumptions_give_what_the_review_found() -> None:
    model, n_micro = model_of("gpt2-124m")
    parts = parts_ms(model, n_micro, BEFORE, DEVICES["H100"], "flash")
    # Its milliseconds: products of blocks and head, FlashAttention-2, cross-entropy, gaps, AdamW.
    found = {"products": 42.9, "attention": 10.2, "cross-entropy": 2.4, "gaps": 0.8}
    found |= {"optimizer": 1.75}
    for name, ms in found.items():
        assert parts[name] == pytest.approx(ms, rel=0.03, abs=0.05), name
    rate = tokens_per_s(BEFORE, parts, n_micro)
    assert rate == pytest.approx(455_000, rel=0.02)
    assert rate * model.flops_per_token() / 989.5e12 == pytest.approx(0.39, abs=0.005)


def test_fewer_bytes_are_faster_by_the_time_that_they_take() -> None:
    model, device = model_of("gpt2-124m"), DEVICES["H100"]
    half = BEFORE | {"layer": BEFORE["layer"] | {"bytes": BEFORE["layer"]["bytes"] // 2}}
    ms = [sum(parts_ms(*model, c, device, "flash").values()) for c in (BEFORE, half)]
    assert ms[0] - ms[1] == pytest.approx(12 * 3_667_645_952 / 2 / 2.8e9, rel=1e-6)


def test_matrices_are_rounded_once_and_their_gradients_added_in_bf16() -> None:
    (model, _), device = model_of("gpt2-124m"), DEVICES["H100"]
    n_rounded, n = 12 * 12 * 768**2, model.num_parameters()
    rounding = BEFORE | {"layer": BEFORE["layer"] | {"rounded": 12 * 768**2}}
    steps = []
    for counts in (BEFORE, rounding):
        parts = parts_ms(model, 16, counts, device, "flash")
        steps.append(32 * 1024 * 16e3 / tokens_per_s(counts, parts, 16))
    # Rounding 6 bytes and zeros 4; the first gradients 10 or 12 and not 0, the others 2 fewer.
    more = 6 * n_rounded + 4 * n + 12 * n - 2 * n_rounded - 15 * 2 * n_rounded
    assert steps[1] - steps[0] == pytest.approx(more / 2.8e9)
    alone = parts_ms(model, 1, rounding, device, "flash")  # in its graph
    assert alone["rounding"] == pytest.approx(12 * n_rounded / 2.8e9)


def test_in_fp8_products_of_layers_are_faster_and_all_that_is_cast_is_counted() -> None:
    entries = gpu_model.counted(gpu_model.read_all())
    model, device = model_of("llama-1b"), DEVICES["H100"]
    wide, fp8 = (
        parts_ms(*model, entries[n], device, "flash") for n in ("llama-1b", "llama-1b, fp8")
    )
    head = 6 * 128_256 * 2_048 * 8 * 2_048 / 565e9
    assert fp8["products"] == pytest.approx(head + (wide["products"] - head) / gpu_model.FP8_SPEED)
    assert 1.5 < gpu_model.FP8_SPEED < 1.9
    more = entries["llama-1b, fp8"]["layer"]["bytes"] - entries["llama-1b"]["layer"]["bytes"]
    assert fp8["generated"] - wide["generated"] == pytest.approx(16 * more / 2.8e9, rel=1e-3)
    document = DOCUMENT | {"benchmarks": [entries["llama-1b, fp8"]]}
    rows = [line for line in table([document]).splitlines() if line.startswith("| llama-1b, fp8")]
    assert [row.split(" | ")[1] for row in rows] == ["H100", "H200", "B200"]  # an A100 has no fp8


def test_what_is_predicted_says_so_and_stands_beside_what_was_measured() -> None:
    assert "<b>predicted</b>" in table([DOCUMENT])
    rows = [line for line in table([DOCUMENT]).splitlines() if line.startswith("| gpt2-124m")]
    assert [row.split(" | ")[1] for row in rows] == list(DEVICES)
    assert all(row.endswith("| not measured |") for row in rows)
    rows = [{"step": 40, "tokens_per_s": 123_456.7}]  # as `make gpu` runs it
    (case,) = (case for case in bench_trainers.suites("gpt2-124m bf16", suite="run-{}"))
    (suite,) = case.marks[0].args
    entry = {"name": "gpt2-124m bf16", **bench_trainers.figures_of_run(rows, [])}
    machine = {"device": "NVIDIA H100 80GB HBM3"}
    step = {"suite": suite, "machine": machine, "benchmarks": [entry]}
    rows = [row for row in table([DOCUMENT, step]).splitlines() if "123,457" in row]
    assert [row.split(" | ")[1] for row in rows] == ["H100"]
    assert table([]) == "" == table([DOCUMENT | {"benchmarks": []}])


def test_the_command_shows_the_parts_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_model.main()
    assert "gpt2-124m, H100, milliseconds: products 43.0 · attention" in capsys.readouterr().out
