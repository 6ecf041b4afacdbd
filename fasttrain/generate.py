"""Command: text from a trained model, ``python -m fasttrain.generate RUN --prompt …``.

`load_model` and `generate` do the same from Python.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fasttrain.checkpoint import check_model, saved_parameters
from fasttrain.checkpoint.files import candidates
from fasttrain.command import command, make_parser
from fasttrain.config import UserError
from fasttrain.data.tokenizer import encode, end_of_text_id, load_tokenizer
from fasttrain.device import resolve_device
from fasttrain.engine.sampling import generate, sample_tokens, stream
from fasttrain.log.console import clean
from fasttrain.model.transformer import Transformer
from fasttrain.printing import say, write

__all__ = ["generate", "load_model"]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return a prompt's tokens; an empty one starts a new document."""
    ids, end = encode(tokenizer, prompt), end_of_text_id(tokenizer)
    if not ids and end is None:
        remedy = "give a --prompt, or tasks with a context"
        raise UserError(f"the tokenizer has no end-of-text token to start from; {remedy}")
    return ids or [end or 0]


class Decoder:
    """Turns tokens into text as they come.

    Held back are characters that are not complete yet, and what may begin a string of ``stop``. The
    text has ended before the first of these, or with the document.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop, self._end = tokenizer, stop, end_of_text_id(tokenizer)
        self._ids, self._held, self.ended = list(prompt), "", False
        # Decoding starts some tokens back: a decoder may treat the start of a text differently.
        self._start, self._shown = max(0, len(self._ids) - 8), len(self._ids)

    def push(self, token: int, *, last: bool = False) -> str:
        """Add a token and return the text that it completes."""
        if token != self._end:
            self._ids.append(token)
            before = self._tokenizer.decode(self._ids[self._start : self._shown])
            text = self._tokenizer.decode(self._ids[self._start :])
            if last or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._start, self._shown = self._shown, len(self._ids)
                self._held += text[len(before) :]
        held = self._held
        ready = min((held.partition(s)[0] for s in self._stop), key=len, default=held)
        self.ended = last or token == self._end or ready != held
        if not self.ended:
            begun = [n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])]
            ready = held[: len(held) - max(begun, default=0)]
        self._held = held[len(ready) :]
        return ready


def stream_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    agreed: Callable[[bool], bool] | None = None,
    **sampling: Any,
) -> Iterator[tuple[int, str]]:
    """Yield the number of a prompt, given in tokens, and a piece of its text, as it is drawn.

    A text ends before the first of ``stop``, or at the end of the document. The prompts, of any
    lengths, are computed together, and each sees itself alone. The numbers drawn depend on all
    prompts and on the generator. ``agreed`` is told after each forward pass whether all texts have
    ended, and returns whether to end, so that ranks of a sharded model do so together.
    """
    prompts = [list(ids[-model.seq_len :]) for ids in prompts]
    decoders = [Decoder(tokenizer, ids, stop) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    rows = [[*ids, *[0] * (max(lengths) - len(ids))] for ids in prompts]
    tokens = torch.tensor(rows, device=model.embedding.weight.device)
    n = max_new_tokens if agreed is None else sys.maxsize
    drawn = stream(model, tokens, max_new_tokens=n, lengths=lengths, **sampling)
    for position, column in enumerate(drawn, start=min(lengths)):
        for i, (decoder, token) in enumerate(zip(decoders, column.tolist(), strict=True)):
            if position >= lengths[i] and not decoder.ended:
                yield i, decoder.push(token, last=position + 1 == lengths[i] + max_new_tokens)
        ended = all(decoder.ended for decoder in decoders)
        if ended if agreed is None else agreed(ended):
            break


def load_model(
    run_or_checkpoint: str | Path, *, device: str | torch.device = "cpu", which: str = "best"
) -> Transformer:
    """Return the trained model of a run or checkpoint folder, in evaluation mode.

    Args:
        run_or_checkpoint: a run folder, or one checkpoint of it.
        device: where the parameters go.
        which: of a run, the ``best`` checkpoint (the newest where none was evaluated) or the
            ``latest``.

    Raises:
        UserError: there is no such folder, no checkpoint in it, or it is damaged.
    """
    loaded, parameters = saved_parameters(Path(run_or_checkpoint), which)
    config = loaded.config
    check_model(config, parameters, loaded.path)
    if bad := [name for name, t in parameters.items() if not torch.isfinite(t).all()]:
        raise UserError(f"{loaded.path}: {bad[0]} is not finite; use an earlier checkpoint")
    # Initial values are about to be overwritten: they must not use up the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config.model, seq_len=config.data.seq_len)
    model.load_state_dict(parameters)
    return model.to(device).eval()


def load_with_tokenizer(
    run: Path, device: torch.device, which: str, path: Path | None
) -> tuple[Transformer, Tokenizer]:
    """Return what `load_model` returns, and the run's tokenizer, or the one at ``path``."""
    model = load_model(run, device=device, which=which)
    file = path or candidates(run)[0].parent.parent / "tokenizer.json"
    if path is None and not file.is_file():
        raise UserError(f"{run}: the run has no tokenizer.json; name one with --tokenizer PATH")
    tokenizer = load_tokenizer(file)
    if tokenizer.get_vocab_size() > model.vocab_size:
        problem = f"{tokenizer.get_vocab_size()} tokens, but the model knows {model.vocab_size}"
        raise UserError(f"{file}: {problem}; give the tokenizer that its data was made with")
    return model, tokenizer


