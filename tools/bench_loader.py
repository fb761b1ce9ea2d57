"""Images per second of each dataset's pipeline, against torch's DataLoader over image files read with Pillow.

    python tools/bench_loader.py [--pipeline cifar10 imagenet] [--data-root DIR] [--images N] [--workers 2] [--rounds 3]

Both give shuffled, augmented and normalised fp32 batches of the same shape: digits (8x8, none), cifar10 (pad by 4,
crop, mirror), imagenet (random resized crop to --size, mirror). DataLoader reads the image files as they are; of digits
and cifar10 also decoded images in memory, by its workers or without any, the fastest of which is the claim's peer.
ImageNet's .beton is of --preset, and the rate at which it was written is told. --workers is DataLoader's processes, and
fastar's writer processes and decoding threads (imagenet) or torch's threads (digits and cifar10, which lie in memory
once they are read).

DIR holds train/<class>/* and test/<class>/*, for one pipeline at a time; for imagenet, class folders alone will do, and
files are repeated up to --images. Without it random images are made (digits: scikit-learn's for fastar; of ImageNet's
size at most 400 different ones, repeated), and the lines say so. A round is one epoch of each: by default of at least
four batches for each worker, so that no process of DataLoader's is idle for long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import claim, quantiles, where
from bench.fake_images import link_images, make_images
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastar.config import DATASETS
from fastar.config.datasets import IMAGENET_MEAN, IMAGENET_STD
from fastar.data.convert import Form, prepare
from fastar.data.encode import PRESETS
from fastar.data.in_memory import load
from fastar.data.raw.listing import SUFFIXES
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError

Epoch = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]
FILES, MEMORY = "DataLoader and Pillow", "DataLoader, in memory"
PIPELINES = ("digits", "cifar10", "imagenet")
IMAGES = {"digits": 1500, "cifar10": 4000, "imagenet": 400}
DIFFERENT = 400  # images of ImageNet's size that are made; more are these again
BATCHES = 4  # for each worker at least, where --images says nothing


class Files(Dataset):
    """What one writes without fastar: open, convert, augment, normalise, one image at a time."""

    def __init__(self, root: Path, mode: str, change: Callable[[Image.Image], Image.Image]):
        self.paths = sorted(path for path in root.glob("*/*") if path.suffix.lower() in SUFFIXES)
        names = sorted({path.parent.name for path in self.paths})
        self.labels = [names.index(path.parent.name) for path in self.paths]
        self.mode, self.change = mode, change
        channels = 3 if mode == "RGB" else 1
        self.mean, self.std = (np.array(v[:channels], np.float32) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels: np.ndarray = np.asarray(self.change(image.convert(self.mode)), dtype=np.float32)
        pixels = (pixels.reshape(*pixels.shape[:2], -1) / 255 - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1), self.labels[index]


class InMemory(Dataset):
    """The same images, decoded once: cropped and mirrored as arrays, one at a time."""

    def __init__(self, files: Files, pad: int, flip: bool):
        self.labels, self.mean, self.std, self.pad, self.flip = files.labels, files.mean, files.std, pad, flip
        images = []
        for path in files.paths:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert(files.mode)))
        pixels = np.stack(images)
        self.size = pixels.shape[1:3]
        around = ((0, 0), (pad, pad), (pad, pad), *([(0, 0)] * (pixels.ndim - 3)))
        self.pixels = np.pad(pixels, around).reshape(len(pixels), *(side + 2 * pad for side in self.size), -1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = self.pixels[index]
        if self.pad:
            top, left = (int(v) for v in torch.randint(0, 2 * self.pad + 1, (2,)))
            pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels[:, ::-1]
        pixels = (pixels.astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1), self.labels[index]


def unchanged(image: Image.Image) -> Image.Image:
    return image


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


def cropped_cifar(image: Image.Image) -> Image.Image:
    left, top = (int(v) for v in torch.randint(0, 9, (2,)))
    padded = Image.new("RGB", (40, 40))
    padded.paste(image, (4, 4))
    return mirrored(padded.crop((left, top, left + 32, top + 32)))


class CropImageNet:
    """A random 8 to 100 % of the area, of a ratio of sides from 3/4 to 4/3, at `size`; the first of 10 that fits."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        box = (0, 0, *image.size)
        for _ in range(10):
            area, turn, x, y = torch.rand(4).tolist()
            ratio = (3 / 4) ** (1 - 2 * turn)
            area = image.width * image.height * (0.08 + 0.92 * area)
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if width <= image.width and height <= image.height:
                left, top = int(x * (image.width - width + 1)), int(y * (image.height - height + 1))
                box = (left, top, left + width, top + height)
                break
        return mirrored(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box))


