"""Scores on the tasks of lm-evaluation-harness: ``python -m fasttrain.evaluate``."""

from fasttrain.evaluate.command import main

__all__ = ["main"]
