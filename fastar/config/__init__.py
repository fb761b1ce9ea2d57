"""Settings: typed, from strict YAML and `key=value`; recipes and their smaller versions."""

from fastar.config.compare import changes, flatten, nested
from fastar.config.datasets import DATASETS, Augmentation, DatasetSpec, dataset_spec, register, variable_size_names
from fastar.config.load import as_override, load_settings, matching_settings, parse_overrides, validate
from fastar.config.recipes import config_path
from fastar.config.settings import (
    OF_ONE_SIDE,
    CheckpointSettings,
    DatasetSettings,
    LoggingSettings,
    MatchingSettings,
    Settings,
    SinkhornSettings,
    StarSettings,
    TrainSettings,
)
from fastar.config.types import parse_bytes
