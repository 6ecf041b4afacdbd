"""Several ranks train as one: losses, samples, checkpoints, verdicts, stops."""

import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.cpu import is_supported

from fasttrain import checkpoint
from tests.support import ranks, toy_trainer
from tests.support.toy import write_config, write_dataset

STEP = ["train.tokens_per_step=128", "train.micro_batch=2", "eval.sample_every_steps=none"]
STEP += ["distributed.check_every_steps=2"]
STEP += ["distributed.init_timeout_s=300"]  # where the tests are ended, their processes end too
MODES = {"one": (1, "auto"), "ddp2": (2, "ddp"), "fsdp2": (2, "fsdp"), "fsdp4": (4, "fsdp")}
MODES["hsdp4"] = (4, "hsdp")
N_STEPS = {"adamw": 50, "muon": 12}
# What rank 1 is started with, and how rank 0 tells of it.
ODD = {
    "optim.lr=0.1": "optim.lr = 0.1, and rank 0 has 0.003",
    "run.seed=5": "run.seed = 5, and rank 0 has 7",
    "data.path=other": "data.train.shards = (sha256 ",
    "train.steps=3": "train.steps = 3, and rank 0 has 12",
    "train.micro_batch=auto": 'train.micro_batch = "auto", and rank 0 has 2',
    "checkpoint.every_steps=1": "checkpoint.every_steps = 1, and rank 0 has none",
    "distributed.mode=fsdp": 'distributed.mode = "fsdp", and rank 0 has "ddp"',
    "--stop-at-step=3": "--stop-at-step = 3, and rank 0 has none",
}
DROPOUT = "model.dropout=0.1"


def every_run(config: Path) -> dict[str, dict[str, Any]]:
    """Return all runs that the tests here look at, in the order in which they are made."""
    runs: dict[str, dict[str, Any]] = {}

    def add(name: str, mode: str, *overrides: str, run: str = "", **more: Any) -> None:
        size, kind = MODES[mode]
        keys = [*STEP, f"run.name={run or name}", f"distributed.mode={kind}", *overrides]
        keys += ["distributed.shard_ranks=2"] if kind == "hsdp" else []
        runs[name] = {"size": size, "argv": [str(config), *keys], **more}

    for optimizer, steps in N_STEPS.items():
        for mode in MODES:
            if mode == "hsdp4" and optimizer == "adamw":
                continue
            add(f"{optimizer}-{mode}", mode, f"train.steps={steps}", f"optim.name={optimizer}")
        for mode in ("one", "ddp2", "fsdp2"):
            keys = ["train.steps=12", f"optim.name={optimizer}", "run.dtype=bf16"]
            add(f"bf16-{optimizer}-{mode}", mode, *keys)
    # 250 samples in steps of 8: of the last step some rows are beyond the end.
    keys = ["train.steps=none", "train.epochs=1", "train.ema_decay=0.9", "eval.every_steps=16"]
    keys += ["train.max_grad_value=2e-4", "model.qk_norm=true", "model.value_embeddings=true"]
    for mode in ("one", "ddp2", "fsdp2", "hsdp4"):
        add(f"epoch-{mode}", mode, *keys, f"run.compile={'off' if mode == 'one' else 'c++'}")
    for mode in ("ddp2", "fsdp2"):
        add(f"whole-{mode}", mode, DROPOUT)
        add(f"cut-{mode}", mode, DROPOUT, "--stop-at-step=5")
        add(f"resumed-{mode}", mode, DROPOUT, "--resume=auto", run=f"cut-{mode}")
        kind = "full" if mode == "ddp2" else "selective"
        keys = [DROPOUT, f"train.activation_checkpointing={kind}"]
        add(f"checkpointed-{mode}", mode, *keys)
    add("2", "ddp2", "--stop-at-step=4", run="elastic")
    add("2-1", "one", "--resume=auto", "--stop-at-step=8", run="elastic")
    add("2-1-2", "fsdp2", "--resume=auto", "--stop-at-step=10", run="elastic")
    add("2-1-2-2", "ddp2", "--resume=auto", run="elastic")
    add("2-1-2-2-one", "one")
    keys = ["train.steps=8", "train.on_spike=skip", "train.spike_window_steps=8"]
    faults = [{"rank": 1, "step": 3, "what": math.nan}, {"rank": 1, "step": 7, "what": 99.0}]
    for mode in ("ddp2", "fsdp2"):
        add(f"bad-{mode}", mode, *keys, faults=faults)
    keys = ["train.steps=6", "train.on_nonfinite=rollback", "checkpoint.every_steps=2"]
    add("back", "fsdp2", *keys, faults=[{"rank": 1, "step": 5, "what": math.nan}])
    add("hours", "ddp2", "train.steps=none", "train.hours=3e-4", "schedule.name=constant")
    add("no folder", "ddp2", f"run.out_dir={config}")
    keys = [DROPOUT, "train.recheck_every_steps=2", "train.on_nonfinite=rollback"]
    for mode in ("ddp2", "fsdp2"):  # what rank 1 computes the first time in step 4 is wrong
        faults = [{"rank": 1, "step": 4, "what": 1.25}]
        add(f"again-{mode}", mode, *keys, "checkpoint.every_steps=3", faults=faults)
    for mode, rank in (("ddp2", 1), ("hsdp4", 2)):
        faults = [{"rank": rank, "step": 5, "what": "flip"}]
        add(
            f"flip-{mode}",
            mode,
            "checkpoint.every_steps=1",
            "checkpoint.keep_last=9",
            faults=faults,
        )
    for odd in ODD:
        add(odd, "ddp2", odd=[odd])
    keys = ["optim.lr=0.1", "--allow-change=optim.lr"]
    add("odd resume", "ddp2", DROPOUT, "--resume=auto", run="cut-ddp2", odd=keys)
    for mode in ("one", "ddp2"):  # 6 sequences: of 4 at most on a rank, 3 and 3 of them on two
        add(f"six-{mode}", mode, "train.tokens_per_step=96", "train.micro_batch=4")
    return runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        write_dataset(folder / "other", n_train=3_000)
        ranks.run_all(folder, every_run(write_config(folder)))

    return ranks.once(tmp_path_factory, "ranks", fill)


