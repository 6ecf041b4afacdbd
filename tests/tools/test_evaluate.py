"""Scores on lm-eval's tasks: against lm-eval's own model of the export, the command, training."""

import importlib.util
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from fasttrain import checkpoint
from fasttrain.config import UserError
from fasttrain.data.tokenizer import byte_tokenizer, load_tokenizer
from fasttrain.device import resolve_precision
from fasttrain.evaluate import main
from fasttrain.generate import generate, load_with_tokenizer
from fasttrain.hf import export_model
from fasttrain.report.page import page, panels, read_run
from fasttrain.train import main as train
from tests.support.toy import ROOT, write_config
from tests.support.toy_tasks import QUESTIONS, TEXTS, write_tasks
from tests.support.toy_trainer import rows
from tests.tools.test_hf import MODELS, make_run

pytest.importorskip("lm_eval", reason="needs the extra eval")

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Any:
    def refuse(*_: Any) -> None:
        raise AssertionError("reaches for the network")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness has no tasks of its own, which take seconds to read."""
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))


def make(folder: Path, kind: str = "bpe", style: str = "llama") -> Path:
    """Write a run with a tokenizer of a kind, and return its folder."""
    make_run(folder, **MODELS[style])
    if kind == "bytes":
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    elif kind == "with a first token":
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        tokenizer.add_special_tokens(["<s>"])
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", number)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    elif kind == "letters":  # and no end of text
        vocab = {character: i for i, character in enumerate(" abcdefghijklmnopqrstuvwxyz")}
        Tokenizer(models.BPE(vocab, [])).save(str(folder / "tokenizer.json"))
    return folder


def ours(run: Path, **options: Any) -> Any:
    from fasttrain.evaluate.harness import HarnessModel

    model, tokenizer = load_with_tokenizer(run, CPU, "best", None)
    options = {"batch_size": 3, "precision": FP32, **options}
    return HarnessModel(model=model, tokenizer=tokenizer, **options)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


CHOICES = requests(*((doc["q"], f" {c}") for doc in QUESTIONS for c in doc["choices"]))
WHOLE = requests(*((text,) for text in TEXTS))
UNTIL = {"until": ["."], "max_gen_toks": 8}
CONTEXTS = requests(*((doc["q"], UNTIL) for doc in QUESTIONS if doc["q"]))

# ---- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "style"), [("bpe", "llama"), ("bytes", "gpt2"), ("with a first token", "qwen3")]
)
def test_scores_are_those_of_the_exported_model_under_lm_eval(
    kind: str, style: str, tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("accelerate", reason="needs accelerate, as lm_eval --model hf does")
    from lm_eval.models.huggingface import HFLM

    from fasttrain.evaluate.harness import HarnessModel, load_tasks, scores

    run = make(tmp_path / "run", kind, style)
    theirs = HFLM(pretrained=str(export_model(run, tmp_path / "out")), device="cpu", batch_size=2)
    lm = ours(run)
    for name, given in (("loglikelihood", CHOICES), ("loglikelihood_rolling", WHOLE)):
        found, expected = (torch.tensor(getattr(m, name)(given)) for m in (lm, theirs))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert lm.generate_until(CONTEXTS) == theirs.generate_until(CONTEXTS)
    loaded = load_tasks(["choices", "texts", "answers"], str(tasks), n_fewshot=1)
    found, expected = (scores(HarnessModel.run(m, loaded, None)) for m in (lm, theirs))
    assert found == pytest.approx(expected, abs=1e-4)
    names = ["choices/acc", "choices/acc_norm", "texts/bits_per_byte", "answers/exact_match"]
    assert sorted(found) == sorted(names)
    again = scores(HarnessModel.run(lm, loaded, None))
    assert again == found, "the same examples are in the contexts each time"


def test_a_long_continuation_is_scored_whole(tmp_path: Path) -> None:
    """Longer than the model's 24 tokens: each token once, from what fits before it."""
    lm = ours(make(tmp_path / "run", "bytes"))
    text = TEXTS[0][:60]
    ids = lm.tok_encode(f"the{text}")
    expected, greedy = 0.0, True
    for begin in range(3, 63, 24):
        end = min(begin + 24, 63)
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids[max(0, end - 25) : end - 1]]))[0, begin - end :]
        following = torch.tensor(ids[begin:end])
        expected += logits.log_softmax(-1).gather(1, following[:, None]).sum().item()
        greedy &= bool((logits.argmax(-1) == following).all())
    (found,) = lm.loglikelihood(requests(("the", text)))
    assert found == (pytest.approx(expected, abs=1e-4), greedy)


