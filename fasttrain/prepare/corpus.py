"""The default text: the source of the running Python's standard library, on every machine.

Some 12 MB of real text with structure to learn, no download, and the same files give the same
dataset. It is made once and cached under a hash of the text and of everything that shapes it.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import tokenizers

from fasttrain.data.format import DATASET_JSON, SPLITS, open_dataset
from fasttrain.data.tokenizer import CODE_PATTERN
from fasttrain.prepare.build import prepare
from fasttrain.prepare.inputs import local_file
from fasttrain.storage import DataError, cache_folder, clear_place, lock

RECIPE = 1  # raise it when anything below changes the tokens
PREFIX, LOCK = ".building-", "python-stdlib.lock"
VAL_FRACTION = 0.05
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MIN_BYTES = 1 << 20  # less source than this is a stripped Python, not a text to learn from


def build_default_corpus(
    *,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """The dataset folder made from the standard library's source, built if it is not cached.

    A file is a document. It belongs to validation if the first 32 bits of the SHA-256 of its bytes,
    as a fraction of 2**32, are below 0.05. The tokenizer, a byte-level BPE, is trained on the
    training part only.
    """
    root = Path(sysconfig.get_path("stdlib"))
    settings = [RECIPE, vocab_size, VAL_FRACTION, CODE_PATTERN, tokenizers.__version__]
    digest = hashlib.sha256(json.dumps(settings).encode())
    files, n_bytes = [], 0
    for name, content in _source_files(root):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        files.append(local_file(root / name))
        n_bytes += len(content)
    if n_bytes < MIN_BYTES:
        problem = f"only {n_bytes} bytes of Python source, too little for a default text"
        remedy = "name a dataset of your own with data.path (python -m fasttrain.prepare makes one)"
        raise DataError(f"{root}: {problem}; {remedy}")
    parent = cache_folder(cache_dir)
    folder = parent / f"python-stdlib-{digest.hexdigest()[:16]}"
    if _is_sound(folder, parent):
        return folder

    begin = time.perf_counter()
    report(
        f"Preparing the default text once: {n_bytes / 1e6:.1f} MB in {len(files)} files of "
        f"the source of Python {sys.version.split()[0]}'s standard library ({root})"
    )
    try:
        with ExitStack() as stack:  # one process at a time where the file system has locks
            with suppress(OSError):
                stack.callback(os.close, lock(parent / LOCK, wait=True))
                for killed in parent.glob(f"{PREFIX}*"):
                    shutil.rmtree(killed, ignore_errors=True)
            if _is_sound(folder, parent):  # made meanwhile
                return folder
            clear_place(folder)  # what is left of one
            building = tempfile.TemporaryDirectory(dir=parent, prefix=PREFIX)
            made = Path(stack.enter_context(building), "dataset")
            prepare(
                made,
                [f"{root}/**/*.py"],
                files=files,
                tokenizer=f"bpe:{vocab_size}",
                pattern=CODE_PATTERN,
                val_fraction=VAL_FRACTION,
                note=lambda line: None,
            )
            try:
                os.rename(made, folder)
            except OSError:  # without locks another process may have been faster
                if not (folder / DATASET_JSON).is_file():
                    raise
    except (OSError, DataError) as error:
        remedy = "free some space or name another folder with data.cache_dir"
        raise DataError(f"the default text cannot be made: {error}; {remedy}") from error
    report(f"Default text ready: {time.perf_counter() - begin:.1f} s, kept in {folder}")
    return folder


def _is_sound(folder: Path, cache_dir: Path) -> bool:
    """Return whether a dataset is there, and has the hashes that it was made with."""
    if not (folder / DATASET_JSON).is_file():
        return False
    try:
        for split in SPLITS:
            dataset = open_dataset(folder, split, cache_dir=cache_dir)
            _ = dataset.document_ends
    except DataError:
        return False
    return True


def _source_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(relative posix path, content) of every source file that is UTF-8 and not empty, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in found):
        # What is unreadable, or a sample of some other encoding, is left out.
        with suppress(OSError, UnicodeDecodeError):
            content = path.read_bytes()
            if content.decode():
                yield name, content