def pipeline(name: str, folder: Path, arguments: argparse.Namespace) -> tuple[Epoch, Dataset, int, dict[str, Any]]:
    """fastar's epochs, the files for DataLoader, the number of images, and facts for the line."""
    raw = folder / "raw"
    count = arguments.images or max(IMAGES[name], BATCHES * arguments.workers * arguments.batch)
    if name == "imagenet":
        if arguments.data_root is None:
            make_images(folder / "made", min(count, DIFFERENT))
        link_images(arguments.data_root or folder / "made", raw, count)
        begin = time.perf_counter()
        encoding, workers = PRESETS[arguments.preset], arguments.workers
        files = prepare("imagefolder", own_name=name, raw=raw, directory=folder, form=Form(encoding), workers=workers)
        written = sum(files.count(split) for split in ("train", "test"))
        data = StreamingDataset(files, "train", "cpu", size=arguments.size, threads=arguments.workers)
        facts = {
            "size": arguments.size,
            "preset": arguments.preset,
            "written_and_verified_per_s": round(written / (time.perf_counter() - begin), 1),
        }
        return (
            epochs(data, arguments.batch),
            Files(raw / "train", "RGB", CropImageNet(arguments.size)),
            len(data),
            facts,
        )
    spec = DATASETS[name]
    if arguments.data_root is not None and name != "digits":
        raw = arguments.data_root
    else:
        write_images(raw, spec.classes, (spec.height, spec.width), spec.channels, count)
    prepared = prepare(name, raw=None if name == "digits" else raw, directory=folder)
    held = load(prepared, "train", "cpu")
    coloured = spec.channels == 3
    plain = Files(raw / "train", "RGB" if coloured else "L", cropped_cifar if coloured else unchanged)
    if not len(plain):
        raise FastarError(f"{raw}/train: holds no images in class folders for DataLoader; give another --data-root")
    return epochs(held, arguments.batch), plain, len(held), {"size": spec.height}


def epochs(data: Any, batch: int) -> Epoch:
    return lambda number: data.batches(batch, seed=0, epoch=number, drop_last=False)


def write_images(root: Path, classes: tuple[str, ...], size: tuple[int, int], channels: int, count: int) -> None:
    """Random JPEGs in train/ and a few in test/."""
    generator = np.random.default_rng(0)
    for split, amount in (("train", count), ("test", 100)):
        for number in range(amount):
            shape = (*size, 3) if channels == 3 else size
            path = root / split / classes[number % len(classes)] / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path, quality=90)


def images_per_second(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    begin, seen = time.perf_counter(), 0
    for _, labels in batches:
        seen += len(labels)
    return seen / (time.perf_counter() - begin)


def measure(name: str, arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        epoch, files, count, facts = pipeline(name, Path(folder), arguments)
        batch, workers = arguments.batch, arguments.workers
        ways: dict[str, Epoch] = {"fastar": epoch, FILES: loader(files, batch, workers)}
        if name != "imagenet":
            held = DATASETS[name].augmentation
            memory = InMemory(files, held.pad, held.flip)
            ways |= {MEMORY: loader(memory, batch, workers), f"{MEMORY}, no workers": loader(memory, batch, 0)}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(1 + arguments.rounds):  # the first is a warm-up: compiling, starting processes
            for way in ways if number % 2 else reversed(ways):
                used = time.process_time()
                rate = images_per_second(ways[way](number))
                rates[way] += [rate] if number else []
                cpu[way] += [time.process_time() - used] if number else []
    common = {
        "data": "random images" if arguments.data_root is None else "images of --data-root",
        "batch": batch,
        "workers": workers,
        "threads": torch.get_num_threads(),
        **facts,
        "load": os.getloadavg()[0],
        **where(torch.device("cpu")),
    }
    counts = {way: count if way == "fastar" else len(files) for way in ways}
    for way, values in rates.items():
        record = {
            "bench": "loader",
            "pipeline": name,
            "case": way,
            "images_per_s": quantiles(values),
            "speed_up": quantiles([ours / theirs for ours, theirs in zip(rates["fastar"], values, strict=True)]),
            "n": arguments.rounds,
            "images": counts[way],
            **common,
        }
        print(json.dumps(record), flush=True)
    peer = max((way for way in ways if way != "fastar"), key=lambda way: statistics.median(rates[way]))
    both = {"ours": "fastar", "peer": peer}
    wall = {side: [1000 / rate for rate in rates[way]] for side, way in both.items()}
    processor = {side: [1000 * used / counts[way] for used in cpu[way]] for side, way in both.items()}
    known = peer.endswith("no workers")  # the time of workers' processors is not this one's
    text = f"1,000 images loaded and augmented ({name})"
    print(claim("loader", text, peer, wall, processor if known else None, **common), flush=True)


def loader(images: Dataset, batch: int, workers: int) -> Epoch:
    """Epochs of a DataLoader, whose workers stay."""
    made: DataLoader = DataLoader(images, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda number: made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--size", type=int, default=224, help="of ImageNet's crops")
    parser.add_argument("--preset", choices=PRESETS, default="rn50", help="of ImageNet's .beton")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.workers < 1 or arguments.batch < 1:
        raise FastarError("--rounds must be at least 2, --workers and --batch at least 1")
    if arguments.data_root is not None and len(arguments.pipeline) != 1:
        raise FastarError("--data-root belongs to one dataset: name it with --pipeline")
    torch.set_num_threads(arguments.workers)
    for name in arguments.pipeline:
        measure(name, arguments)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        sys.exit(f"error: {error}")
