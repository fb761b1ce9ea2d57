"""Run shipped configurations from end to end at the smallest scale, on made images: `make smoke`.

    python tools/smoke.py [CONFIG ...] [--today N] [--folder DIR]

Each is `fastar train-star --config CONFIG --scale smoke`: data conversion, sources, heldouts, star model, barriers,
report. Prints one line for each, with its seconds and those of the CPU (the first one's imports included); exit code
1 where one failed. The images are noise with a mark that tells the class: nothing is needed that does not ship. Of the
figures only that they are there, and finite, is looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import io
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastar.cli.main import main as fastar
from fastar.config import Settings, dataset_spec, load_settings
from fastar.config.recipes import names, recipe_path
from fastar.errors import FastarError

TRAIN, TEST = 400, 200
MOST_SECONDS = 60.0  # of CPU: how long that takes depends on what else runs


def marked(labels: np.ndarray, classes: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Noise uint8 [N, H, W, C], brighter in a square whose place says the class."""
    height, width, channels = shape
    images = np.random.default_rng(seed).integers(0, 150, (len(labels), height, width, channels), dtype=np.uint8)
    side = int(np.ceil(np.sqrt(classes)))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), side)
        image[
            row * height // side : (row + 1) * height // side, column * width // side : (column + 1) * width // side
        ] += 100
    return images


def make_folders(root: Path, classes: int, shape: tuple[int, int, int], test: str, suffix: str) -> None:
    """Class folders 0, 1, ... of image files in `root`/train and `root`/`test`."""
    for seed, (split, count) in enumerate((("train", TRAIN), (test, TEST))):
        labels = np.arange(max(count, classes)) % classes
        for number, (image, label) in enumerate(zip(marked(labels, classes, shape, seed), labels, strict=True)):
            path = root / split / str(label) / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def make_idx(root: Path, classes: int, shape: tuple[int, int, int]) -> None:
    """The four files of MNIST's format."""
    root.mkdir(parents=True)
    for seed, (stem, count) in enumerate((("train", TRAIN), ("t10k", TEST))):
        labels = (np.arange(count) % classes).astype(np.uint8)
        for part, array in (("images-idx3", marked(labels, classes, shape, seed)[..., 0]), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (root / f"{stem}-{part}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


def made_data(dataset: str, folder: Path) -> list[str]:
    """Options that make a run of `dataset` find made images, which are made if they are not in `folder` yet."""
    if dataset == "digits":  # scikit-learn carries it
        return []
    root = folder / "raw" / dataset
    if not root.is_dir():
        partial = root.with_name(f"{dataset}.partial")
        spec = dataset_spec(dataset)
        shape, classes = (spec.height, spec.width, spec.channels), spec.class_count or 2
        if spec.variable_size:
            make_folders(partial, classes, (90, 110, 3), "val", "JPEG")
        elif spec.reader == "idx":
            make_idx(partial, classes, shape)
        else:
            make_folders(partial, classes, shape, "test", "png")
        partial.rename(root)
    return ["--data-root", str(root)]


def converted(settings: Settings, folder: Path) -> Path:
    """Where the .beton files go: those of one set with another encoding are others."""
    return folder / "data" / (settings.dataset.encoding or "")


def missing(settings: Settings, results: dict[str, Any]) -> str:
    """What the results lack of what the settings ask for, or nothing."""
    if results["sources"] != settings.sources.number or results["heldout"] != settings.sources.heldout:
        return f"{results['sources']} sources and {results['heldout']} heldouts, {settings.sources} were asked for"
    for split in ("train", "test"):
        losses = {kind: results[split][kind]["mean"] for kind in ("star_source", "star_heldout")}
        losses |= {"star": results[split]["star_loss"], "regular": results[split]["regular_loss"]["mean"]}
        if settings.ends_matched:
            losses["regular_regular"] = results[split]["regular_regular"]["mean"]
        losses["regular_regular_unmatched"] = results[split]["regular_regular_unmatched"]["mean"]
        wrong = {what: value for what, value in losses.items() if value is None or not math.isfinite(value)}
        if wrong:
            return f"{split} figures that are missing or not finite: {wrong}"
    return ""


def smoke(name: str, folder: Path) -> str:
    """Run one configuration; what went wrong, or nothing."""
    settings = load_settings(file=recipe_path(Path(name)), scale="smoke")
    out, err = io.StringIO(), io.StringIO()
    arguments = ["train-star", "--config", name, "--scale", "smoke", "--json", "--out", str(folder / "runs" / name)]
    arguments += [*made_data(settings.dataset.name, folder), f"dataset.directory={converted(settings, folder)}"]
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            fastar(arguments)
        except SystemExit as stop:
            code = stop.code
    if code:
        return f"exit code {code}: {err.getvalue().strip()}"
    return missing(settings, json.loads(out.getvalue()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default: all")
    parser.add_argument("--today", type=int, metavar="N", help="only N of them, others every day")
    parser.add_argument("--folder", type=Path, help="keep data and runs here; default: a folder that is removed")
    options = parser.parse_args()
    chosen = [recipe_path(Path(name)).stem for name in options.configs] or names()
    if options.today is not None:
        if options.today < 1:
            raise FastarError(f"--today {options.today}: must be at least 1")
        start = datetime.date.today().toordinal() * options.today % len(chosen)
        chosen = [chosen[(start + n) % len(chosen)] for n in range(min(options.today, len(chosen)))]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="fastar-smoke-") as temporary:
        folder = options.folder or Path(temporary)
        for name in chosen:
            begin, work = time.perf_counter(), time.process_time()
            wrong = smoke(name, folder)
            seconds, work = time.perf_counter() - begin, time.process_time() - work
            failed += bool(wrong)
            slow = f" (more than {MOST_SECONDS:.0f})" if work > MOST_SECONDS else ""
            said = f"{name}: {seconds:.1f} s, {work:.1f} of CPU{slow}{' ' + wrong if wrong else ''}"
            print(f"{'FAIL' if wrong else 'ok  '} {said}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} configurations ran")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        sys.exit(main())
    except FastarError as error:
        sys.exit(f"smoke: {error}")
