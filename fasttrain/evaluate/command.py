"""Scores of a model on lm-eval's tasks: ``python -m fasttrain.evaluate RUN --tasks …``."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from fasttrain.command import command, make_parser
from fasttrain.config import UserError
from fasttrain.device import resolve_device, resolve_precision, set_matmul_precision
from fasttrain.generate import load_with_tokenizer
from fasttrain.printing import say


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 on bad input."""
    parser = make_parser("evaluate", "Score a trained model on tasks of lm-evaluation-harness.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run or checkpoint folder")
    named = "tasks, groups, tags or patterns, separated by commas or spaces"
    add("--tasks", nargs="+", required=True, metavar="TASK", help=named)
    add("--include-path", metavar="DIR", help="task files (YAML) that override the harness's")
    add("--limit", type=int, metavar="N", help="use the first N documents of each task")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question")
    add("--batch-size", type=int, default=8, metavar="N", help="texts at a time (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="also write all results as JSON")
    add("--which", choices=("best", "latest"), default="best", help="checkpoint (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32", help="(%(default)s)")
    add("--tokenizer", type=Path, help="tokenizer.json, if the run has none")
    options = parser.parse_args(argv)
    for name, least in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
        if (n := getattr(options, name)) is not None and n < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {n}")
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise UserError(f"--out {options.out}: cannot be written; name a file in a folder that is")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation needs the package lm_eval; pip install lm_eval")
    device = resolve_device(options.device)
    model, tokenizer = load_with_tokenizer(options.run, device, options.which, options.tokenizer)
    from lm_eval.utils import make_table

    from fasttrain.evaluate.harness import HarnessModel, load_tasks

    names = [name for given in options.tasks for name in given.split(",") if name]
    tasks = load_tasks(names, options.include_path, n_fewshot=options.num_fewshot)
    precision = resolve_precision(options.dtype, device)
    set_matmul_precision(precision)
    lm = HarnessModel(
        model=model, tokenizer=tokenizer, batch_size=options.batch_size, precision=precision
    )
    results = lm.run(tasks, options.limit, n_bootstrap=1000)
    say(make_table(results))
    if options.out:
        text = json.dumps(results, indent=2, default=str) + "\n"
        try:
            options.out.write_text(text, "utf-8")
        except OSError as error:
            problem = f"--out {options.out}: cannot be written ({error.strerror})"
            raise UserError(f"{problem}; the table above holds the results") from error
    return 0
