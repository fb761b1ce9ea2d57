#!/usr/bin/env python3
"""Convert a raw dataset to FFCV's .beton files: OUT/NAME/train.beton, test.beton and metadata.json."""

import argparse
import sys
from pathlib import Path

from fastar.data import DATASETS, prepare
from fastar.errors import FastarError
from fastar.progress import TerminalProgress

EXAMPLES = """\
examples:
  python tools/write_ffcv.py --dataset digits --out betons
  python tools/write_ffcv.py --dataset fashion-mnist --out betons          (Debian's dataset-fashion-mnist is found)
  python tools/write_ffcv.py --dataset cifar10 --source cifar-10-python.tar.gz --out betons
  python tools/write_ffcv.py --dataset cifar10 --source FOLDER --out betons --workers 4 --limit 10000

FOLDER may hold CIFAR python pickles, CIFAR binary files or their archives, IDX files (plain or gzipped), or
train/CLASS/*.jpg and test/CLASS/*.jpg. What is already written and matches is kept; what differs is refused.
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--dataset", required=True, metavar="NAME", help=f"one of: {', '.join(DATASETS)}")
    result.add_argument(
        "--source", "--data-root", type=Path, metavar="DIR", help="raw data; default: where it usually lies"
    )
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write OUT/NAME/ in")
    result.add_argument("--workers", type=int, default=2, metavar="N", help="writer processes (default 2)")
    result.add_argument("--limit", type=int, metavar="N", help="at most N images per split, classes balanced")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        files = prepare(
            options.dataset,
            data_root=options.source,
            directory=options.out,
            workers=options.workers,
            progress=TerminalProgress(),
            limit=options.limit,
        )
    except FastarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished was left behind", file=sys.stderr)
        return 130
    counts = ", ".join(f"{split} {count}" for split, count in files.metadata["counts"].items())
    print(f"{files.train.parent}: {counts}; digest {files.digest[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