def test_the_batch_changes_nothing_and_equal_inputs_are_computed_once(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "bytes")
    one, many = ours(run, batch_size=1), ours(run, batch_size=64)
    found, expected = (torch.tensor(m.loglikelihood(CHOICES)) for m in (many, one))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert many.generate_until(CONTEXTS) == one.generate_until(CONTEXTS)
    n_rows: list[int] = []
    hidden = many.model.hidden
    many.model.hidden = lambda tokens, cache: n_rows.append(len(tokens)) or hidden(tokens, cache)
    letters = requests(*(("the answer is", f" {c}") for c in "ABCD"), ("the answer is", " no"))
    totals = [total for total, _ in many.loglikelihood(letters)]
    assert n_rows == [2], "four letters share an input"
    assert len(set(totals)) == 5


def test_what_greedy_writes_is_known_as_such(tmp_path: Path) -> None:
    lm = ours(make(tmp_path / "run"))
    context = [5, 6, 7]
    written = generate(lm.model, torch.tensor([context]), max_new_tokens=30, greedy=True)
    written = written[0, 3:].tolist()
    other = [*written[:10], (written[10] + 1) % 300, *written[11:]]
    asked = [(("", ""), context, ids) for ids in (written[:20], written[:1], other[:20])]
    found = lm._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in found] == [True, True, False]
    assert found[0][0] < found[1][0] < 0.0


def test_what_the_tokenizer_cannot_say_is_refused(tmp_path: Path) -> None:
    lm = ours(make(tmp_path / "run", "letters"))
    assert lm.loglikelihood(requests(("the", " fox")))[0][0] < 0.0
    with pytest.raises(UserError, match="end-of-text"):
        lm.loglikelihood(requests(("", "fox")))
    with pytest.raises(UserError, match=r'token .*"12"'):
        lm.loglikelihood(requests(("12", " fox")))


