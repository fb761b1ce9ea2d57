"""What a run is said to take: footprints against real steps, plans against their parts, and what does not fit."""

from __future__ import annotations

import doctest
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar, refused
from torch import nn
from torch.nn import functional as F

from fastar import config
from fastar.config import load_settings
from fastar.errors import FastarError
from fastar.experiments.context import Context
from fastar.experiments.plan import Plan, check_fits, make_plan
from fastar.matching import Group, Member, Symmetry, derive_symmetry, match_weights, working_bytes
from fastar.models import build_model
from fastar.runs import RunFolder
from fastar.training.footprint import Footprint, LiveBytes, evaluation_footprint, training_footprint

CPU = torch.device("cpu")
SHAPE = (3, 32, 32)
WIDTH = 0.125


def network() -> nn.Module:
    return build_model("resnet8", input_shape=SHAPE, classes=10, seed=0, width=0.5)


def test_bytes_are_counted_while_they_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[10:]
        assert live.now == 4000
        b = a + 1
        assert (live.now, live.peak) == (8000, 8000)
        del a
        assert live.now == 8000  # its view holds it
        del view
        assert live.now == 4000
        b.add_(1)  # in place: nothing new
        assert (live.now, live.peak) == (4000, 8000)
        del b
    assert (live.now, live.peak) == (0, 8000)


def test_footprint_by_hand() -> None:
    """Without gradients a layer's input and output live at once: 4 bytes of 100 and of 50 numbers an image."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 100), nn.Linear(100, 50), nn.Linear(50, 2))

    found = evaluation_footprint(build, (3, 2, 2))
    assert found.per_image == 4 * (100 + 50)
    assert found.of(10) == 10 * 4 * 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_footprint_is_that_of_real_steps(dtype: torch.dtype) -> None:
    """The straight line through two larger batches of no data, against 24 real images, gradients held throughout."""
    batch = 24
    model = network().train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if parameter.ndim > 1 else parameter.data
        parameter.grad = torch.zeros_like(parameter)
    images, labels = torch.randn(batch, *SHAPE).to(memory_format=torch.channels_last), torch.zeros(batch).long()
    with LiveBytes() as live:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
    found = training_footprint(network, SHAPE, dtype).of(batch)
    assert found == pytest.approx(live.peak, rel=0.02)  # fixed parts and the loss's own tensors round differently
    assert found > 24 * 4 * 16 * 32 * 32 * (1 if dtype == torch.float32 else 0.5)  # more than one layer's output


@functools.cache
def symmetry(width: float) -> Symmetry:
    """Derived once for all tests: it takes most of a plan's time."""
    model = build_model("resnet18", input_shape=SHAPE, classes=10, seed=0, width=width)
    return derive_symmetry(model, (torch.zeros(2, *SHAPE),))


def plan_of(tmp_path: Path, *overrides: str, measure: bool | None = None, **more: Any) -> Plan:
    """Of a ResNet-18 an eighth as wide, on CIFAR-10, which is not there."""
    own = ["device=cpu", f"dataset.directory={tmp_path}", f"model.width={WIDTH}"]
    settings = load_settings(dataset="cifar10", arch="resnet18", overrides=[*own, *overrides])
    context = Context(settings, RunFolder(tmp_path / "run"))
    context.__dict__["symmetry"] = symmetry(WIDTH)
    return make_plan(context, measure=measure, **more)


def test_gpu_memory_does_not_grow_with_the_sources(tmp_path: Path) -> None:
    plans = [plan_of(tmp_path, "gpu_memory=2GB", "sources.store=host", f"sources.number={n}") for n in (30, 500)]
    for phase in ("training", "matching"):
        assert plans[0].during("gpu", phase) == plans[1].during("gpu", phase)
    assert plans[1].during("gpu", "evaluation") <= plans[1].limits["gpu"]  # more models at a time, but as fit
    rows = [next(i.bytes for i in plan.items if i.what == "sources, pinned") for plan in plans]
    assert rows[1] > 10 * rows[0]
    held = [plan_of(tmp_path, "gpu_memory=2GB", "sources.store=device", f"sources.number={n}") for n in (30, 60)]
    row = 4 * 175_970  # fp32 parameters of ResNet-18 at an eighth of its width
    grown = held[1].during("gpu", "training") - held[0].during("gpu", "training")
    assert grown == pytest.approx(30 * row, rel=0.02)  # rows are padded


