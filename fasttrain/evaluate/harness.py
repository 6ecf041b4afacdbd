"""Our model in EleutherAI's lm-evaluation-harness; imported where its package, lm_eval, is.

The harness makes requests of the documents of its tasks and scores the answers. Each rank gets all
requests, answers a share of them, and then has the answers of all.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api import model as harness
from lm_eval.api import task as harness_task
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

from fasttrain.config import UserError, show
from fasttrain.data.tokenizer import encode
from fasttrain.device import Precision
from fasttrain.distributed.world import World
from fasttrain.generate import encode_prompt, stream_texts
from fasttrain.model.transformer import Transformer

# lm-eval's defaults: the tokens of an answer if a task names no number, and the seed with which
# few-shot examples are drawn
MAX_NEW_TOKENS, SEED = 256, 1234


class Stopped(Exception):
    """``should_stop`` said yes."""


@dataclass(eq=False, kw_only=True)
class HarnessModel(harness.TemplateLM):  # type: ignore[misc]
    """Answers requests with a model and its tokenizer.

    Texts become tokens as for the exported model: with the special tokens that the tokenizer itself
    adds, if any. A text without a context follows the end-of-text token, as documents in training.
    ``should_stop``, asked before each batch, on which ranks agree, ends it by `Stopped`.
    """

    model: Transformer
    tokenizer: Tokenizer
    batch_size: int
    precision: Precision
    world: World = field(default_factory=World)
    should_stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        super().__init__()
        self._device = self.model.embedding.weight.device

    def run(self, tasks: Any, limit: int | None, n_bootstrap: int = 0) -> Any:
        """Return lm-eval's results on what `load_tasks` gave, on ``limit`` documents of each task.

        Standard errors are computed from ``n_bootstrap`` samples, or not at all.
        """
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(SEED)  # the same examples each time
        return evaluate(self, tasks, limit=limit, bootstrap_iters=n_bootstrap, log_samples=False)

    @property
    def eot_token_id(self) -> int:
        """The token that a text without a context follows."""
        return encode_prompt(self.tokenizer, "")[0]

    def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        ids = encode(self.tokenizer, string, special_tokens=add_special_tokens is not False)
        if string and not ids:
            text = show(string)
            raise UserError(f"no token for any of {text}; use tasks in the model's alphabet")
        return ids

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy gives it.

        Each token counts once; those beyond the model's ``seq_len`` are computed in further inputs.
        """
        # Requests that differ in the last token alone, as A, B and C, share an input.
        uses, size = defaultdict[Any, list[Any]](list), self.model.seq_len
        for number, ((_, text), context, continuation) in enumerate(requests):
            # Empty: a context of spaces, now in the continuation, or one that merges with it
            context = context or [self.prefix_token_id]
            continuation = continuation or self.tok_encode(text, add_special_tokens=False)
            tokens = [*context, *continuation]
            for begin in range(len(context), len(tokens), size):
                end = min(begin + size, len(tokens))
                ids = tuple(tokens[max(0, end - 1 - size) : end - 1])
                uses[ids].append((number, tokens[begin:end]))
        found = [(0.0, True)] * len(requests)
        by_length = sorted(uses.items(), key=lambda use: -len(use[0]))
        for number, total, greedy in self._answers(by_length, self._score):
            found[number] = found[number][0] + total, found[number][1] and greedy
        return found

    def _score(self, batch: Sequence[Any]) -> list[tuple[int, float, bool]]:
        longest = max(len(ids) for ids, _ in batch)
        rows = [[*ids, *[0] * (longest - len(ids))] for ids, _ in batch]
        tokens = torch.tensor(rows, device=self._device)
        # With a cache the blocks run as they are; else each length might be compiled anew.
        hidden = self.model.hidden(tokens, self.model.new_cache(*tokens.shape))  # (B, T, D)
        found = []
        for states, (ids, uses) in zip(hidden, batch, strict=True):
            for number, following in uses:
                logits = self.model.logits(states[len(ids) - len(following) : len(ids)])
                targets = torch.tensor(following, device=self._device)
                losses = F.cross_entropy(logits, targets, reduction="none")
                found.append((number, -losses.double().sum(), (logits.argmax(-1) == targets).all()))
        return [(number, float(total), bool(greedy)) for number, total, greedy in found]

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
        """Return the log-likelihood of each text in nats, as that of a document."""
        texts = [request.args[0] for request in requests]
        whole = [(("", text), [self.prefix_token_id], self.tok_encode(text)) for text in texts]
        return [total for total, _ in self._loglikelihood_tokens(whole)]

    def generate_until(self, requests: Any, **_: Any) -> list[str]:
        """Return how the model continues each context, up to the first of the strings ``until``.

        What of a context leaves no room for the answer is cut off on the left, half at the most.
        """
        groups, texts = defaultdict[str, list[Any]](list), dict[int, str]()
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0]) or [self.eot_token_id]
            groups[json.dumps(request.args[1], sort_keys=True)].append((number, ids))
        for said, prompts in groups.items():
            options = normalize_gen_kwargs(json.loads(said), MAX_NEW_TOKENS)
            n_new = options["max_new_tokens"] = options.pop("max_gen_toks")
            options["stop"] = [text for text in options.pop("until") if text]
            options["greedy"] = not options.pop("do_sample")
            room = max(1, self.model.seq_len // 2, self.model.seq_len - n_new)
            prompts = sorted(((n, ids[-room:]) for n, ids in prompts), key=lambda p: -len(p[1]))
            texts |= self._answers(prompts, partial(self._continue, **options))
        return [texts[number] for number in range(len(requests))]

    def _continue(self, batch: Sequence[Any], **options: Any) -> Iterable[tuple[int, str]]:
        numbers, prompts = zip(*batch, strict=True)
        options["generator"] = torch.Generator(self._device).manual_seed(numbers[0])
        if self.world.sharded:  # all ranks compute, or none
            options["agreed"] = lambda ended: all(self.world.gather(ended))
        texts = dict.fromkeys(numbers, "")
        for i, piece in stream_texts(self.model, self.tokenizer, prompts, **options):
            texts[numbers[i]] += piece
        return list(texts.items())

    def _answers(self, items: Sequence[Any], answer: Callable[[Any], Iterable[Any]]) -> Any:
        """Return what ``answer`` gives for all batches; ranks take turns, all equally often."""
        size, world, answers = self.batch_size, self.world, []
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        for first in harness.tqdm(range(0, len(batches), world.size)):
            if self.should_stop():
                raise Stopped
            with torch.no_grad(), self.precision.autocast():
                answers.append(answer(batches[min(first + world.rank, len(batches) - 1)]))
        return chain(*list(chain(*zip(*world.gather(answers), strict=True)))[: len(batches)])


def load_tasks(
    names: Sequence[str], folder: str | None, *, n_fewshot: int | None = None, quiet: bool = False
) -> Any:
    """Return tasks, of groups, tags and patterns too, with their documents, for `HarnessModel.run`.

    The YAML files in ``folder`` come before lm-eval's own. ``n_fewshot``: examples in a context,
    unless a task says 0. Raises UserError if a task is unknown or cannot be loaded.
    """
    if quiet:  # without progress bars
        harness.tqdm = harness_task.tqdm = lambda items, **_: items
        harness_task.datasets.disable_progress_bars()
    if folder and not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; name one that holds task files (YAML)")
    failure = ""
    for defaults in (False, True)[folder is None :]:  # its own are 14,000 files
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        try:
            found = [manager.match_tasks([name]) or [name] for name in names]
            tasks: Any = manager.load(list(dict.fromkeys(chain(*found))))
        except Exception as error:  # whatever names, files and data lead to
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        for task in tasks["tasks"].values():
            if (own := task.get_config("num_fewshot")) != 0:
                task.set_config("num_fewshot", (own if n_fewshot is None else n_fewshot) or 0)
        return tasks
    raise UserError(
        f"tasks {show(names)} of {folder or 'lm_eval'}: {failure}; `lm_eval ls tasks` lists all"
    )


def scores(results: dict[str, Any]) -> dict[str, float]:
    """Return scores as ``task/metric`` or ``task/metric/filter``; of a group its mean, if any."""
    members = results["group_subtasks"]
    inner = {name for group in results.get("groups", {}) for name in members[group]}
    return {
        f"{name}/{metric.removesuffix(',none').replace(',', '/')}": float(value)
        for name, found in results["results"].items()
        for metric, value in found.items()
        if name not in inner and "," in metric and "_stderr," not in metric
        if isinstance(value, int | float)
    }