def losses(folder: Path, run: str) -> list[float]:
    return [row["loss"] for row in toy_trainer.rows(folder / "runs" / run)]


def rows_of(folder: Path, name: str) -> list[list[str]]:
    """Return what was trained on at each step, by all ranks together."""
    found = [ranks.result(folder, name, rank)["rows"] for rank in range(size_of(folder, name))]
    return [sorted(chain(*parts)) for parts in zip(*found, strict=True)]


def size_of(folder: Path, name: str) -> int:
    size: int = json.loads((folder / "runs.json").read_text())[name]["size"]
    return size


def statuses(folder: Path, name: str) -> list[int]:
    return [ranks.result(folder, name, r)["status"] for r in range(size_of(folder, name))]


def output_of(folder: Path, name: str, rank: int = 0) -> str:
    text = (folder / f"output-{rank}.txt").read_text()
    return text.split(f"---- {name}\n", 1)[1].split("---- ")[0]


def tensors(folder: Path, run: str, step: int, *groups: str) -> dict[str, torch.Tensor]:
    found = checkpoint.load(folder / "runs" / run / "checkpoints" / f"step-{step:08d}").tensors
    return {k: v for k, v in found.items() if not groups or k.startswith(groups)}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [(o, m) for o in N_STEPS for m in MODES if m != "one" and (o, m) != ("adamw", "hsdp4")],
)
def test_all_ways_have_the_same_losses_and_samples(made: Path, optimizer: str, mode: str) -> None:
    one, several = f"{optimizer}-one", f"{optimizer}-{mode}"
    assert set(statuses(made, one) + statuses(made, several)) == {0}
    expected = losses(made, one)
    assert len(expected) == N_STEPS[optimizer]
    assert losses(made, several) == pytest.approx(expected, abs=1e-5)
    for row in toy_trainer.rows(made / "runs" / several):
        assert 0 < row["communication_ms"] < row["forward_backward_ms"] < row["step_ms"]
    assert {row["communication_ms"] for row in toy_trainer.rows(made / "runs" / one)} == {None}
    assert rows_of(made, several) == rows_of(made, one)
    (expected_eval,), (eval_row,) = (
        toy_trainer.rows(made / "runs" / name, "eval") for name in (one, several)
    )
    assert eval_row.pop("kind") == expected_eval.pop("kind") == "eval"
    assert eval_row.pop("time") >= expected_eval.pop("time")  # it ran after
    assert eval_row == pytest.approx(expected_eval, rel=1e-5)


