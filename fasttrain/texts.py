"""Text from a model: a batch of prompts, stop strings, and tokens shown as they are drawn."""

from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
import torch
from tokenizers import Tokenizer

from fasttrain.config import UserError
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.tokenizer import encode, end_of_text_id
from fasttrain.generate import Sampling, generate, stream
from fasttrain.model import Transformer

__all__ = ["Decoder", "beginnings", "complete", "encode_prompt", "stream_text"]

N_BEGINNINGS, BEGINNING_TOKENS = 4, 8


def beginnings(dataset: TokenDataset, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return as prompts how some documents begin, evenly spread over a split; no two are alike.

    Raises:
        DataError: where its documents end is not known.
    """
    ends = dataset.document_ends
    found = []
    for number in np.linspace(0, len(ends) - 1, N_BEGINNINGS).astype(int).tolist():
        begin = int(ends[number - 1]) if number else 0
        ids = dataset.read(begin, min(int(ends[number]) - begin, BEGINNING_TOKENS)).tolist()
        # The last character may be cut in its middle.
        found.append(tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}"))
    return tuple(dict.fromkeys(found))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return a prompt's tokens; an empty one starts a new document.

    Raises:
        UserError: it has no token, and the tokenizer none that starts a document; or it is none.
    """
    ids = encode(tokenizer, prompt)
    end = end_of_text_id(tokenizer)
    if not ids and end is None:
        raise UserError("the tokenizer has no end-of-text token to start from; give a --prompt")
    return ids or [end or 0]


class Decoder:
    """Turns tokens into text as they come, holding back characters that are not yet complete."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        # Decoding starts some tokens back: a decoder may treat the start of a text differently.
        self._start, self._shown = max(0, len(self._ids) - 8), len(self._ids)

    def push(self, token: int, *, last: bool = False) -> str:
        """Add a token and return the text that it completes."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text: str = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


def stream_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    **sampling: Unpack[Sampling],
) -> Iterator[str]:
    """Yield the text that goes on from ``prompt`` piece by piece, as it is drawn.

    It ends before the first of ``stop``, of which no part is shown, or at the end of the document.
    """
    ids = encode_prompt(tokenizer, prompt)
    decoder, held, end = Decoder(tokenizer, ids), "", end_of_text_id(tokenizer)
    tokens = torch.tensor([ids], device=model.embedding.weight.device)
    drawn = stream(model, tokens, max_new_tokens=max_new_tokens, **sampling)
    for number, token in enumerate(drawn, start=1):
        if token.item() == end:
            break
        held += decoder.push(int(token), last=number == max_new_tokens)
        cut = _first_stop(held, stop)
        if cut is not None:
            yield held[:cut]
            return
        # What may be the beginning of a stop string waits for its end.
        ready = len(held) - max((_overlap(held, s) for s in stop), default=0)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    **sampling: Unpack[Sampling],
) -> list[str]:
    """Return for each prompt the text that goes on from it.

    Prompts of as many tokens are computed together: without padding, each sees itself alone. The
    numbers drawn depend on all prompts and on the generator.

    Args:
        model: the model.
        tokenizer: of its data.
        prompts: any number, of any lengths.
        max_new_tokens: of each.
        stop: a text ends before the first of these.
        **sampling: as `fasttrain.generate.sample_tokens` takes it.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    end, device = end_of_text_id(tokenizer), model.embedding.weight.device
    texts = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        members = [i for i, ids in enumerate(encoded) if len(ids) == length]
        tokens = torch.tensor([encoded[i] for i in members], device=device)
        out = generate(
            model, tokens, max_new_tokens=max_new_tokens, stop_token=end, **sampling
        )[:, length:]  # fmt: skip
        for i, row in zip(members, out.tolist(), strict=True):
            text = tokenizer.decode(row[: row.index(end)] if end in row else row)
            texts[i] = text[: _first_stop(text, stop)]
    return texts


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins in ``text``, or None."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of ``stop``."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
