"""Which files an input means, and what it takes to read them."""

from pathlib import Path

import pytest

from fasttrain.data.files import DataError
from fasttrain.data.prepare import sources
from fasttrain.data.prepare.sources import Source, find_files


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


@pytest.mark.parametrize(
    ("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    def missing(wanted: str) -> None:
        raise ImportError(wanted)

    monkeypatch.setattr(sources.importlib, "import_module", missing)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DataError, match=f"{name}: to read it run: pip install {package}"):
        list(Source([tmp_path / name]).documents())
