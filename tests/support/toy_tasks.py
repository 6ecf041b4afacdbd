"""Tasks for lm-eval, small enough for tests: choices, whole texts, and answers to be written."""

import json
from pathlib import Path
from typing import Any

QUESTIONS: list[dict[str, Any]] = [
    {"q": "the quick brown", "choices": ["fox", "dog", "the fox jumps", "lazy"], "answer": 0},
    {"q": "over the lazy ", "choices": ["cat", "dog.", "fox"], "answer": 1},  # ends with a space
    {"q": "the dog. " * 9 + "the", "choices": ["quick", "lazy dog", "over"], "answer": 1},  # long
    {"q": "é✓ über", "choices": ["a", "b", "c"], "answer": 2},
    {"q": "", "choices": ["the", "fox jumps"], "answer": 0},  # nothing before it
]
TEXTS = ["the quick brown fox jumps over the lazy dog. " * 3, "fox", "é✓ über the dog"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}, cache_dir: {cache}}}
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


def write_tasks(folder: Path) -> Path:
    """Write the tasks, a group of two and one with a mean, and a task whose data are lost."""
    rows = {"choices": QUESTIONS, "answers": QUESTIONS, "texts": [{"text": t} for t in TEXTS]}
    for name, text in KINDS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        head = TASK.format(name=name, file=file, cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(head + text)
    head = TASK.format(name="lost", file=folder / "nowhere.jsonl", cache=folder / "cache")
    (folder / "lost.yaml").write_text(head + KINDS["choices"])
    group = {"group": "both", "task": ["choices", "answers"], "metadata": {"version": 1.0}}
    (folder / "both.yaml").write_text(json.dumps(group))
    mean = {"metric": "acc", "weight_by_size": True}
    group |= {"group": "mean", "task": ["choices"], "aggregate_metric_list": [mean]}
    (folder / "mean.yaml").write_text(json.dumps(group))
    return folder
