"""Where a dataset or a part of one is built, and how it comes to an address.

What is to lie at an address is made on this machine and copied when it is complete. `prepared.json`
goes first: by it a repeated copy knows that the files there are its own. `dataset.json` goes last,
and makes a dataset of them: what was cut off is never taken for one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fasttrain.data.files import (
    DataError,
    cache_folder,
    file_system,
    is_address,
    names_at,
    put,
    remote,
    shown,
)
from fasttrain.data.format import DATASET_JSON, read_dataset_json
from fasttrain.data.prepare.writer import PREPARED_JSON, Asked, Partial, check_made
from fasttrain.data.remote import beside

Note = Callable[[str], None]


def place_of(out: Path | str) -> str:
    """Return the absolute path of a folder, or its address without a slash at the end."""
    return str(out).rstrip("/") if is_address(out) else os.path.abspath(out)


def parts_of(place: str) -> str:
    """Return where the parts of a dataset lie until they are merged."""
    return f"{place}.parts"


@contextmanager
def building(place: str, asked: Asked, *, resume: bool, note: Note) -> Iterator[Partial | None]:
    """Yield the folder in which to build what was asked for; None: it is complete.

    Behind that, what was built for an address is copied there.
    """
    at_address = is_address(place)
    folder = Path(place)
    if at_address:
        folder = cache_folder() / "prepare" / shown(place).replace("://", "/")
        if _is_there(place, asked, resume):
            note(f"{shown(place)} is complete already")
            yield None
            return
    try:
        if at_address and not resume:  # what was never copied
            shutil.rmtree(folder, ignore_errors=True)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            check_made(folder, asked, resume=resume, name=str(folder))
            note(f"{folder} is complete already")
            yield None
        else:
            with closing(Partial(folder, asked, resume=resume, note=note)) as partial:
                yield partial
        if at_address:
            note(f"Copying it to {shown(place)}")
            _copy(folder, place)
            shutil.rmtree(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _is_there(address: str, asked: Asked, resume: bool) -> bool:
    """Return whether a dataset made as asked is at an address; refuse to write over others."""
    if "https" in file_system(address)[0].protocol:
        raise DataError(f"{shown(address)}: cannot be written to; name a folder or a bucket")
    there = names_at(address)
    with tempfile.TemporaryDirectory() as folder:
        for name in there.keys() & {DATASET_JSON, PREPARED_JSON}:
            Path(folder, name).write_bytes(remote(beside(address, name), "cat_file"))
        try:
            read_dataset_json(Path(folder))
        except DataError:  # there is none, or it was cut off
            if there and not resume:
                raise DataError(
                    f"{shown(address)}: exists already and is not empty; --resume continues an "
                    "interrupted copy, else name a new folder or remove it"
                ) from None
            return False
        check_made(Path(folder), asked, resume=resume, name=shown(address))
    return True


def _copy(folder: Path, address: str) -> None:
    """Copy a dataset to an address, less what an earlier copy of the same has left there."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    names = [PREPARED_JSON, *sorted(sizes.keys() - {PREPARED_JSON, DATASET_JSON}), DATASET_JSON]
    try:
        there = names_at(address)
        if there.keys() - {PREPARED_JSON}:  # which may be cut off itself
            same = PREPARED_JSON in there and remote(beside(address, PREPARED_JSON), "cat_file")
            if same != (folder / PREPARED_JSON).read_bytes():
                raise DataError(f"{shown(address)}: holds something else; remove it")
        for name in names:
            if name == DATASET_JSON:
                there = names_at(address)
                if short := [n for n in names[:-1] if there.get(n) != sizes[n]]:
                    raise DataError(f"{shown(address)}: {short[0]} did not come there whole")
            if there.get(name) != sizes[name]:
                put(beside(address, name), folder / name)
    except DataError as error:
        raise DataError(f"{error}; --resume continues the copy of {folder}") from error
