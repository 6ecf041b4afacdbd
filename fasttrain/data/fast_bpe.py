"""Byte-level BPE through tiktoken: the same ids as `tokenizers` gives, several times as fast.

The two describe one tokenizer differently. `tokenizers` lists merges, each of one pair; tiktoken
merges any two neighbours whose concatenation it knows, in order of its rank. With rank = 256 +
place in the list of merges they agree on every word if

1. each merge's parts are single bytes or products of merges before it,
2. no two merges have the same product, and
3. every product, given alone as a word, comes out as that one token.

For suppose tiktoken joins the neighbours x and y to s, of rank r, where the list has another pair
(u, v) for s. What stands between two borders when all merges below r are done depends on nothing
beyond the borders, so s given alone would be [x, y] then, never [u, v], and by 2 never s: against
3. `FastBpe` verifies all three; what remains is the regular expression that finds the words, which
two libraries execute, each with the Unicode tables of its time. Text with characters that are newer
than this Python's table is therefore left to `tokenizers`, and `Encoder` compares the ids on a
sample of what it encodes.
"""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

__all__ = ["BYTE_CHARACTERS", "FastBpe", "NotFastError"]

# The ByteLevel step writes byte b as one printable character: itself where it is printable Latin-1,
# and U+0100, U+0101 … for the others in order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = sorted({*range(256)} - _PRINTABLE)
BYTE_CHARACTERS = [chr(b if b in _PRINTABLE else 256 + _OTHERS.index(b)) for b in range(256)]
_BYTE_OF = {ord(character): byte for byte, character in enumerate(BYTE_CHARACTERS)}
# What ByteLevel with use_regex = true splits by: the words of GPT-2.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_RESERVED = "<|reserved|>"
# These versions take time quadratic in the longest word: 5 s for one of 128 Ki letters.
_QUADRATIC = tuple(f"0.{minor}." for minor in range(13))


class NotFastError(Exception):
    """Why a tokenizer cannot go through tiktoken, in words that complete "because …"."""


class FastBpe:
    """Encodes text with tiktoken as a `tokenizers` byte-level BPE does.

    Args:
        tokenizer: Special tokens in a text are taken as text.

    Raises:
        NotFastError: tiktoken is not installed, or could give other ids with this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            tiktoken, now = importlib.import_module("tiktoken"), version("tiktoken")
        except ImportError:
            raise NotFastError("tiktoken is not installed (pip install tiktoken)") from None
        if now.startswith(_QUADRATIC):
            raise NotFastError(f"tiktoken {now} is slow (pip install 'tiktoken>=0.13')")
        state = json.loads(tokenizer.to_str())
        pattern = _pattern(state)
        words, ids = self.ranks(state["model"])
        self._ids = np.array(ids, np.uint32)
        self._n_bytes = np.array([len(word) for word in words], np.uint32)
        try:
            # Without any special token its search for them stops at every character.
            self._tiktoken = tiktoken.Encoding(
                "fasttrain",
                pat_str=pattern,
                mergeable_ranks={word: rank for rank, word in enumerate(words)},
                special_tokens={_RESERVED: len(words)},
            )
        except Exception as error:  # a ValueError of its own or of the regular expression's
            raise NotFastError(f"tiktoken does not take it ({error})") from None

    def encode(self, text: str) -> NDArray[np.uint32] | None:
        """The ids of a text, or None where they would be uncertain."""
        # Of each character once: the expression takes 90 ns for a character, the set 15.
        if not text.isascii() and _new_characters().search("".join(set(text))):
            return None
        try:
            ranks = self._tiktoken.encode_to_numpy(
                text, allowed_special=set(), disallowed_special=()
            )
        except ValueError:  # the regular expression was given up
            return None
        # A pattern that does not match everything: tiktoken leaves the rest out.
        if int(self._n_bytes[ranks].sum()) != len(text.encode()):
            return None
        ids: NDArray[np.uint32] = self._ids[ranks]
        return ids

    @staticmethod
    def ranks(model: dict[str, Any]) -> tuple[list[bytes], list[int]]:
        """The tokens of a tokenizer's model in order of rank, as bytes, and their ids.

        Raises:
            NotFastError: The ranks do not mean the merges, by one of the three conditions.
        """
        plain = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        if model["type"] != "BPE" or any(model.get(key) for key in plain) or model["byte_fallback"]:
            raise NotFastError("its model is not a plain byte-level BPE")
        vocab: dict[str, int] = model["vocab"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        products = {left + right for left, right in merges}
        known = set(BYTE_CHARACTERS)
        if not known <= vocab.keys():
            raise NotFastError("its vocabulary lacks some bytes")
        if len(products) < len(merges) or products & known:
            raise NotFastError("two of its merges have the same product")
        if model.get("ignore_merges") and vocab.keys() - products - known:
            raise NotFastError("it has whole words that no merge makes")
        alone = models.BPE(vocab, merges)
        for left, right in merges:
            if left not in known or right not in known:
                raise NotFastError("its merges are out of order")
            known.add(left + right)
            if len(alone.tokenize(left + right)) != 1:
                raise NotFastError("some of its tokens never come out of its merges")
        tokens = [*BYTE_CHARACTERS, *(left + right for left, right in merges)]
        words = [token.translate(_BYTE_OF).encode("latin-1") for token in tokens]
        return words, [vocab[token] for token in tokens]


@cache
def _new_characters() -> re.Pattern[str]:
    """Finds a character that this Python's Unicode does not know yet."""
    end = 0x323B0  # beyond the last ideographs little is assigned, and nothing that words are of
    unknown = [c for c in range(end) if unicodedata.category(chr(c)) == "Cn"]
    ranges: list[list[int]] = []
    for point in unknown:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    ranges.append([end, 0x10FFFF])
    return re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in ranges) + "]")


def _pattern(state: dict[str, Any]) -> str:
    """The regular expression of a tokenizer's words, if its words are all that shapes the ids."""
    if state["normalizer"] is not None:
        raise NotFastError("it normalizes the text")
    if state["truncation"] is not None:
        raise NotFastError("it truncates the text")
    if any(not token["special"] for token in state["added_tokens"]):
        raise NotFastError("it has added tokens that are not special")
    step = state["pre_tokenizer"] or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        raise NotFastError("it splits the text in a way of its own")
    if last["use_regex"] and not splits:
        return _GPT2_PATTERN
    if last["use_regex"] or not splits or splits[0]["type"] != "Split":
        raise NotFastError("it splits the text in a way of its own")
    split = splits[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise NotFastError("it splits the text in a way of its own")
    return str(split["pattern"]["Regex"])