def test_reading_is_the_most_that_is_held_and_mapped_at_once(tmp_path: Path) -> None:
    """On a CPU a split lies where it is read into; each split's whole file is mapped meanwhile."""
    image, train, test = 3 * 32 * 32, 50_000, 10_000
    buffers = 5 * 1024 * image  # of FFCV's loader
    few = plan_of(tmp_path, "dataset.limit=500")
    small, normal = 500 * image * 5, test * image * 5  # bytes, and as floats
    assert few.during("host", "reading") == max(small + train * image, small + normal + test * image) + buffers
    for phase in ("training", "matching", "evaluation"):
        assert sum(i.bytes for i in few.items if (i.what, i.phase) == ("data set", phase)) == small + normal
    whole = plan_of(tmp_path)  # too many to be kept as floats
    assert whole.during("host", "reading") == train * image + normal + test * image + buffers
    again = plan_of(tmp_path, "dataset.limit=500", "evaluation.limit=400", "evaluation.test_limit=300")
    held = small + normal + 400 * image * 5
    assert again.during("host", "reading") == held + train * image + buffers
    elsewhere = plan_of(tmp_path, "gpu_memory=2GB")  # where a split leaves the host once it is read
    assert elsewhere.during("host", "reading") == 2 * train * image + buffers
    assert elsewhere.during("gpu", "reading") == 0


def test_work_is_all_epochs_and_all_models(tmp_path: Path) -> None:
    more = ("train.epochs=10", "sources.number=4", "sources.heldout=2", "gpu_memory=1GB")
    plan = plan_of(
        tmp_path, *more, "star.epochs=5", "evaluation.points=3", "star.match_every_epochs=0", images_per_second=1000
    )
    regular, star, own, evaluated = plan.work
    assert (regular.times, regular.seconds) == (60, 50.0)
    assert (star.times, star.seconds) == (5, 50.0)
    assert (own.times, own.seconds) == (7, 60.0)
    # Paths: 4 + 2 from the star, 10 pairs twice; one inner point each; ends: the star, 6 matched, the pairs' own.
    assert evaluated.times == 26 + 1 + 6 + 16
    assert evaluated.seconds == 110.0  # 50,000 for statistics, 50,000 and 10,000 for losses
    assert plan.seconds() == 60 * 50 + 5 * 50 + 7 * 60 + evaluated.times * 110
    slow = plan_of(
        tmp_path,
        *more,
        "evaluation.limit=1000",
        "evaluation.bn_batches=10",
        "star.match_every_epochs=0",
        images_per_second=1000,
        loader_images_per_second=500,
    )
    assert slow.work[0].seconds == 100.0
    assert slow.work[3].seconds == pytest.approx((1000 + 10_000 + 10 * 128) / 500)
    assert plan_of(tmp_path, *more).seconds() is None


def test_images_that_grow_are_counted_as_large_as_they_get(tmp_path: Path) -> None:
    """Epochs at 32, 48 (rounded to 64) and 64 of images that are measured at 96."""

    def planned(*overrides: str) -> Plan:
        own = ["device=cpu", f"dataset.directory={tmp_path}", "gpu_memory=2GB", "model.width=0.125", *overrides]
        settings = load_settings(dataset="imagenet", arch="imagenet-resnet18", overrides=[*own, "train.batch_size=16"])
        context = Context(settings, RunFolder(tmp_path / "run"))
        context.__dict__["symmetry"] = symmetry(WIDTH)
        return make_plan(context, measure=None)

    grow = ("train.epochs=3", "train.resolutions=[[0, 32], [2, 64]]", "train.schedule=cosine", "train.milestones=[]")
    growing, at_64, at_96 = (
        planned("dataset.resolution=96", *grow),
        planned("dataset.resolution=64", "train.epochs=3", *grow[2:]),
        planned("dataset.resolution=96", "train.epochs=3", *grow[2:]),
    )
    assert growing.during("gpu", "training") == at_64.during("gpu", "training")
    assert growing.during("gpu", "evaluation") == at_96.during("gpu", "evaluation")
    assert at_64.peak("gpu") < at_96.peak("gpu")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["gpu_memory=440MB", "train.batch_size=1024"],
            r"^gpu: training needs .*; train\.batch_size=\d+ makes it fit$",
        ),
        (["gpu_memory=440MB", "sources.store=device", "sources.number=600"], r"^gpu: training.*sources\.store=host"),
        (
            ["gpu_memory=700MB", "evaluation.batch_size=9000"],
            r"^gpu: evaluation .*a smaller evaluation\.batch_size",
        ),
        (["gpu_memory=10MB"], r"^gpu: \w+ needs .*; .*(smaller|batch_size)"),
        (["gpu_memory=10GB", "sources.number=10000000", "sources.store=file"], r"^disk: .*free some, choose --out on"),
    ],
)
def test_what_does_not_fit_names_what_would(tmp_path: Path, overrides: list[str], problem: str) -> None:
    plan = plan_of(tmp_path, *overrides)
    assert plan.problems
    assert any(re.search(problem, line) for line in plan.problems), plan.problems


