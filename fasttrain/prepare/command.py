"""Command: any text → a dataset folder of token shards.

    python -m fasttrain.prepare OUT --input PATH... [--tokenizer bpe:32768] [--resume]
    python -m fasttrain.prepare OUT --input PATH... --shard-of I/N, then OUT --merge
    python -m fasttrain.prepare --inspect OUT

The input is read in pieces and never held. The folder appears under its name when it is complete,
and does not depend on how many processes made it, nor on how often they were interrupted.
"""

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fasttrain.command import check_system, command, make_parser, usable_cores
from fasttrain.config.keys import counted
from fasttrain.data.dataset import BLOCK_TOKENS
from fasttrain.data.format import DATASET_JSON, SPLITS, open_dataset, read_dataset_json
from fasttrain.data.tokenizer import load_tokenizer
from fasttrain.prepare.build import merge, prepare
from fasttrain.prepare.inputs import FORMATS
from fasttrain.prepare.sources import MAX_VAL_FRACTION, SMALL_BYTES, VAL_BYTES, VAL_FRACTION
from fasttrain.printing import say
from fasttrain.storage import DataError, shown

MOST_FREQUENT, SAMPLES, SAMPLE_TOKENS = 10, 3, 40  # shown by --inspect


def inspect(folder: Path) -> Iterator[str]:
    """Yield what is in a prepared dataset, in lines to print, with every hash verified."""
    if not (folder / DATASET_JSON).is_file():
        remedy = "only what fasttrain.prepare wrote can be inspected"
        raise DataError(f"{folder}: no {DATASET_JSON} in it, so nothing to verify; {remedy}")
    meta = read_dataset_json(folder)
    with tempfile.TemporaryDirectory() as fresh:  # every file is read, whatever a cache says
        splits = [split for split in SPLITS if split in meta["splits"]]
        datasets = {split: open_dataset(folder, split, cache_dir=Path(fresh)) for split in splits}
    for dataset in datasets.values():
        _ = dataset.document_ends
    n_files = 1 + sum(2 * len(dataset.shards) for dataset in datasets.values())
    yield f"{folder}: {meta['vocab_size']:,} tokens in the vocabulary, stored as {meta['dtype']}"
    for key, value in sorted(meta.get("source", {}).items()):
        yield f"  {key}: {value}"
    tokenizer = load_tokenizer(folder / meta["tokenizer"]["file"])

    def text(tokens: list[int]) -> str:
        return repr(tokenizer.decode(tokens, skip_special_tokens=False))

    for name, dataset in datasets.items():
        listed = meta["splits"][name]
        yield (
            f"{name}: {dataset.n_tokens:,} tokens in {counted(len(dataset.shards), 'shard')}, "
            f"{counted(listed['documents'], 'document')}, {listed['bytes']:,} bytes, "
            f"{listed['bytes'] / dataset.n_tokens:.2f} bytes a token"
        )
        counts = np.zeros(meta["vocab_size"], np.int64)
        for start in range(0, dataset.n_tokens, BLOCK_TOKENS):
            block = dataset.read(start, min(BLOCK_TOKENS, dataset.n_tokens - start))
            counts += np.bincount(block, minlength=len(counts))
        yield f"  {(counts < 1).sum():,} of the {len(counts):,} tokens do not occur; most frequent:"
        for token in np.argsort(-counts, kind="stable")[:MOST_FREQUENT].tolist():
            if counts[token]:
                share = 100 * counts[token] / dataset.n_tokens
                yield f"  {token:8d} {share:6.2f} %  {text([token])}"
        for number in range(SAMPLES):
            start = max(dataset.n_tokens - SAMPLE_TOKENS, 0) * number // (SAMPLES - 1)
            tokens = dataset.read(start, min(SAMPLE_TOKENS, dataset.n_tokens - start))
            yield f"  from token {start:,}: {text(tokens.tolist())}"
    yield f"All {n_files} files have the SHA-256 that {DATASET_JSON} records."


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for what the user can mend, 130 interrupted."""
    what = "Make a dataset folder of token shards from text, or inspect one."
    parser = make_parser("prepare", what)
    add = parser.add_argument
    add("out", nargs="?", metavar="OUT", help="folder to create; may be in a bucket (s3://, gs://)")
    named = "files, folders, globs or addresses (s3://, gs://, hf://, https://); - is "
    add("--input", nargs="+", metavar="PATH", help=f"{named}standard input")
    what = "text field of JSON and Parquet; a.b is b in a (default: %(default)s)"
    add("--text-field", default="text", metavar="NAME", help=what)
    what = "what the files hold (default: %(default)s, by their content)"
    add("--format", default="auto", choices=("auto", *FORMATS), help=what)
    what = "of text and JSON, as utf-16 or cp1252; with a name, invalid bytes are replaced by "
    what += "U+FFFD however many there are (default: %(default)s, by the content)"
    add("--encoding", default="auto", metavar="NAME", help=what)
    what = "ends a document wherever the text has it, as '<|endoftext|>'; \\n is the end of a line"
    add("--separator", default="", metavar="TEXT", help=what)
    kinds = "bpe:N, bytes, chars or the path of a tokenizer.json (default: %(default)s)"
    add("--tokenizer", default="bpe:32768", metavar="KIND", help=kinds)
    part = f"fraction held out for validation (default: {VAL_FRACTION}; for less than "
    part += f"{SMALL_BYTES / 1e6:.0f} MB, enough for {VAL_BYTES / 1e3:.0f} kB, but at most "
    add("--val-fraction", type=float, metavar="F", help=f"{part}{MAX_VAL_FRACTION})")
    tokens = "tokens per shard (default: %(default)s)"
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help=tokens)
    add("--strict", action="store_true", help="stop at the first problem in the text")
    time_only = "encoding processes; the result is the same (default: one per core, %(default)s)"
    add("--workers", type=int, default=usable_cores(), metavar="N", help=time_only)
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--shard-of", metavar="I/N", help="make part I of N of OUT, one per machine; see --merge")
    add("--merge", action="store_true", help="make OUT from its N parts")
    add("--inspect", type=Path, metavar="FOLDER", help="verify a dataset and show what it contains")
    options = vars(parser.parse_args(arguments))
    check_system()
    folder, out, inputs, merges = map(options.pop, ("inspect", "out", "input", "merge"))
    try:
        if folder is not None:
            if out is not None or inputs:
                parser.error("--inspect looks into a folder and makes nothing: leave the rest out")
            for line in inspect(folder):
                say(line)
            return 0
        if merges:
            if out is None or inputs or options["shard_of"]:
                parser.error("--merge makes OUT of its parts: leave --input and --shard-of out")
            merge(out, resume=options["resume"])
        elif out is None or not inputs:
            parser.error("name the folder to make and the text: OUT --input PATH...")
        else:
            prepare(out, inputs, **options, progress=True)
        path = shlex.quote(shown(out))
        done = f"Train on it: python -m fasttrain.train base data.path={path}"
        if options["shard_of"]:
            done = f"When all parts are there: python -m fasttrain.prepare {path} --merge"
        say(done)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command with --resume goes on") from None
    return 0
