"""Builds fasttrain with setuptools, and says where its kernels are.

A wheel requires the distribution fasttrain-kernels by name and version. An editable install, which
is one of a checkout, takes that distribution from the checkout: pip knows no relative paths, so the
path is written into the metadata here, escaped as a URL.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    """Write the metadata of an editable install, with the place of the kernels."""
    name: str = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    file = Path(metadata_directory, name, "METADATA")
    kernels = (Path(__file__).parent / "kernels").resolve().as_uri()
    text, n_replaced = re.subn(
        r"(?m)^Requires-Dist: fasttrain-kernels==\S+$",
        lambda _: f"Requires-Dist: fasttrain-kernels @ {kernels}",
        file.read_text("utf-8"),
    )
    assert n_replaced == 1, "pyproject.toml no longer requires fasttrain-kernels by version"
    file.write_text(text, "utf-8")
    return name


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the wheel of an editable install, with the metadata from above."""
    # Made again, because setuptools looks for them in a parent folder of the one that pip hands it.
    with tempfile.TemporaryDirectory() as folder:
        prepare_metadata_for_build_editable(folder, config_settings)
        name: str = build_meta.build_editable(wheel_directory, config_settings, folder)
    return name