@pytest.mark.parametrize("optimizer", N_STEPS)
@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_in_bf16_ranks_agree_to_the_rounding_of_bf16(made: Path, optimizer: str, mode: str) -> None:
    """Gradients are summed in another order; what they change is rounded to bf16 in products.

    Seen: up to 1.5e-4 with AdamW, below 2e-3 with Muon, whose iteration is in bf16 too.
    """
    expected = losses(made, f"bf16-{optimizer}-one")
    assert losses(made, f"bf16-{optimizer}-{mode}") == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2", "hsdp4"])
def test_R20_an_epoch_whose_last_step_is_uneven(made: Path, mode: str) -> None:
    """Evaluated by the average of the parameters, each gradient limited as well as their norm.

    The blocks of several ranks are those in C++, where the machine has them; one rank's are not.
    """
    expected, ours = "epoch-one", f"epoch-{mode}"
    assert ("blocks in C++" in output_of(made, ours)) == is_supported()
    assert bool(re.search(r"eager .*C\+\+", output_of(made, ours))) != is_supported()
    assert "blocks in C++" not in output_of(made, expected)
    assert losses(made, ours) == pytest.approx(losses(made, expected), abs=1e-5)
    rows, several = rows_of(made, expected), rows_of(made, ours)
    assert several == rows
    assert len(rows[-1]) < len(rows[0]) == 8  # some rows were beyond the end
    last = ranks.result(made, ours, 1)["rows"][-1]
    assert len(last) < len(ranks.result(made, ours, 0)["rows"][-1])  # unevenly over the ranks
    step = len(rows)
    found = [tensors(made, run, step, "model", "ema") for run in (ours, expected)]
    assert any(name.startswith("ema.") for name in found[0])
    assert_close(found[0], found[1], 1e-5)
    evals = [toy_trainer.rows(made / "runs" / run, "eval") for run in (ours, expected)]
    for row, whole in zip(*evals, strict=True):
        assert row["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-5)


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_R1_a_resumed_run_ends_at_the_same_bits(made: Path, mode: str) -> None:
    assert statuses(made, f"cut-{mode}") == [75, 75]
    assert statuses(made, f"resumed-{mode}") == [0, 0]
    whole, cut = tensors(made, f"whole-{mode}", 12), tensors(made, f"cut-{mode}", 12)
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    assert losses(made, f"cut-{mode}") == losses(made, f"whole-{mode}")
    assert any("@1" in name for name in whole), "a rank draws its own random numbers"


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_activation_checkpointing_changes_no_bit(made: Path, mode: str) -> None:
    ours, expected = f"checkpointed-{mode}", f"whole-{mode}"
    assert losses(made, ours) == losses(made, expected)
    found = [tensors(made, run, 12, "model") for run in (ours, expected)]
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_R2_from_two_ranks_to_one_and_back_and_from_ddp_to_shards_and_back(made: Path) -> None:
    legs = ("2", "2-1", "2-1-2", "2-1-2-2")
    assert [statuses(made, leg)[0] for leg in legs] == [75, 75, 75, 0]
    assert losses(made, "elastic") == pytest.approx(losses(made, "2-1-2-2-one"), abs=1e-5)
    rows = list(chain.from_iterable(rows_of(made, leg) for leg in legs))
    assert rows == rows_of(made, "2-1-2-2-one")
    groups = ("model", "optimizer")
    ours, expected = (tensors(made, run, 12, *groups) for run in ("elastic", "2-1-2-2-one"))
    assert ours.keys() == expected.keys()
    assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_R18_what_is_not_finite_or_a_spike_on_one_rank_is_skipped_by_all(
    made: Path, mode: str
) -> None:
    name = f"bad-{mode}"
    assert statuses(made, name) == [0, 0]
    rows = toy_trainer.rows(made / "runs" / name)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [row["spikes"] for row in rows] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert rows[2]["loss"] is None
    digests = {ranks.result(made, name, rank)["digest"] for rank in range(2)}
    assert len(digests) == (1 if mode == "ddp2" else 2)
    assert all(row["loss"] for row in (*rows[:2], *rows[3:]))
    reports = sorted((made / "runs" / name / "faults").glob("step-00000003*"))
    assert [path.name for path in reports] == ["step-00000003-rank-1.jsonl", "step-00000003.jsonl"]
    lines = [json.loads(line) for path in reports for line in path.read_text().splitlines()]
    assert sorted(line["position"] for line in lines) == list(range(16, 24))


def test_R18_all_ranks_go_back_to_one_checkpoint(made: Path) -> None:
    assert statuses(made, "back") == [0, 0]
    found = [ranks.result(made, "back", rank) for rank in range(2)]
    assert [result["step"] for result in found] == [6, 6]
    rows = toy_trainer.rows(made / "runs" / "back")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["rollbacks"] == 1
    trained = rows_of(made, "back")
    assert len(trained) == 7  # step 5 twice, with other samples
    assert not set(trained[4]) & set(trained[5])


def test_R11_all_ranks_stop_at_one_step_when_the_time_is_over(made: Path) -> None:
    first, second = (ranks.result(made, "hours", rank) for rank in range(2))
    assert (first["status"], second["status"]) == (0, 0)
    assert first["step"] == second["step"] > 0
    assert first["digest"] == second["digest"]
    assert tensors(made, "hours", first["step"])


def test_ranks_share_a_step_that_no_micro_batch_divides(made: Path) -> None:
    alone = losses(made, "six-one")
    assert len(alone) == 12
    assert losses(made, "six-ddp2") == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("odd", ODD)
def test_R30_a_rank_that_was_started_otherwise_is_refused(made: Path, odd: str) -> None:
    assert statuses(made, odd) == [2, 2]
    found = [ranks.result(made, odd, rank) for rank in range(2)]
    assert [result["rows"] for result in found] == [[], []]  # no step was made
    told = output_of(made, odd)
    assert f"error: rank 1: differs from rank 0, it has {ODD[odd]}" in told
    assert output_of(made, odd, rank=1) == ""
    assert not (made / "runs" / odd).exists()


def test_R24_R30_a_rank_that_resumes_with_another_setting_is_refused(made: Path) -> None:
    """Also where it alone was told to allow the change."""
    assert statuses(made, "odd resume") == [2, 2]
    told = "rank 1: differs from rank 0, it has optim.lr = 0.1, and rank 0 has 0.003"
    assert told in output_of(made, "odd resume")
    assert checkpoint.resolve(made / "runs/cut-ddp2").name == "step-00000012"  # as it was


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_R33_a_step_computed_wrongly_on_one_rank_is_found_by_all(made: Path, mode: str) -> None:
    """All go back, and end at the bits of the run in which no step was run again."""
    name = f"again-{mode}"
    assert statuses(made, name) == [0, 0]
    told = output_of(made, name)
    assert re.search(r"step 4: .*transient", told)
    assert re.search(r"warning: .*\bstep 3\b.*step-00000003 .*\bstep 4\b", told)
    ours, expected = tensors(made, name, 12), tensors(made, f"whole-{mode}", 12)
    assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []
    assert losses(made, name) == losses(made, f"whole-{mode}")


@pytest.mark.parametrize(("mode", "odd"), [("ddp2", 1), ("hsdp4", 2)])
def test_R30_a_flipped_bit_in_the_parameters_of_a_rank_is_found(
    made: Path, mode: str, odd: int
) -> None:
    """And in no other of the runs here, which compare as often, is one."""
    name = f"flip-{mode}"
    assert set(statuses(made, name)) == {1}
    found = [ranks.result(made, name, rank) for rank in range(size_of(made, name))]
    assert {result["step"] for result in found} == {6}  # the first even one after it
    told = rf"rank {odd} holds other parameters .* at step 6, and they were identical at step 4: "
    before = f"runs/{name}/checkpoints/step-00000004"
    for rank in range(len(found)):
        output = output_of(made, name, rank)
        assert re.search(rf"{told}.*{before}\b.*--resume {before} --overwrite", output)
    assert checkpoint.resolve(made / "runs" / name).name == "step-00000005"  # no worse one is left


def test_R13_what_cannot_start_is_refused_by_all_and_told_once(made: Path) -> None:
    assert statuses(made, "no folder") == [2, 2]
    outputs = [output_of(made, "no folder", rank) for rank in range(2)]
    assert re.search(r"error: .*\bwrit.*run\.out_dir", outputs[0])
    assert outputs[1].strip() == ""
