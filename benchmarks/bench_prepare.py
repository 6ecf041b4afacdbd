"""Text to tokens: the whole of `fasttrain.prepare` against the bare encoders, on the same cores.

12 MB of Python source in JSON lines, a document each (with ``--full`` also 48), and a byte-level
BPE of 32,768 tokens trained on it. Ours reads and parses the file, hashes each document for its
split, encodes in a process for each core, checks a sample against the tokenizer itself, and writes
shards, document ends and hashes to disk. The others get the texts in memory, in blocks of 500, and
drop what they return.

    encode_batch       of `tokenizers`, a thread for each core
    encode_batch_fast  the same without offsets
    tiktoken           the same merges as its ranks, a thread for each core
"""

import json
import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fasttrain.data.tokenizer import TEXT_PATTERN, FastBpe, train_bpe
from fasttrain.prepare import prepare

VOCAB_SIZE, BLOCK = 32_768, 500


def source_texts(n_bytes: int) -> list[str]:
    """Source files of the standard library, again and again until there is enough."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts: list[str] = []
    for path in [p for p in paths if not {"site-packages", "dist-packages"} & set(p.parts)]:
        with suppress(OSError, UnicodeDecodeError):
            texts.append(path.read_text())
    once = sum(len(text.encode()) for text in texts)
    return (texts * (n_bytes // once + 1))[: len(texts) * n_bytes // once]


@pytest.mark.parametrize("megabytes", [12, 48])
def test_prepare(compare: Any, tmp_path: Path, full: bool, megabytes: int) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the optional package tiktoken")
    if megabytes > 12 and not full:
        pytest.skip("takes two minutes: --full")
    texts = source_texts(megabytes * 10**6)
    source, trained = tmp_path / "in.jsonl", str(tmp_path / "tokenizer.json")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    tokenizer = train_bpe(dict.fromkeys(texts), VOCAB_SIZE)
    tokenizer.save(trained)
    words, _ = FastBpe.ranks(json.loads(tokenizer.to_str())["model"])
    ranks = {word: rank for rank, word in enumerate(words)}
    ranked = tiktoken.Encoding(
        "bench", pat_str=TEXT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    n_cores = len(os.sched_getaffinity(0))
    options = {"tokenizer": trained, "workers": n_cores}
    notes: list[str] = []

    def ours() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare(tmp_path / "out", [str(source)], note=notes.append, **options)

    def by_block(encode: Callable[[list[str]], object]) -> None:
        for start in range(0, len(texts), BLOCK):
            encode(texts[start : start + BLOCK])

    encoders = {
        "encode_batch": tokenizer.encode_batch,
        "encode_batch_fast": tokenizer.encode_batch_fast,
        "tiktoken": partial(ranked.encode_ordinary_batch, num_threads=n_cores),
    }
    ways = {"prepare": ours} | {key: partial(by_block, way) for key, way in encoders.items()}
    n_bytes = sum(len(text.encode()) for text in texts)
    compare(ways, warmup=0, per_call={"mb_per_s": n_bytes / 1e6})
    assert not any("not tiktoken" in note or "does not split" in note for note in notes)
