"""Which files an input means."""

from pathlib import Path

import pytest

from fasttrain.data.files import DataError
from fasttrain.data.sources import find_files


def test_inputs_are_found_sorted_once_and_unknown_endings_are_said(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.jsonl", "sub/d.TXT.gz", "image.png", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, passed_over = find_files([str(tmp_path), str(tmp_path / "b.txt"), "-"])
    assert [f and f.name for f in files] == ["a.md", "b.txt", "c.jsonl", "d.TXT.gz", None]
    assert [file.name for file in passed_over] == ["code.py", "image.png"]
    files, _ = find_files([str(tmp_path / "**" / "*.py")])
    assert [f and f.name for f in files] == ["code.py"]
    for name in ("missing.txt", "*.doc"):
        with pytest.raises(DataError, match="no such file or folder"):
            find_files([str(tmp_path / name)])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no file in it ends in"):
        find_files([str(tmp_path / "none")])
