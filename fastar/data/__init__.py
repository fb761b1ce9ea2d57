"""Data: from raw files to .beton files, and from those to batches on the device. The only importer of FFCV."""

from fastar.data.device import DeviceDataset, load
from fastar.data.files import DatasetFiles, open_files, prepare
from fastar.data.registry import DATASETS, Augmentation, DatasetSpec, dataset_spec

__all__ = [
    "DATASETS",
    "Augmentation",
    "DatasetFiles",
    "DatasetSpec",
    "DeviceDataset",
    "dataset_spec",
    "load",
    "open_files",
    "prepare",
]
