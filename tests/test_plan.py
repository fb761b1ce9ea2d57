"""What a run is said to take: footprints against real steps, plans against their parts, and what does not fit."""

from __future__ import annotations

import doctest
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import fastar, refused
from PIL import Image
from session_cases import with_symmetry
from torch import nn
from torch.nn import functional as F

from fastar import config
from fastar.config import load_settings
from fastar.data import PRESETS, Encoding
from fastar.errors import FastarError
from fastar.evaluation.forward import forward_bytes
from fastar.experiments import facts, hours, needs
from fastar.experiments import plan as plan_room
from fastar.experiments.plan import Plan, check_fits, make_plan
from fastar.experiments.session import Session, new_session, with_shape
from fastar.experiments.task import Shape
from fastar.matching import MatchResult, match, match_weights, working_bytes
from fastar.models import build_model
from fastar.runs import RunFolder
from fastar.runtime.footprint import Footprint, LiveBytes
from fastar.runtime.progress import SilentProgress
from fastar.symmetry import Group, Member, Symmetry, derive_symmetry
from fastar.training.footprint import training_footprint

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

    found = forward_bytes(build(), (3, 2, 2), 32).one
    assert found.per_image == 4 * (100 + 50)
    assert found.of(10) == 10 * 4 * 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arch", "width"), [("resnet8", 0.5), ("mlp", 256)])
