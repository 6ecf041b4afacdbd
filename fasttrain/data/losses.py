"""What a tokenizer has no token for: characters that it leaves out, or writes as unknown."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fasttrain.data.fast_bpe import BYTE_CHARACTERS

__all__ = ["Losses"]

_SPACES = {" ", "▁", "Ġ"}  # and what is written for it, also where a step only puts it in front


class Losses:
    """Finds what encoding a text with a tokenizer loses.

    What normalizer and pre-tokenizer remove, as accents or spaces, is the tokenizer's intention and
    not counted: only what its model has no token for.

    Args:
        tokenizer: Byte-level ones and those that fall back to bytes lose nothing.

    Attributes:
        what: What is lost and what becomes of it, in words; empty where nothing can be.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        model: dict[str, Any] = state["model"]
        vocab: Any = model["vocab"]
        self.what, self._unknown_id = "", model.get("unk_id")
        unknown = model.get("unk_token")
        if unknown is not None:
            self._unknown_id = tokenizer.token_to_id(unknown)
        self._alphabet: set[str] = set()
        self._known: set[str] = set()
        self._without: set[str] = set()
        if self._unknown_id is not None:
            name = tokenizer.id_to_token(self._unknown_id)
            self.what = f"places that the tokenizer has no token for (encoded as {name})"
        elif model["type"] == "BPE" and not model["byte_fallback"]:
            byte_level = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]])
            if byte_level and vocab.keys() >= set(BYTE_CHARACTERS):
                return
            before = model["continuing_subword_prefix"] or ""
            behind = model["end_of_word_suffix"] or ""
            bare = (t.removeprefix(before).removesuffix(behind) for t in vocab)
            self._alphabet = {token for token in bare if len(token) == 1}
            self.what = "characters that the tokenizer has no token for (left out)"

    def count(self, text: str, ids: NDArray[np.unsignedinteger[Any]]) -> int:
        """How much of a text is lost in its `ids`."""
        if not self.what:
            return 0
        if self._unknown_id is not None:
            return int(np.count_nonzero(ids == self._unknown_id))
        text = self._normalized(text)
        return sum(text.count(character) for character in self._lost_of(text))

    def first(self, text: str) -> tuple[int, int]:
        """Where in a text the first thing lost is; the whole of it where that is hard to say."""
        if self._unknown_id is not None:
            found = self._tokenizer.encode(text, add_special_tokens=False)
            if self._unknown_id in found.ids:
                begin, end = found.offsets[found.ids.index(self._unknown_id)]
                return int(begin), int(end)
        else:
            lost = self._lost_of(self._normalized(text))
            for place, character in enumerate(text):
                if character in lost:
                    return place, place + 1
        return 0, len(text)

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def _lost_of(self, text: str) -> set[str]:
        characters = set(text)
        for character in characters - self._known - self._without:
            (self._known if self._has_token(character) else self._without).add(character)
        return characters & self._without

    def _has_token(self, character: str) -> bool:
        steps = self._tokenizer.pre_tokenizer
        words = [character] if steps is None else [w for w, _ in steps.pre_tokenize_str(character)]
        symbols = set("".join(words))
        if character not in _SPACES:
            symbols -= _SPACES
        return symbols <= self._alphabet
