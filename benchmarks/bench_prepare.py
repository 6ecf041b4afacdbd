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
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fasttrain.data.tokenizer import TEXT_PATTERN, FastBpe, train_bpe
from fasttrain.prepare import prepare

VOCAB_SIZE, BLOCK = 32_768, 500


def source_texts(n_bytes: int) -> list[str]:
    """Source files of the standard library, again and again until there is enough."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(path.parts):
            try:
                texts.append(path.read_text())
            except (OSError, UnicodeDecodeError):
                continue
    once = sum(len(text.encode()) for text in texts)
    repeated = texts * (n_bytes // once + 1)
    return repeated[: len(texts) * n_bytes // once]


def by_block(encode: Callable[[Sequence[str]], object], texts: Sequence[str]) -> Callable[[], None]:
    def run() -> None:
        for start in range(0, len(texts), BLOCK):
            encode(texts[start : start + BLOCK])

    return run


@pytest.mark.parametrize("megabytes", [12, 48])
def test_prepare(compare, tmp_path, full, megabytes):
    tiktoken = pytest.importorskip("tiktoken", reason="needs the optional package tiktoken")
    if megabytes > 12 and not full:
        pytest.skip("takes two minutes: --full")
    texts = source_texts(megabytes * 10**6)
    n_bytes = sum(len(text.encode()) for text in texts)
    with (tmp_path / "in.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = train_bpe(dict.fromkeys(texts), VOCAB_SIZE)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words, _ = FastBpe.ranks(json.loads(tokenizer.to_str())["model"])
    ranked = tiktoken.Encoding(
        "bench",
        pat_str=TEXT_PATTERN,
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={},
    )
    n_cores = len(os.sched_getaffinity(0))
    notes: list[str] = []

    def ours() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare(
            tmp_path / "out",
            [str(tmp_path / "in.jsonl")],
            tokenizer=str(tmp_path / "tokenizer.json"),
            workers=n_cores,
            note=notes.append,
        )

    compare(
        {
            "prepare": ours,
            "encode_batch": by_block(tokenizer.encode_batch, texts),
            "encode_batch_fast": by_block(tokenizer.encode_batch_fast, texts),
            "tiktoken": by_block(
                lambda block: ranked.encode_ordinary_batch(block, num_threads=n_cores), texts
            ),
        },
        warmup=0,
        per_call={"mb_per_s": n_bytes / 1e6},
    )
    assert not any("not tiktoken" in note or "does not split" in note for note in notes)
