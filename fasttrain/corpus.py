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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import tokenizers

from fasttrain.data.files import DataError, cache_folder, lock
from fasttrain.data.format import DATASET_JSON
from fasttrain.data.prepare.build import prepare
from fasttrain.data.tokenizer import CODE_PATTERN

RECIPE = 1  # raise it when anything below changes the tokens
PREFIX, LOCK = ".building-", "python-stdlib.lock"
VAL_FRACTION = 0.05
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MIN_BYTES = 1 << 20  # less source than this is a stripped Python, not a text to learn from


def build_default_corpus(
    *,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
    report: Callable[[str], None] | None = None,
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
        files.append(root / name)
        n_bytes += len(content)
    if n_bytes < MIN_BYTES:
        raise DataError(
            f"{root}: only {n_bytes} bytes of Python source, too little for a default text; name "
            "a dataset of your own with data.path (python -m fasttrain.prepare makes one)"
        )
    parent = cache_folder(cache_dir)
    folder = parent / f"python-stdlib-{digest.hexdigest()[:16]}"
    if (folder / DATASET_JSON).is_file():
        return folder

    say = report or (lambda text: None)
    begin = time.perf_counter()
    say(
        f"Preparing the default text once: {n_bytes / 1e6:.1f} MB in {len(files)} files of "
        f"the source of Python {sys.version.split()[0]}'s standard library ({root})"
    )
    try:
        _build(parent, folder, [f"{root}/**/*.py"], files, vocab_size)
    except (OSError, DataError) as error:
        raise DataError(
            f"the default text cannot be made: {error}; free some space or name another folder "
            "with data.cache_dir"
        ) from error
    say(f"Default text ready: {time.perf_counter() - begin:.1f} s, kept in {folder}")
    return folder


def _build(
    parent: Path, folder: Path, inputs: list[str], files: list[Path], vocab_size: int
) -> None:
    """Make `folder` in `parent`, one process at a time where the file system has locks."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.callback(os.close, lock(parent / LOCK, wait=True))
            if (folder / DATASET_JSON).is_file():  # made meanwhile
                return
            for killed in parent.glob(f"{PREFIX}*"):
                shutil.rmtree(killed, ignore_errors=True)
        building = tempfile.mkdtemp(dir=parent, prefix=PREFIX)
        stack.callback(shutil.rmtree, building, ignore_errors=True)
        made = Path(building, "dataset")
        prepare(
            made,
            inputs,
            files=files,
            tokenizer=f"bpe:{vocab_size}",
            pattern=CODE_PATTERN,
            val_fraction=VAL_FRACTION,
            note=lambda line: None,
        )
        try:
            os.rename(made, folder)
        except OSError:
            # Without locks another process may have been faster, and its folder is as good. One
            # without dataset.json is in the way, which nothing here leaves behind.
            if not (folder / DATASET_JSON).is_file():
                raise


def _source_files(root: Path) -> list[tuple[str, bytes]]:
    """(relative posix path, content) of every source file that is UTF-8 and not empty, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    documents = []
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in found):
        # What is unreadable, or a sample of some other encoding, is left out.
        with suppress(OSError, UnicodeDecodeError):
            content = path.read_bytes()
            content.decode()
            if content:
                documents.append((name, content))
    return documents
