"""Data: from raw files to .beton files, and from those to batches on the device. The only importer of FFCV."""

from fastar.config import DATASETS, Augmentation, DatasetSpec, dataset_spec, register
from fastar.data.check import verify_folder
from fastar.data.dataset import Batch, Dataset
from fastar.data.ffcv.folder import Files, is_finished
from fastar.data.files import DatasetFiles, open_files, prepare
from fastar.data.images import ImageFiles, open_images, prepare_images
from fastar.data.in_memory import DeviceDataset, load
from fastar.data.raw.imagefolder import count_images, is_packed
from fastar.data.raw.raw_split import ArraySplit, RawDataset, RawSplit
from fastar.data.splits import check_limit, held_out
from fastar.data.streaming import StreamingDataset
from fastar.data.variable_size import PRESETS, Encoding

__all__ = [
    "DATASETS",
    "PRESETS",
    "ArraySplit",
    "Augmentation",
    "Batch",
    "Dataset",
    "DatasetFiles",
    "DatasetSpec",
    "DeviceDataset",
    "Encoding",
    "Files",
    "ImageFiles",
    "RawDataset",
    "RawSplit",
    "StreamingDataset",
    "check_limit",
    "count_images",
    "dataset_spec",
    "held_out",
    "is_finished",
    "is_packed",
    "load",
    "open_files",
    "open_images",
    "prepare",
    "prepare_images",
    "register",
    "verify_folder",
]