def test_of_a_group_with_a_mean_the_mean_alone_counts(tasks: Path, tmp_path: Path) -> None:
    from fasttrain.evaluate.harness import load_tasks, scores

    lm = ours(make(tmp_path / "run"))
    found = [scores(lm.run(load_tasks([name], str(tasks)), None)) for name in ("mean", "choices")]
    assert found[0] == {"mean/acc": found[1]["choices/acc"]}
    results = {"results": {"a": {"name": "a", "f1,strict": 0.5, "f1_stderr,strict": "N/A"}}}
    assert scores({**results, "group_subtasks": {}}) == {"a/f1/strict": 0.5}


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_writes_the_results(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run")
    command = [str(run), "--include-path", str(tasks), "--device", "cpu", "--tasks"]
    out = tmp_path / "found.json"
    assert main([*command, "both", "--limit", "2", "--out", str(out)]) == 0
    assert "|choices|" in capsys.readouterr().out.replace(" ", "").replace("-", "")
    results = json.loads(out.read_text())
    assert results["n-samples"]["choices"] == {"original": len(QUESTIONS), "effective": 2}
    assert results["n-shot"]["choices"] == 0
    assert main([*command, "cho*,texts", "--num-fewshot", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["n-shot"] == {"choices": 1, "texts": 1}
    assert results["results"]["choices"]["acc,none"] in [n / len(QUESTIONS) for n in range(6)]
    assert results["results"]["choices"]["acc_stderr,none"] > 0.0


def test_the_example_task_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, name = make(tmp_path / "run"), "python_words"
    monkeypatch.chdir(ROOT)
    lines = Path(f"examples/tasks/{name}.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    assert all(0 <= d["answer"] < len(d["choices"]) == 4 for d in documents)
    assert main([str(run), "--include-path", "examples/tasks", "--tasks", name]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "choises"], "'choises'.*lm_eval ls tasks"),
        (["--tasks", "lost"], r"nowhere\.jsonl"),
        (["--tasks", "choices", "--include-path", "nowhere"], "nowhere: .*YAML"),
        (["--tasks", "choices", "--limit", "0"], r"--limit .*\b0\b"),
        (["--tasks", "choices", "--batch-size", "0"], r"--batch-size .*\b0\b"),
        (["--tasks", "choices", "--num-fewshot", "-1"], "--num-fewshot .*-1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tasks: Path, tmp_path: Path, capsys: Any, few_tasks: None
) -> None:
    run = make(tmp_path / "run")
    assert main([str(run), "--include-path", str(tasks), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_what_is_missing_is_named(
    tasks: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    run = make(tmp_path / "run")
    command = [str(run), "--include-path", str(tasks), "--tasks", "choices", "--limit", "1"]
    (run / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    assert main(command) == 2
    assert re.search(r"tokenizer\.json.*--tokenizer PATH", capsys.readouterr().err)
    assert main([*command, "--tokenizer", str(tmp_path / "elsewhere.json")]) == 0
    config = str(write_config(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(command) == 2
    assert "pip install lm_eval" in capsys.readouterr().err
    monkeypatch.undo()
    there = importlib.util.find_spec
    without = lambda name, *rest: None if name == "lm_eval" else there(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", without)
    assert train([config, 'eval.tasks=["choices"]']) == 2
    assert re.search(r"pip install lm_eval.*eval\.tasks", capsys.readouterr().err)


# ---- in training ---------------------------------------------------------------------------------


def trained(folder: Path, tasks: Path, name: str, *keys: str) -> Path:
    """Train the toy with tasks at the evaluations of steps 6 and 12; return the run's folder."""
    values = [f"run.out_dir={folder}", f"run.name={name}", f"eval.tasks_path={tasks}"]
    values += ["eval.every_steps=3", "eval.tasks_every_evals=2", "model.dropout=0.1", *keys]
    assert train([str(write_config(folder)), *values]) == 0
    return folder / name


TASKS = 'eval.tasks=["both", "texts"]'


def test_training_scores_the_model_and_changes_in_nothing(tasks: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, tasks, "with", TASKS, "log.csv=true", "eval.tasks_limit=4")
    plain = trained(tmp_path, tasks, "without")
    found = rows(run, "tasks")
    assert [row["step"] for row in found] == [6, 12]
    assert [row["step"] for row in rows(run, "eval")] == [3, 6, 9, 12]
    losses = [[row["loss"] for row in rows(r)] for r in (run, plain)]
    assert losses[0] == losses[1]
    ends = [r / "checkpoints/step-00000012" for r in (run, plain)]
    one, other = (checkpoint.load(end).tensors for end in ends)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    # The last model's scores are those of the command
    out = tmp_path / "found.json"
    command = [str(run), "--which", "latest", "--include-path", str(tasks), "--limit", "4"]
    assert main([*command, "--tasks", "both", "texts", "--device", "cpu", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    scored = {k: v for k, v in found[-1].items() if k not in ("kind", "time", "step")}
    assert scored == pytest.approx(
        {
            f"{task}/{metric}": results[task][f"{metric},none"]
            for task, metric in (name.split("/") for name in scored)
        },
        abs=1e-6,
    )
    # All that is written shows it
    assert len((run / "tasks.csv").read_text().splitlines()) == 3
    line = f"tasks       6  choices/acc {found[0]['choices/acc']:.4f}"
    assert line in (run / "train.log").read_text()
    pytest.importorskip("plotly", reason="needs the extra report")
    read = read_run(run)
    panel = next(p for p in panels([read]) if p.title == "texts/bits_per_byte")
    assert panel.curves[0].y == [row["texts/bits_per_byte"] for row in found]
    assert "texts/bits_per_byte" in page([read])
    assert "bits_per_byte" not in page([read_run(plain)])


def test_scores_that_were_cut_off_are_made_up_for(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.engine.loop import TrainingLoop
    from fasttrain.evaluate.harness import HarnessModel

    whole = trained(tmp_path, tasks, "whole", TASKS)
    score = HarnessModel._score

    def stop(self: Any, batch: Any) -> Any:
        trainers[-1].request_stop()
        return score(self, batch)

    trainers: list[Any] = []
    made = TrainingLoop.fit
    monkeypatch.setattr(TrainingLoop, "fit", lambda self: trainers.append(self) or made(self))
    with monkeypatch.context() as patched:
        patched.setattr(HarnessModel, "_score", stop)
        patched.setattr(TrainingLoop, "_decide_together", lambda self: self.stop_at == 0)
        with pytest.raises(AssertionError):  # its status is not 0
            trained(tmp_path, tasks, "cut", TASKS)
    cut = tmp_path / "cut"
    assert [row["step"] for row in rows(cut, "eval")] == [3]
    assert rows(cut, "tasks") == []
    trained(tmp_path, tasks, "cut", TASKS, "--resume=auto")
    for kind in ("eval", "tasks"):
        found, expected = (
            [{k: v for k, v in row.items() if k != "time"} for row in rows(run, kind)]
            for run in (cut, whole)
        )
        assert found == expected


def test_a_task_that_fails_does_not_end_the_run(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.evaluate.harness import HarnessModel

    def fail(*_: Any) -> None:
        raise ValueError("it cannot be")

    monkeypatch.setattr(HarnessModel, "_score", fail)
    run = trained(tmp_path, tasks, "run", 'eval.tasks=["choices"]')
    assert rows(run, "tasks") == []
    assert [row["step"] for row in rows(run, "eval")] == [3, 6, 9, 12]
    assert re.search(r"eval\.tasks\b.*it cannot be", (run / "train.log").read_text())


def test_training_does_not_begin_with_what_it_cannot_score(
    tasks: Path, tmp_path: Path, capsys: Any, few_tasks: None
) -> None:
    config = str(write_config(tmp_path))
    values = [f"run.out_dir={tmp_path}", "run.name=run", f"eval.tasks_path={tasks}"]
    assert train([config, *values, 'eval.tasks=["lost"]']) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    for split in ("train", "val"):  # as nanoGPT has them
        (np.arange(3000) % 60).astype("<u2").tofile(tmp_path / f"{split}.bin")
    values += [f"data.path={tmp_path}", "data.dtype=uint16", "model.vocab_size=64"]
    assert train([config, *values, 'eval.tasks=["choices"]']) == 2
    assert re.search(r"eval\.tasks .*tokenizer\.json", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
