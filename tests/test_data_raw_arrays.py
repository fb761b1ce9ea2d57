"""Raw arrays are what .beton files of the same raw data are: samples, order, normalisation, digest."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import arrays, raw_dataset

from fastar.config import DATASETS
from fastar.data.convert import prepare
from fastar.data.in_memory import load
from fastar.data.raw.raw_split import ArraySplit
from fastar.data.raw_arrays import RawArrays, read_raw, stands_in
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_raw_arrays_are_what_the_files_are(name: str, tmp_path: Path) -> None:
    raw = raw_dataset(name)
    files, found = prepare(name, directory=tmp_path, raw=raw), RawArrays(DATASETS[name], raw)
    for key in ("name", "digest", "classes", "mean", "std", "augmentation"):
        assert getattr(found, key) == getattr(files, key), key
    assert found.count("train") == files.count("train")
    for split, validation in (("train", 0.2), ("validation", 0.2), ("test", 0.0)):
        one, other = (
            load(source, split, "cpu", validation=validation, limit=10).batches(5, seed=1, epoch=2)
            for source in (found, files)
        )
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])


def test_they_stand_in_where_ffcv_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stands_in(DATASETS["digits"])
    monkeypatch.setitem(sys.modules, "ffcv", None)
    assert stands_in(DATASETS["digits"])
    assert not stands_in(DATASETS["imagenet"])
    assert read_raw(DATASETS["digits"], None, SILENT).count("train") == 1437


def test_images_of_another_size_are_refused() -> None:
    raw, spec = raw_dataset("mnist"), DATASETS["mnist"]
    other = ArraySplit(*arrays(20, (8, 8, 1), 10), raw.test.classes, "made-up test")
    with pytest.raises(FastarError, match=r"made-up test, sample 0: image is uint8 \[8, 8, 1\]"):
        RawArrays(spec, replace(raw, test=other))
    flat = ArraySplit(np.zeros((20, 28, 28, 1), np.uint8), np.arange(20) % 10, raw.test.classes, "made-up train")
    with pytest.raises(FastarError, match="mnist train: every image is one flat colour"):
        RawArrays(spec, replace(raw, train=flat))