def show(text: str) -> None:
    """Write what a model wrote: to a terminal without control characters, to a file as it is."""
    if sys.stdout.isatty():
        say(clean(text), end="")
    else:
        write(text)


def _run(options: argparse.Namespace) -> None:
    if options.interactive and options.prompt:
        raise UserError("--interactive reads its prompts from the input; leave --prompt out")
    if "" in options.stop:
        raise UserError("--stop must not be empty; leave it out to go on to --max-tokens")
    for flag, n in (("--max-tokens", options.max_tokens), ("--num-samples", options.num_samples)):
        if n < 1:
            raise UserError(f"{flag} must be at least 1, got {n}")
    names = ("temperature", "top_k", "top_p", "greedy")
    sampling: dict[str, Any] = {name: getattr(options, name) for name in names}
    try:
        sample_tokens(torch.zeros(1, 1), **sampling)  # refuse bad options before the model is read
    except ValueError as error:
        raise UserError(str(error)) from None
    device = resolve_device(options.device)
    model, tokenizer = load_with_tokenizer(options.run, device, options.which, options.tokenizer)
    sampling |= {"max_new_tokens": options.max_tokens, "stop": options.stop}

    def pieces(*prompts: str) -> Iterator[tuple[int, str]]:
        """Return the pieces of texts; the same seed and prompts give the same texts."""
        generator = torch.Generator(device).manual_seed(options.seed)
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        return stream_texts(model, tokenizer, encoded, generator=generator, **sampling)

    def say(prompt: str, before: str = "") -> None:
        drawn = pieces(prompt)  # raises before anything is shown
        show(before)
        for _, piece in drawn:
            show(piece)
        show("\n")

    if options.interactive:
        try:
            while True:
                say(input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
        except UnicodeDecodeError as error:
            where = f"the input is not UTF-8 at byte {error.start}"
            raise UserError(f"{where}; give it in UTF-8") from None
    prompts = [prompt for prompt in options.prompt or [""] for _ in range(options.num_samples)]
    if len(prompts) == 1:
        say(prompts[0], prompts[0])
        return
    texts = list(prompts)
    for i, piece in pieces(*prompts):
        texts[i] += piece
    for number, text in enumerate(texts, start=1):
        show(f"--- sample {number}\n{text}\n")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 on bad input, 130 when interrupted."""
    parser = make_parser("generate", "Generate text with a trained model.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run or checkpoint folder")
    prompt = "text to continue (empty: a new document); repeatable, run as one batch"
    add("--prompt", action="append", metavar="TEXT", help=prompt)
    add("--interactive", action="store_true", help="continue each line of standard input")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; repeatable")
    add("--max-tokens", type=int, default=256, metavar="N", help="tokens to generate (%(default)s)")
    add("--temperature", type=float, default=0.8, help="0: greedy (%(default)s)")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample from the top tokens up to probability P")
    add("--greedy", action="store_true", help="always take the most likely token")
    add("--seed", type=int, default=0, help="the same seed gives the same text (%(default)s)")
    add("--num-samples", type=int, default=1, metavar="N", help="samples per prompt (%(default)s)")
    add("--which", choices=("best", "latest"), default="best", help="checkpoint (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--tokenizer", type=Path, help="tokenizer.json, if the run has none")
    _run(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