def test_footprint_is_that_of_real_steps(dtype: torch.dtype, arch: str, width: float) -> None:
    """On the line between two counts without data, against real images: where activations are most of it, and where
    the new gradients are."""

    def build() -> nn.Module:
        return build_model(arch, input_shape=SHAPE, classes=10, seed=0, width=width)

    model, counted = build().train(), training_footprint(build, SHAPE, dtype, 48)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if parameter.ndim > 1 else parameter.data
    for batch in (24, 48):
        images, labels = torch.randn(batch, *SHAPE).to(memory_format=torch.channels_last), torch.zeros(batch).long()
        model.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
        assert counted.of(batch) == pytest.approx(live.peak, rel=0.005)  # the loss's own tensors are of a few bytes
    assert all(not parameter.is_meta and parameter.device == CPU for parameter in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert live.peak > (weights if arch == "mlp" else 48 * 4 * 16 * 32 * 32 * dtype.itemsize // 4)


def test_counting_leaves_a_network_as_it_was() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward_bytes(model, SHAPE, 32)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@functools.cache
def symmetry(width: float) -> Symmetry:
    """Derived once for all tests: it takes most of a plan's time."""
    model = build_model("resnet18", input_shape=SHAPE, classes=10, seed=0, width=width)
    return derive_symmetry(model, (torch.zeros(2, *SHAPE),))


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """Footprints of one network are counted once for all plans."""
    known: dict[tuple[Any, ...], Any] = {}
    training, forward = plan_room.training_footprint, plan_room.forward_bytes

    def once(count: Any, model: nn.Module, given: Any, *more: Any) -> Any:
        key = (count, sum(p.numel() for p in model.parameters()), *more)
        if key not in known:
            known[key] = count(given, *more)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_room, "training_footprint", lambda build, *more: once(training, build(), build, *more))
        patch.setattr(plan_room, "forward_bytes", lambda model, *more: once(forward, model, model, *more))
        yield


def plan_of(tmp_path: Path, *overrides: str, measure: bool | None = None, **more: Any) -> Plan:
    """Of a ResNet-18 an eighth as wide, on CIFAR-10, which is not there."""
    own = ["device=cpu", f"dataset.directory={tmp_path}", f"model.width={WIDTH}"]
    settings = load_settings(dataset="cifar10", arch="resnet18", overrides=[*own, *overrides])
    context = new_session(settings, RunFolder(tmp_path / "run"))
    return make_plan(with_symmetry(context, symmetry(WIDTH)), measure=measure, **more)


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
    small, normal = 500 * (image * 5 + 16), test * (image * 5 + 16)  # bytes, and as floats; labels and places
    assert few.during("host", "reading") == max(small + train * image, small + normal + test * image) + buffers
    for phase in ("training", "matching", "evaluation"):
        assert sum(i.bytes for i in few.items if (i.what, i.phase) == ("data set", phase)) == small + normal
    whole = plan_of(tmp_path)  # too many to be kept as floats
    assert whole.during("host", "reading") == train * (image + 16) + normal + test * image + buffers
    again = plan_of(tmp_path, "dataset.limit=500", "evaluation.limit=400", "evaluation.test_limit=300")
    held = small + normal + 400 * (image * 5 + 16)
    assert again.during("host", "reading") == held + train * image + buffers
    elsewhere = plan_of(tmp_path, "gpu_memory=2GB")  # where a split leaves the host once it is read
    assert elsewhere.during("host", "reading") == train * (2 * image + 16) + buffers
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
        context = new_session(settings, RunFolder(tmp_path / "run"))
        return make_plan(with_symmetry(context, symmetry(WIDTH)), measure=None)

    grow = ("train.epochs=3", "train.resolutions=[[0, 32], [2, 64]]", "train.schedule=cosine", "train.milestones=[]")
    growing, at_64, at_96 = (
        planned("dataset.resolution=96", *grow),
        planned("dataset.resolution=64", "train.epochs=3", *grow[2:]),
        planned("dataset.resolution=96", "train.epochs=3", *grow[2:]),
    )
    assert growing.during("gpu", "training") == at_64.during("gpu", "training")
    assert growing.during("gpu", "evaluation") == at_96.during("gpu", "evaluation")
    assert at_64.peak("gpu") < at_96.peak("gpu")


GPU = "gpu_memory=800MB"


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        ((GPU, "train.batch_size=1024"), "gpu: training needs", {"train.batch_size"}),
        ((GPU, "sources.store=device", "sources.number=600"), "gpu: training needs", {"sources.store"}),
        ((GPU, "evaluation.batch_size=9000"), "gpu: evaluation needs", {"evaluation.batch_size"}),
        ((GPU, "evaluation.batch_size=9000", "sources.store=device", "sources.number=600"), "gpu: training needs",
         {"sources.store", "evaluation.batch_size"}),
        ((GPU, "train.batch_size=1024", "sources.store=device", "sources.number=600"), "gpu: training needs",
         {"sources.store", "train.batch_size"}),
        (("gpu_memory=1200MB", "train.graph=true", "train.drop_last=false", "train.batch_size=1536"),
         "gpu: training needs", {"train.graph"}),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_what_does(
    tmp_path: Path, overrides: tuple[str, ...], problem: str, remedy: set[str]
) -> None:
    """One setting, or two where each alone would not do; and with them it fits."""
    lines = [line for line in plan_of(tmp_path, *overrides).problems if line.startswith(problem)]
    assert len(lines) == 1
    found = re.fullmatch(r"gpu: \w+ needs [\d.]+ [GM]B, [\d.]+ [GM]B are there; (.*) makes it fit", lines[0])
    assert found is not None, lines
    named = found[1].split()
    assert {one.partition("=")[0] for one in named} == remedy
    assert plan_of(tmp_path, *overrides, *named).problems == []
    if len(named) == 2:
        assert all(plan_of(tmp_path, *overrides, one).problems for one in named)


def test_a_full_disk_hides_no_remedy(tmp_path: Path) -> None:
    lines = plan_of(tmp_path, GPU, "train.batch_size=1024", "sources.number=10000000", "sources.store=file").problems
    assert any(line.startswith("disk: ") for line in lines)
    assert any(re.fullmatch(r"gpu: training .*; train.batch_size=\d+ makes it fit", line) for line in lines), lines


def test_on_a_cpu_sources_on_the_host_are_all_in_memory(tmp_path: Path) -> None:
    few, many = (
        plan_of(tmp_path, "sources.store=host", f"sources.number={number}").during("host", "training")
        for number in (3, 13)
    )
    assert many - few == pytest.approx(10 * 4 * 175_970, rel=0.02)  # rows are padded
    part = plan_of(tmp_path, "sources.store=file", "sources.number=13")
    assert all(i.bytes == 0 for i in part.items if i.what.startswith("matching: 13 sources"))  # in place


def test_what_nothing_makes_fit_says_so(tmp_path: Path) -> None:
    lines = plan_of(tmp_path, "gpu_memory=10MB").problems
    assert all(
        re.fullmatch(r"gpu: \w+ needs .*no smaller batch makes it fit; use a smaller network.*", one) for one in lines
    )
    assert {line.split()[1] for line in lines} == {"training", "matching", "evaluation"}
    disk = plan_of(tmp_path, "gpu_memory=10GB", "sources.number=10000000", "sources.store=file").problems
    assert any(re.match(r"disk: .*free some, choose --out on", line) for line in disk)


def test_a_part_of_the_sources_at_a_time_is_what_matching_holds(tmp_path: Path) -> None:
    copies = [
        next(
            i.bytes for i in plan_of(tmp_path, "gpu_memory=4GB", *more).items if i.what == "matching: copies and scores"
        )
        for more in ((), ("matching.chunk=1",), ("matching.chunk=3",))
    ]
    assert copies[2] == 3 * copies[1]
    assert copies[0] > copies[2]  # half of the sources in each of two chunks


def test_a_graph_keeps_its_memory_while_sources_are_matched(tmp_path: Path) -> None:
    eager, graph, short = (
        plan_of(tmp_path, "gpu_memory=4GB", "train.batch_size=2048", *more)
        for more in ((), ("train.graph=true",), ("train.graph=true", "train.drop_last=false"))
    )
    batch = 2048 * 4 * 3 * 32 * 32
    step = next(i.bytes for i in eager.items if i.what == needs.ACTIVATIONS)
    pool = next(i.bytes for i in graph.items if (i.what, i.phase) == (needs.POOL, "matching"))
    assert pool == step + batch
    gap = graph.during("gpu", "matching") - eager.during("gpu", "matching")
    workspaces = needs.CUBLAS_OF_A_GRAPH * needs.CUBLAS_BYTES
    assert gap == pytest.approx(pool + workspaces, rel=0.01)  # less of what is free for copies
    extra = {i.what: i.bytes for i in short.items if i.phase == "training"}[needs.SHORT]
    assert extra == pytest.approx(step * (50_000 % 2048) / 2048, rel=0.01)  # a second set of activations
    between = {i.what: i.bytes for i in graph.items if i.phase == "training"}[needs.BETWEEN]
    assert 0 < between < extra  # another moment
    assert short.during("gpu", "training") - graph.during("gpu", "training") == extra - between
    assert short.during("gpu", "matching") == graph.during("gpu", "matching")


def test_a_gpu_holds_as_many_models_as_fit_beside_the_activations(tmp_path: Path) -> None:
    def rows(memory: str) -> int:
        plan = plan_of(tmp_path, f"gpu_memory={memory}", "evaluation.batch_size=2000", "sources.number=300")
        assert plan.problems == []
        what = next(i.what for i in plan.items if i.phase == "evaluation" and i.what.endswith("models at a time"))
        return int(what.split()[0])

    assert 1 <= rows("900MB") < rows("1200MB") < rows("2GB")


def test_a_run_that_does_not_fit_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("--dataset", "digits", "--out", tmp_path / "run", f"dataset.directory={tmp_path / 'data'}", "device=cpu")
    monkeypatch.setattr(plan_room, "free_bytes", lambda device: 1000)
    line = refused("train-star", *common, "--quiet")
    assert "this run does not fit: host: " in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(FastarError, match="does not fit"):
        check_fits(new_session(load_settings(dataset="digits", overrides=["device=cpu"]), RunFolder(tmp_path)))


def test_a_run_on_a_cpu_is_checked_against_the_cpu(tmp_path: Path) -> None:
    """Whatever GPU its settings speak of; `fastar plan` plans for that one."""
    said: list[str] = []

    class Lines(SilentProgress):
        def line(self, text: str) -> None:
            said.append(text)

    overrides = ["device=cpu", "gpu_memory=1KB", f"dataset.directory={tmp_path}"]
    context = new_session(load_settings(dataset="digits", overrides=overrides), RunFolder(tmp_path / "run"), Lines())
    plan = check_fits(context)
    assert "gpu" not in plan.limits
    assert plan.peak("host") > 1000
    assert said == ["gpu_memory=1KB: this run is on the CPU, where it bounds nothing"]
    assert make_plan(context, measure=None).limits["gpu"] == 1000


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
    unwritten = refused("plan", "--dataset", "imagefolder", "--name", "mine", place)
    assert re.search(
        r"not written yet; `python tools/\S+ --dataset imagefolder --name mine --source FOLDER --out .+`", unwritten
    )
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == ["planning"] * 3
    assert fastar("plan", "--dataset", "digits", place, "device=cpu", "--quiet").err == ""
    elsewhere = fastar("plan", "--dataset", "digits", place, "device=cpu", "--gpu-memory", "1GB")
    assert "time: not known (give --images-per-second: " in " ".join(elsewhere.out.split())


def written_images(tmp_path: Path) -> Session:
    """A run of a set of 40 images in two classes, written."""
    for split, count in (("train", 40), ("val", 4)):
        for number in range(count):
            path = tmp_path / "raw" / split / f"c{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 24, 3), 5 * number, np.uint8)).save(path)
    own = [f"dataset.directory={tmp_path / 'betons'}", f"dataset.root={tmp_path / 'raw'}", "dataset.own_name=made"]
    more = ["dataset.resolution=16", "model.width=0.25", "train.batch_size=4", "device=cpu", "workers=1"]
    settings = load_settings(dataset="imagefolder", arch="resnet8", overrides=[*own, *more])
    context = new_session(settings, RunFolder(tmp_path / "run"))
    assert len(context.data.files.classes) == 2
    return context


def test_loading_is_timed_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = written_images(tmp_path)
    loaded, seen = hours.loaded_per_second, []
    monkeypatch.setattr(hours, "loaded_per_second", lambda context: seen.append(loaded(context)) or 8.0)
    monkeypatch.setattr(hours, "matching_seconds", lambda context: 0.0)
    slow = make_plan(context, images_per_second=20)
    assert "loading 8 images/s measured here" in slow.rates
    assert slow.work[0].seconds == 40 / 8
    assert 0 < seen[0] < float("inf")
    stated = make_plan(context, images_per_second=20, loader_images_per_second=10)
    assert (stated.work[0].seconds, len(seen)) == (40 / 10, 1)
    assert make_plan(context, measure=None).work[0].seconds is None
    assert len(seen) == 1


def test_what_sources_units_do_is_planned_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is kept, and how long a source takes once it is."""
    found = []

    def recorded(*args: Any, **kwargs: Any) -> MatchResult:
        found.append((kwargs["activations"], match(*args, **kwargs)))
        return found[-1][1]

    monkeypatch.setattr(hours, "match", recorded)
    by_weights = {item.what for item in make_plan(cifar(tmp_path, "matching.method=weight"), measure=None).items}
    kept = {}
    for store in ("device", "file"):
        context = cifar(tmp_path, "matching.method=activation", f"sources.store={store}", "sources.number=6")
        plan = make_plan(context, measure=None)
        more = {item.what: item for item in plan.items if item.what not in by_weights}
        (kept[store],) = (item for what, item in more.items() if what.startswith("what sources' units do"))
    each = hours.matching_seconds(context)
    seen, result = found[0]
    assert each > result.seconds  # of the one; looking at theta, which was done before, is shared by six
    assert seen.theta is not None
    assert 6 * seen.cache.rows.nbytes == kept["device"].bytes == kept["file"].bytes
    assert (kept["device"].place, kept["file"].place) == ("host", "disk")


def cifar(tmp_path: Path, *more: str) -> Session:
    """A narrow ResNet-18 on a CPU."""
    own = ["device=cpu", f"dataset.directory={tmp_path}", f"model.width={WIDTH}", *more]
    context = new_session(load_settings(dataset="cifar10", arch="resnet18", overrides=own), RunFolder(tmp_path / "run"))
    return with_symmetry(with_shape(context, Shape(SHAPE, 10)), symmetry(WIDTH))


def test_matching_is_timed_on_sources_that_have_to_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = cifar(tmp_path)
    found = []

    def recorded(*args: Any, **kwargs: Any) -> MatchResult:
        found.append(match(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(hours, "match", recorded)
    assert hours.matching_seconds(context) == found[0].seconds
    moves = found[0].permutations
    moved = [int((index != torch.arange(index.shape[1])).sum()) for index in moves.values()]
    # All that were put elsewhere find their places again: a tenth, and in small groups two.
    assert sum(moved) == sum(max(2, round(hours.MOVED * index.shape[1])) for index in moves.values())


def test_sizes_of_imagenet_s_files_lie_between_those_that_are_published() -> None:
    assert doctest.testmod(facts).failed == 0
    sizes = {name: facts.published_gigabytes(preset) for name, preset in PRESETS.items()}
    assert sizes["jpeg"] == pytest.approx(65.47)
    assert 0.9 * 371 + 4 < (sizes["rn18"] or 0) < 0.9 * 616  # mostly raw, at 384 to 512 pixels
    assert (371 + 40) / 2 < (sizes["rn50"] or 0) < (616 + 65.5) / 2  # half of it
    assert facts.published_gigabytes(Encoding(400, 0.5, 80)) is None
    assert facts.published_gigabytes(Encoding(None, 0.5, 90)) is None


def test_memory_of_matching() -> None:
    members = (Member("a", 0), Member("b", 1))
    groups = Symmetry((Group("hidden", 10, members),), {"a": (10, 3), "b": (4, 10), "c": (4, 10)}, tied={"c": "b"})
    one = 4 * (30 + 40) + 2 * 4 * 40 + 8 * 10**2  # as permuted so far; what a step holds; two tables in float32
    assert working_bytes(groups, 50, 10**9, gpu=True, threads=2) == 50 * one
    assert working_bytes(groups, 1, 10**9, gpu=True, threads=2) == one
    assert working_bytes(groups, 50, 4 * 3 * one, gpu=True, threads=2) == 2 * 3 * one  # two chunks of three: half
    assert working_bytes(groups, 50, 0, gpu=True, threads=2) == 2 * one
    assert working_bytes(groups, 50, 0, gpu=False, threads=3) == 3 * one
    kicked = one + 3 * 4 * 10**2  # a third table to go back to; the noise, and what it makes of the first
    assert working_bytes(groups, 50, 10**9, gpu=True, threads=2, kicks=1) == 50 * kicked


@pytest.mark.parametrize("ways", [{}, {"kicks": 2}, {"orders": 2}, {"orders": 2, "kicks": 2}], ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_memory_of_matching_is_what_is_taken(count: int, ways: dict[str, int]) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        return build_model("resnet18", input_shape=SHAPE, classes=10, seed=seed, width=WIDTH).state_dict()

    groups, theta = symmetry(WIDTH), {name: value.detach() for name, value in state(0).items()}
    rows = [state(1 + n) for n in range(count)]
    sources = {name: torch.stack([row[name] for row in rows]) for name in groups.parameters}
    with LiveBytes() as live:
        match_weights(groups, theta, sources, chunk=count, threads=1, **ways)
    # As one chunk: what a GPU's lane takes with so many.
    planned = count * working_bytes(groups, 1, 0, gpu=False, threads=1, kicks=ways.get("kicks", 0))
    # Which parts a step moves differs from source to source; what is planned is enough.
    assert 0.8 * planned < live.peak <= planned


def test_kicks_are_planned(tmp_path: Path) -> None:
    taken = [
        next(
            i.bytes
            for i in plan_of(tmp_path, "gpu_memory=4GB", f"matching.perturbations={kicks}").items
            if i.what == "matching: copies and scores"
        )
        for kicks in (0, 1, 5)
    ]
    tables = [4 * group.size**2 for group in symmetry(WIDTH).groups]
    assert taken[1] - taken[0] == 50 * (sum(tables) + 2 * max(tables))
    assert taken[2] == taken[1]  # one after the other


def test_sizes() -> None:
    assert doctest.testmod(config).failed == 0
    assert [config.parse_bytes(text) for text in ("40GB", "40 GiB", "512mb")] == [40 * 10**9, 40 * 2**30, 512 * 10**6]
    for text in ("", "GB", "-1GB", "0GB", "1PB", "infGB", "nanGB"):
        with pytest.raises(FastarError, match=r"not a size|above 0"):
            config.parse_bytes(text)


def test_no_images_no_negative_bytes() -> None:
    assert Footprint(((16, 10), (32, 170))).of(2) == 0
