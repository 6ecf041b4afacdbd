"""The configuration; standard library only, so that a bad one fails before torch is loaded."""

from fasttrain.config.keys import ConfigError, UserError, counted, refuse, show
from fasttrain.config.load import (
    config_difference,
    config_from_dict,
    config_reference,
    config_to_toml,
    load_config,
)
from fasttrain.config.schema import (
    SECTIONS,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    LogConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from fasttrain.config.untrusted import misfit

__all__ = [
    "SECTIONS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "LogConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "UserError",
    "config_difference",
    "config_from_dict",
    "config_reference",
    "config_to_toml",
    "counted",
    "load_config",
    "misfit",
    "refuse",
    "show",
]
