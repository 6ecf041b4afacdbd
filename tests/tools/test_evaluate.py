"""Scores on lm-eval's tasks: against lm-eval's own model of the export, the command, training."""

import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fasttrain.config import UserError
from fasttrain.data.tokenizer import byte_tokenizer, load_tokenizer
from fasttrain.device import resolve_precision
from fasttrain.evaluate import main
from fasttrain.generate import load_with_tokenizer
from fasttrain.hf import export_model
from tests.tools.test_hf import MODELS, make_run

pytest.importorskip("lm_eval", reason="needs the extra eval")

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)
QUESTIONS: list[dict[str, Any]] = [
    {"q": "the quick brown", "choices": ["fox", "dog", "the fox jumps", "lazy"], "answer": 0},
    {"q": "over the lazy ", "choices": ["cat", "dog.", "fox"], "answer": 1},  # ends with a space
    {"q": "the dog. " * 9 + "the", "choices": ["quick", "lazy dog", "over"], "answer": 1},  # cut
    {"q": "é✓ über", "choices": ["a", "b", "c"], "answer": 2},
    {"q": "", "choices": ["the", "fox jumps"], "answer": 0},  # nothing before it
]
TEXTS = ["the quick brown fox jumps over the lazy dog. " * 3, "fox", "é✓ über the dog"]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
training_split: train
test_split: test
metadata: {{version: 1.0}}
"""
KINDS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Datasets are cached outside of the user's folder, and nothing reaches the network."""
    import datasets

    def refuse(*_: Any) -> None:
        raise AssertionError("reaches for the network")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patched.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks and a group."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"choices": QUESTIONS, "answers": QUESTIONS, "texts": [{"text": t} for t in TEXTS]}
    for name, text in KINDS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=file) + text)
    group = {"group": "both", "task": ["choices", "answers"], "metadata": {"version": 1.0}}
    (folder / "both.yaml").write_text(json.dumps(group))
    return folder


def make(folder: Path, kind: str, style: str) -> Path:
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
    return folder


def ours(run: Path, **options: Any) -> Any:
    from fasttrain.harness import HarnessModel

    model, tokenizer = load_with_tokenizer(run, CPU, "best", None)
    options = {"batch_size": 3, "precision": FP32, **options}
    return HarnessModel(model=model, tokenizer=tokenizer, **options)


def requests(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def asked() -> list[Any]:
    return requests(*((doc["q"], f" {c}") for doc in QUESTIONS for c in doc["choices"]))


@pytest.mark.parametrize(
    ("kind", "style"), [("bpe", "llama"), ("bytes", "gpt2"), ("with a first token", "qwen3")]
)
def test_scores_are_those_of_the_exported_model_under_lm_eval(
    kind: str, style: str, tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("accelerate", reason="needs accelerate, as lm_eval --model hf does")
    from lm_eval.models.huggingface import HFLM

    from fasttrain.harness import HarnessModel, load_tasks, scores

    run = make(tmp_path / "run", kind, style)
    theirs = HFLM(pretrained=str(export_model(run, tmp_path / "out")), device="cpu", batch_size=2)
    lm = ours(run)
    for name, given in (
        ("loglikelihood", asked()),
        ("loglikelihood_rolling", requests(*((text,) for text in TEXTS))),
    ):
        found, expected = (torch.tensor(getattr(m, name)(given)) for m in (lm, theirs))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    loaded = load_tasks(["choices", "texts", "answers"], str(tasks), n_fewshot=1)
    found, expected = (scores(HarnessModel.run(m, loaded, limit=None)) for m in (lm, theirs))
    assert found == pytest.approx(expected, abs=1e-4)
    assert found.keys() == {
        *("choices/acc", "choices/acc_norm", "texts/bits_per_byte", "answers/exact_match")
    }
