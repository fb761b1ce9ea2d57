"""Data: from raw files to .beton files, and from those to batches on the device. The only importer of FFCV.

Names are imported when they are first used: FFCV and what it brings take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastar.config import DATASETS, Augmentation, DatasetSpec, dataset_spec, register
    from fastar.data.convert import prepare
    from fastar.data.dataset import Batch, Dataset
    from fastar.data.encode import PRESETS, Encoding
    from fastar.data.ffcv.folder import DatasetFiles, is_finished, open_files, verify_folder
    from fastar.data.in_memory import DeviceDataset, load
    from fastar.data.raw.class_folders import count_images
    from fastar.data.raw.raw_split import ArraySplit, RawDataset, RawSplit
    from fastar.data.splits import check_limit, held_out
    from fastar.data.streaming import StreamingDataset

_PLACES = {
    "fastar.config": ("DATASETS", "Augmentation", "DatasetSpec", "dataset_spec", "register"),
    "fastar.data.dataset": ("Batch", "Dataset"),
    "fastar.data.encode": ("PRESETS", "Encoding"),
    "fastar.data.ffcv.folder": ("DatasetFiles", "is_finished", "open_files", "verify_folder"),
    "fastar.data.in_memory": ("DeviceDataset", "load"),
    "fastar.data.convert": ("prepare",),
    "fastar.data.raw.class_folders": ("count_images",),
    "fastar.data.raw.raw_split": ("ArraySplit", "RawDataset", "RawSplit"),
    "fastar.data.splits": ("check_limit", "held_out"),
    "fastar.data.streaming": ("StreamingDataset",),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