def test_a_smaller_batch_that_is_named_does_fit(tmp_path: Path) -> None:
    small = ("gpu_memory=440MB",)
    line = next(p for p in plan_of(tmp_path, *small, "train.batch_size=1024").problems if "train.batch_size=" in p)
    named = line.split("train.batch_size=")[1].split()[0]
    left = plan_of(tmp_path, *small, f"train.batch_size={named}")
    assert left.during("gpu", "training") <= left.limits["gpu"]


def test_a_run_that_does_not_fit_is_refused_early(tmp_path: Path) -> None:
    common = ("--dataset", "digits", "--out", tmp_path / "run", f"dataset.directory={tmp_path / 'data'}", "device=cpu")
    line = refused("train-star", *common, "--quiet", "--gpu-memory", "1KB")
    assert "this run does not fit: gpu: " in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(FastarError, match="does not fit"):
        check_fits(Context(load_settings(dataset="digits", overrides=["gpu_memory=1KB"]), RunFolder(tmp_path)))


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    place = f"dataset.directory={tmp_path}"
    shown = fastar("plan", "--dataset", "digits", place, "device=cpu")
    assert shown.code == 0, shown.err
    for said in (
        "images/s of training",
        "epoch of a regular model",
        "point of a path",
        "in all",
        "host: data set",
        "disk: 36 models",
    ):
        assert said in shown.out, said
    assert list(tmp_path.iterdir()) == []  # nothing is written
    many = fastar("plan", "--dataset", "digits", place, "--gpu-memory", "1KB", "--json")
    assert many.code == 1
    plan = json.loads(many.out)
    assert plan["limits"]["gpu"] == 1000
    assert plan["problems"]
    assert max(plan["needed"]["gpu"].values()) > 1000
    assert "is not a size" in refused("plan", "--dataset", "digits", "--gpu-memory", "40XB")
    assert "must be above 0" in refused("plan", "--dataset", "digits", place, "--images-per-second", 0)
    assert "not written yet" in refused("plan", "--dataset", "imagefolder", "--name", "mine", place)


def test_memory_of_matching() -> None:
    members = (Member("a", 0), Member("b", 1))
    groups = Symmetry((Group("hidden", 10, members),), {"a": (10, 3), "b": (4, 10), "c": (4, 10)}, tied={"c": "b"})
    one = 4 * (30 + 40) + 2 * 4 * 40 + 8 * 10**2  # as permuted so far; what a step holds; two tables in float32
    assert working_bytes(groups, 50, 10**9, gpu=True, threads=2) == 50 * one
    assert working_bytes(groups, 1, 10**9, gpu=True, threads=2) == one
    assert working_bytes(groups, 50, 4 * 3 * one, gpu=True, threads=2) == 2 * 3 * one  # two chunks of three: half
    assert working_bytes(groups, 50, 0, gpu=True, threads=2) == 2 * one
    assert working_bytes(groups, 50, 0, gpu=False, threads=3) == 3 * one


@pytest.mark.parametrize("count", [1, 4])
def test_memory_of_matching_is_what_is_taken(count: int) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        return build_model("resnet18", input_shape=SHAPE, classes=10, seed=seed, width=WIDTH).state_dict()

    groups, theta = symmetry(WIDTH), {name: value.detach() for name, value in state(0).items()}
    rows = [state(1 + n) for n in range(count)]
    sources = {name: torch.stack([row[name] for row in rows]) for name in groups.parameters}
    with LiveBytes() as live:
        match_weights(groups, theta, sources, chunk=count, threads=1)
    # As one chunk: what a GPU's lane takes with so many.
    planned = count * working_bytes(groups, 1, 0, gpu=False, threads=1)
    assert live.peak == pytest.approx(planned, rel=0.2)  # which parts a step moves differs from source to source


def test_sizes() -> None:
    assert doctest.testmod(config).failed == 0
    assert [config.parse_bytes(text) for text in ("40GB", "40 GiB", "512mb")] == [40 * 10**9, 40 * 2**30, 512 * 10**6]
    for text in ("", "GB", "-1GB", "0GB", "1PB", "infGB", "nanGB"):
        with pytest.raises(FastarError, match=r"not a size|above 0"):
            config.parse_bytes(text)


def test_no_images_no_negative_bytes() -> None:
    assert Footprint(-5.0, 1.0).of(2) == 0
