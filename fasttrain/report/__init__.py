"""Curves of runs as one HTML page and a PNG: ``python -m fasttrain.report``."""

from fasttrain.report.command import main
from fasttrain.report.page import page, picture, read_run

__all__ = ["main", "page", "picture", "read_run"]
