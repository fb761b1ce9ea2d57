"""The cost that a run is said to have: counts against real steps, plans against their parts, and what does not fit."""

from __future__ import annotations

import doctest
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar, refused
from matching_calls import match_weights
from torch import nn
from torch.nn import functional as F

from fastar import config
from fastar.config import load_settings
from fastar.errors import FastarError
from fastar.experiments.plan import plan_run, planning
from fastar.experiments.plan.planning import batch_bytes
from fastar.losses import find_loss
from fastar.matching.weight.match_weights import bytes_of_one
from fastar.models import build_model
from fastar.report.results import plan_lines
from fastar.runtime.live_bytes import LiveBytes
from fastar.symmetry import Symmetry, derive_symmetry

SHAPE = (3, 32, 32)
WIDTH = 0.125
ROW = 4 * 175_970  # fp32 parameters of ResNet-18 at an eighth of its width


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


def sample(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images and their labels."""
    images = torch.zeros(2, *shape).to(memory_format=torch.channels_last)
    return images, torch.zeros(2, dtype=torch.int64)


def test_a_forward_pass_by_hand() -> None:
    """Without gradients a layer's input and output live at once: 4 bytes of 100 and of 50 numbers an image, beside the
    image of 12 numbers and its label."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 100), nn.Linear(100, 50), nn.Linear(50, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for images in (1, 10, 32):
        found = batch_bytes(model, sample(3, 2, 2), torch.float32, images, loss=find_loss(), training=False)
        assert found == images * (4 * 150 + 4 * 12 + 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arch", "width"), [("resnet8", 0.5), ("mlp", 256)])
def test_counted_bytes_are_those_of_real_steps(dtype: torch.dtype, arch: str, width: float) -> None:
    """Without data, against real images: where activations are most of it, and where the new gradients are."""
    model = build_model(arch, input_shape=SHAPE, classes=10, seed=0, width=width).train()
    counted = {batch: batch_bytes(model, sample(*SHAPE), dtype, batch, loss=find_loss()) for batch in (24, 48)}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if parameter.ndim > 1 else parameter.data
    for batch in (24, 48):
        model.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            images, labels = torch.empty(batch, *SHAPE, memory_format=torch.channels_last), torch.arange(batch) % 10
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
        assert counted[batch] == pytest.approx(live.peak, rel=0.005)  # the loss's own tensors are of a few bytes
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert live.peak > (weights if arch == "mlp" else 48 * 4 * 16 * 32 * 32 * dtype.itemsize // 4)


@functools.cache
def symmetry(width: float) -> Symmetry:
    """Derived once for all tests: it takes most of a plan's time."""
    model = build_model("resnet18", input_shape=SHAPE, classes=10, seed=0, width=width)
    return derive_symmetry(model, (torch.zeros(2, *SHAPE),))


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """Bytes of one network are counted once for all plans."""
    known: dict[Any, int] = {}

    def counted(model: nn.Module, some: Any, *more: Any, **how: Any) -> int:
        key = (sum(p.numel() for p in model.parameters()), some[0].shape, *more, how.get("training", True))
        if key not in known:
            known[key] = batch_bytes(model, some, *more, **how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "batch_bytes", counted)
        yield


def plan_of(tmp_path: Path, *overrides: str, speed: float | None = 1000, **processes: int) -> dict[str, Any]:
    """Of a ResNet-18 an eighth as wide, on CIFAR-10, which is not there."""
    own = ["device=cpu", f"dataset.directory={tmp_path}", f"model.width={WIDTH}"]
    settings = load_settings(dataset="cifar10", arch="resnet18", overrides=[*own, *overrides])
    return plan_run(settings, tmp_path / "run", speed, **processes)


def bytes_of(plan: dict[str, Any], what: str) -> int:
    """Of the item whose name begins so."""
    return int(next(item["bytes"] for item in plan["items"] if item["what"].startswith(what)))


def test_gpu_memory_does_not_grow_with_the_sources(tmp_path: Path) -> None:
    few, many = (plan_of(tmp_path, "gpu_memory=2GB", "sources.store=host", f"sources.number={n}") for n in (30, 500))
    assert few["needed"]["gpu"]["training"] == many["needed"]["gpu"]["training"]
    assert many["needed"]["gpu"]["evaluation"] <= many["limits"]["gpu"]  # more models at a time, but as fit
    assert bytes_of(many, "sources, pinned") > 10 * bytes_of(few, "sources, pinned")
    held = [plan_of(tmp_path, "gpu_memory=2GB", "sources.store=device", f"sources.number={n}") for n in (30, 60)]
    grown = held[1]["needed"]["gpu"]["training"] - held[0]["needed"]["gpu"]["training"]
    assert grown == pytest.approx(30 * ROW, rel=0.02)  # rows are padded


def test_on_a_cpu_sources_on_the_host_are_all_in_memory(tmp_path: Path) -> None:
    few, many = (plan_of(tmp_path, "sources.store=host", f"sources.number={number}") for number in (3, 13))
    grown = many["needed"]["host"]["training"] - few["needed"]["host"]["training"]
    assert grown == pytest.approx(10 * ROW, rel=0.02)


def test_the_same_sizes_are_held_whatever_is_limited(tmp_path: Path) -> None:
    image = 3 * 32 * 32
    few = plan_of(tmp_path, "dataset.limit=500", "evaluation.limit=400", "evaluation.test_limit=300")
    held = sum(n * (5 * image + 16) for n in (500, 10_000, 400, 300))  # bytes, and as floats; labels and places
    assert bytes_of(few, "data set") == held
    assert bytes_of(few, "data set (.beton files)") == 60_000 * image


def test_work_is_all_epochs_and_all_models(tmp_path: Path) -> None:
    more = ("train.epochs=10", "sources.number=4", "sources.heldout=2", "gpu_memory=1GB", "star.match_every_epochs=2")
    plan = plan_of(tmp_path, *more, "star.epochs=5", "evaluation.points=3", "evaluation.regular_pairs=10")
    work = [(part["times"], part["seconds"]) for part in plan["work"]]
    # Paths: 4 + 2 from the star, 10 pairs twice; one inner point each; ends: the star, 6 matched, the pairs' own; and
    # 7 models when they are trained.
    measured = 26 + 1 + 6 + 16 + 7
    # 50,000 images for statistics, 50,000 and 10,000 for losses.
    matching = plan["work"][2]["seconds"]  # measured
    assert work == [(60, 50.0), (5, 50.0), (3 * 4, matching), (measured, 110.0)]
    assert [part["rounds"] for part in plan["work"]] == [part["times"] for part in plan["work"]]
    assert plan["seconds"] == 60 * 50 + 5 * 50 + 3 * 4 * matching + measured * 110
    crossed = plan_of(tmp_path, *more, "star.epochs=5", "evaluation.points=3", "evaluation.regular_pairs=cross:3x9")
    # 3 x 2 pairs twice, and their ends: 6 as they are, and each second one matched.
    assert crossed["work"][-1]["times"] == 6 + 2 * 6 + 1 + 6 + (6 + 6) + 7
    few = plan_of(tmp_path, *more, "evaluation.limit=1000", "evaluation.bn_batches=10", speed=500)
    assert few["work"][0]["seconds"] == 100.0
    assert few["work"][3]["seconds"] == pytest.approx((1000 + 10_000 + 10 * 128) / 500)
    assert plan_of(tmp_path, *more, speed=None)["seconds"] is None


def test_many_gpus_share_all_but_the_star(tmp_path: Path) -> None:
    more = ("train.epochs=10", "sources.number=7", "sources.heldout=2", "gpu_memory=1GB", "star.epochs=5")
    alone, shared = plan_of(tmp_path, *more), plan_of(tmp_path, *more, gpus=2, nodes=2)
    assert [part["times"] for part in shared["work"]] == [part["times"] for part in alone["work"]]
    points = alone["work"][3]["times"]
    # Nine models on four GPUs: three one after the other.
    assert [part["rounds"] for part in shared["work"]] == [3 * 10, 5, alone["work"][2]["times"], -(-points // 4)]
    assert shared["seconds"] == pytest.approx(sum(part["rounds"] * part["seconds"] for part in shared["work"]))
    own = {place: shared["needed"][place] == alone["needed"][place] for place in ("gpu", "host", "disk")}
    assert own == {"gpu": True, "host": True, "disk": False}
    assert bytes_of(shared, "checkpoints of 4 trainings") == 4 * bytes_of(alone, "checkpoints of a training")
    lines = " ".join(plan_lines(shared))
    assert "90 x epoch of a regular model, 50 s each: 1.2 h of a GPU, 25.0 min on 4 GPUs" in lines
    assert "5 x epoch of the star, 50 s each: 4.2 min of a GPU, 4.2 min on one GPU" in lines
    assert re.search(r"time: [\d.]+ (h|min) in all on 4 GPUs, \d+% of it: ", lines)
    for wrong in ({"gpus": 0}, {"nodes": -1}):
        with pytest.raises(FastarError, match=r"must be at least 1"):
            plan_of(tmp_path, *more, **wrong)
    with pytest.raises(FastarError, match="there is no GPU here; say how large each is"):
        plan_of(tmp_path, "sources.number=2", gpus=2)


@pytest.mark.slow
def test_images_that_grow_are_counted_as_large_as_they_get(tmp_path: Path) -> None:
    """Epochs at 32, 48 (rounded to 64) and 64 of images that are measured at 96."""

    def planned(*overrides: str) -> dict[str, Any]:
        own = ["device=cpu", f"dataset.directory={tmp_path}", "gpu_memory=2GB", "model.width=0.125", *overrides]
        settings = load_settings(dataset="imagenet", arch="imagenet-resnet18", overrides=[*own, "train.batch_size=16"])
        return plan_run(settings, tmp_path / "run")

    grow = ("train.epochs=3", "train.resolutions=[[0, 32], [2, 64]]", "train.schedule=cosine", "train.milestones=[]")
    growing, at_64, at_96 = (
        planned("dataset.resolution=96", *grow),
        planned("dataset.resolution=64", "train.epochs=3", *grow[2:]),
        planned("dataset.resolution=96", "train.epochs=3", *grow[2:]),
    )
    assert growing["needed"]["gpu"]["training"] == at_64["needed"]["gpu"]["training"]
    assert growing["needed"]["gpu"]["evaluation"] == at_96["needed"]["gpu"]["evaluation"]
    assert any("about 328 GB for training as rn50, by FFCV" in note for note in at_64["notes"])


GPU = "gpu_memory=750MB"


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        ((GPU, "train.batch_size=2048"), "gpu: training needs", {"train.batch_size"}),
        ((GPU, "sources.store=device", "sources.number=600"), "gpu: training needs", {"sources.store"}),
        ((GPU, "evaluation.batch_size=9000"), "gpu: evaluation needs", {"evaluation.batch_size"}),
        ((GPU, "train.batch_size=2048", "sources.store=device", "sources.number=600"), "gpu: training needs",
         {"sources.store", "train.batch_size"}),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_what_does(
    tmp_path: Path, overrides: tuple[str, ...], problem: str, remedy: set[str]
) -> None:
    """One setting, or two where each alone would not do; and with them it fits."""
    lines = [line for line in plan_of(tmp_path, *overrides)["problems"] if line.startswith(problem)]
    assert len(lines) == 1
    found = re.fullmatch(r"gpu: \w+ needs [\d.]+ [GM]B, [\d.]+ [GM]B are there; (.*) makes it fit", lines[0])
    assert found is not None, lines
    named = found[1].split()
    assert {one.partition("=")[0] for one in named} == remedy
    assert plan_of(tmp_path, *overrides, *named)["problems"] == []
    if len(named) == 2:
        assert all(plan_of(tmp_path, *overrides, one)["problems"] for one in named)


@pytest.mark.slow
def test_what_nothing_makes_fit_says_so(tmp_path: Path) -> None:
    lines = plan_of(tmp_path, "gpu_memory=10MB")["problems"]
    assert all(re.fullmatch(r"gpu: \w+ needs .*; use a smaller network \(model.width\).*", one) for one in lines)
    assert {line.split()[1] for line in lines} == {"training", "evaluation"}
    full = plan_of(tmp_path, GPU, "train.batch_size=2048", "sources.number=10000000", "sources.store=file")["problems"]
    assert re.match(r"disk: .*free some, choose a run folder", full[-1])
    assert any(re.fullmatch(r"gpu: training .*; train.batch_size=\d+ makes it fit", line) for line in full), full


def test_a_graph_keeps_its_memory_while_sources_are_matched(tmp_path: Path) -> None:
    eager, graph = (
        plan_of(tmp_path, "gpu_memory=4GB", "train.batch_size=2048", f"train.graph={on}") for on in (False, True)
    )
    step, both = bytes_of(eager, "a step on 2048"), bytes_of(graph, "a graph on 2048 images, and matching")
    assert step < both < 2 * step


def test_a_gpu_holds_as_many_models_as_fit_beside_the_activations(tmp_path: Path) -> None:
    def rows(memory: str) -> int:
        plan = plan_of(tmp_path, f"gpu_memory={memory}", "evaluation.batch_size=2000", "sources.number=300")
        assert plan["problems"] == []
        return int(next(i["what"] for i in plan["items"] if "models at a time" in i["what"]).split()[0])

    assert 1 <= rows("900MB") < rows("1200MB") < rows("2GB")


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    place = f"dataset.directory={tmp_path}"
    shown = fastar("plan", "--dataset", "digits", place, "device=cpu")
    assert shown.code == 0, shown.err
    for said in (
        "images/s of training",
        "epoch of a regular model",
        "point of a path measured",
        "in all",
        "host: data set",
        "~ ",
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
    for speed in (0, "nan", 1e-300, 1e300):
        assert "must be from 0.001 to" in refused("plan", "--dataset", "digits", place, "--images-per-second", speed)
    unwritten = refused("plan", "--dataset", "imagefolder", "--name", "mine", place)
    assert re.search(
        r"not written yet; `python tools/\S+ --dataset imagefolder --name mine --source FOLDER --out .+`", unwritten
    )
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == ["planning"] * 3
    assert fastar("plan", "--dataset", "digits", place, "device=cpu", "--quiet").err == ""
    elsewhere = fastar("plan", "--dataset", "digits", place, "device=cpu", "--gpu-memory", "1GB")
    assert "time: not known (give --images-per-second: " in " ".join(elsewhere.out.split())


@pytest.mark.parametrize("method", ["weight", "activation"])
def test_sources_activations_are_planned_and_a_matching_timed(tmp_path: Path, method: str) -> None:
    own = ["device=cpu", f"dataset.directory={tmp_path}", f"model.width={WIDTH}", "train.batch_size=16"]
    settings = load_settings(dataset="cifar10", arch="resnet18", overrides=[*own, f"matching.method={method}"])
    plan = plan_run(settings, tmp_path / "run", 1000)
    kept = bytes_of(plan, "sources' activations")
    assert kept > 0 if method == "activation" else kept == 0
    assert plan["work"][2]["seconds"] > 0


@pytest.mark.parametrize(
    "ways", [{}, {"perturbations": 2}, {"restarts": 2}, {"restarts": 2, "perturbations": 2}], ids=str
)
@pytest.mark.parametrize("count", [1, 4])
def test_memory_of_matching_is_what_is_taken(count: int, ways: dict[str, int]) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        return build_model("resnet18", input_shape=SHAPE, classes=10, seed=seed, width=WIDTH).state_dict()

    groups, theta = symmetry(WIDTH), {name: value.detach() for name, value in state(0).items()}
    rows = [state(1 + n) for n in range(count)]
    sources = {name: torch.stack([row[name] for row in rows]) for name in groups.parameters}
    with LiveBytes() as live:
        match_weights(groups, theta, sources, chunk=count, threads=1, **ways)
    planned = count * bytes_of_one(groups, ways.get("perturbations", 0))
    # Which parts a step moves differs from source to source; what is planned is enough.
    assert 0.75 * planned < live.peak <= planned


def test_sizes() -> None:
    assert doctest.testmod(config).failed == 0
    assert [config.parse_bytes(text) for text in ("40GB", "40 GiB", "512mb")] == [40 * 10**9, 40 * 2**30, 512 * 10**6]
    for text in ("", "GB", "-1GB", "0GB", "1PB", "infGB", "nanGB"):
        with pytest.raises(FastarError, match=r"not a size|above 0"):
            config.parse_bytes(text)
