"""fasttrain: a compact, fast pretraining engine for language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.config import TrainConfig, load_config
    from fasttrain.generate import load_model
    from fasttrain.library import Callback, Trainer, train_loop
    from fasttrain.log.metrics import TrainingMetrics
    from fasttrain.model.transformer import Transformer
    from fasttrain.preflight.diagnosis import diagnose

__all__ = [
    "Callback",
    "TrainConfig",
    "Trainer",
    "TrainingMetrics",
    "Transformer",
    "diagnose",
    "load_config",
    "load_model",
    "train_loop",
]

__version__ = "0.1.0"

_HOMES = {
    "config": ("TrainConfig", "load_config"),
    "preflight.diagnosis": ("diagnose",),
    "generate": ("load_model",),
    "library": ("Callback", "Trainer", "train_loop"),
    "log.metrics": ("TrainingMetrics",),
    "model.transformer": ("Transformer",),
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that a bad config fails before torch is loaded."""
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"fasttrain.{home}"), name)
    raise AttributeError(f"module 'fasttrain' has no attribute {name!r}")
