"""Turn raw images into .beton files that FFCV reads, ahead of training (fastar does it by itself when it must)."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastar.cli.failure import failure
from fastar.config import DATASETS, dataset_spec, variable_size_names
from fastar.data.encode import PRESETS, Encoding
from fastar.errors import FastarError, printable
from fastar.runtime.progress import Progress, TerminalProgress, size_text
from fastar.runtime.signals import Stopped, signals_stop
from fastar.runtime.standard_streams import say, streams

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles

EXAMPLES = """examples:
  python tools/write_ffcv.py --dataset digits --out betons
  python tools/write_ffcv.py --dataset cifar10 --source cifar-10-python.tar.gz --out betons
  python tools/write_ffcv.py --dataset cifar10 --source FOLDER --out betons --workers 4
  python tools/write_ffcv.py --dataset imagenet --source ARCHIVES --out betons --workers 16 --preset rn18
  python tools/write_ffcv.py --dataset imagefolder --name flowers --source FOLDER --out betons --on-error skip
  python tools/write_ffcv.py --dataset imagefolder --name flowers --source CLASSES --out betons --val-share 0.1

FOLDER may hold CIFAR python pickles, CIFAR binary files or their archives, IDX files (plain or gzipped), or
train/CLASS/*.jpg and test/CLASS/*.jpg. For imagenet and imagefolder it holds train/CLASS/*.JPEG and val/CLASS/*.JPEG;
ARCHIVES holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which are read where
they lie. CLASSES holds CLASS/*.jpg alone. Folders below a class's are looked into; Tiny-ImageNet's val/images with
val_annotations.txt is read as it is; what is no image is passed over and named. What is already written and matches is
kept; what differs is refused.
"""

MEANINGS = {
    "rn50": "FFCV's for ResNet-50, the default",
    "rn18": "FFCV's for ResNet-18",
    "jpeg": "FFCV's JPEG benchmark",
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(DATASETS)
    result.add_argument("--dataset", required=True, metavar="NAME", help=f"one of: {names}")
    result.add_argument("--name", metavar="NAME", help="what your imagefolder is called: its files go to OUT/NAME/")
    result.add_argument(
        "--source", "--data-root", type=Path, metavar="DIR", help="raw data; default: where it usually lies"
    )
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write OUT/NAME/ in")
    result.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that encode images of any size (default 2)"
    )
    result.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="at most N images per split, classes balanced: to try it out; training refuses such files, and has "
        "dataset.limit of its own",
    )
    images = result.add_argument_group(f"of {' and '.join(variable_size_names())}")
    presets = "; ".join(
        f"{name}: {preset.max_resolution} pixels, {preset.compress_probability:.0%} as JPEG of quality "
        f"{preset.jpeg_quality} ({MEANINGS[name]})"
        for name, preset in PRESETS.items()
    )
    images.add_argument("--preset", choices=PRESETS, help=presets.replace("%", "%%"))
    images.add_argument("--max-resolution", type=int, metavar="N", help="longer side at most; 0: as it is")
    images.add_argument(
        "--compress-probability", type=float, metavar="P", help="share stored as JPEG; the rest is raw: larger, faster"
    )
    images.add_argument("--jpeg-quality", type=int, metavar="Q", help="1 to 100")
    images.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="an image that cannot be used: stop with its path (default), or leave it out and list it in the metadata",
    )
    images.add_argument(
        "--val-share",
        type=float,
        metavar="SHARE",
        help="of imagefolder, where DIR holds class folders and no train/ and val/: this share of each class is for "
        "testing, chosen by a hash of CLASS/FILE, such as 0.1",
    )
    images.add_argument(
        "--exif",
        choices=("ignore", "apply"),
        help="EXIF orientation: pixels as they are stored (default, as torchvision), or turned as it says",
    )
    images.add_argument(
        "--order",
        choices=("shuffled", "sorted"),
        help="of the images in the file: shuffled (default; needed by dataset.order=pages), or sorted by class, which "
        "reads a slow disk front to back",
    )
    return result


def encoding(options: argparse.Namespace) -> Encoding | None:
    """The encoding that was asked for, over the preset that was named; None: nothing was."""
    keys = ("max_resolution", "compress_probability", "jpeg_quality")
    changes = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    if options.preset is None and not changes:
        return None
    if "max_resolution" in changes:
        changes["max_resolution"] = changes["max_resolution"] or None
    return Encoding(**{**vars(PRESETS[options.preset or "rn50"]), **changes})


def convert(options: argparse.Namespace, progress: Progress) -> DatasetFiles:
    from fastar.data.convert import Form, prepare  # only here, where signals are heard: it takes seconds

    variable = dataset_spec(options.dataset).variable_size
    for key, value in vars(options).items():
        if not variable and value is not None and key not in ("dataset", "source", "out", "workers", "limit"):
            names = " and ".join(variable_size_names())
            raise FastarError(f"--{key.replace('_', '-')} belongs to {names}; leave it out")
    if variable and (options.name is not None) != (options.dataset == "imagefolder"):
        raise FastarError("--dataset imagefolder needs --name NAME, and no other dataset takes one")
    if options.name is not None and (options.name in DATASETS or Path(options.name).name != options.name):
        raise FastarError(f"--name {options.name}: is another dataset's, or not a plain name; choose one of your own")
    if options.val_share is not None and options.dataset != "imagefolder":
        raise FastarError("--val-share belongs to imagefolder; leave it out")
    return prepare(
        options.dataset,
        directory=options.out,
        raw=options.source,
        own_name=options.name,
        form=Form(
            encoding(options),
            shuffled=None if options.order is None else options.order == "shuffled",
            val_share=options.val_share,
            exif=options.exif,
            on_error=options.on_error or "stop",
        ),
        limit=options.limit,
        workers=options.workers,
        progress=progress,
    )


def main(arguments: list[str] | None = None) -> int:
    with streams():
        options = parser().parse_args(arguments)
        try:
            with signals_stop((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), once=True):
                files = convert(options, TerminalProgress())
            show(files)
            sys.stdout.flush()
        except Stopped as stopped:
            say(f"{stopped.reason}; nothing unfinished was left behind")
            return 128 + stopped.number
        except Exception as error:  # noqa: BLE001  # the last to see it
            line, code = failure(error)
            say(f"error: {line}")
            return code
        return 0


def show(files: DatasetFiles) -> None:
    counts = ", ".join(f"{split} {count}" for split, count in files.metadata["counts"].items())
    size = size_text(sum(entry["bytes"] for entry in files.metadata["files"].values()))
    print(f"{printable(str(files.folder))}: {counts}; digest {files.digest[:12]}; {size}")
    if files.metadata["settings"]["limit"] is not None:
        print("written with --limit: training refuses these files; dataset.limit takes a part of whole ones")
    for split, skipped in files.skipped.items():
        for image in skipped:
            print(f"left out of {split}: {printable(image['path'])}: {image['reason']}")


if __name__ == "__main__":
    sys.exit(main())
