"""The memory that is planned, beside what runs take on a GPU: small ones of every kind, whole.

On the simulated GPU (tools/rehearse.py). On a real one the workspaces of its libraries outweigh networks this small;
tools/bench_imagenet.py compares there, at full size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matching_calls import match_weights
from PIL import Image
from session_cases import with_data

from fastar.config import DATASETS, Augmentation, TrainSettings, load_settings
from fastar.data.in_memory import DeviceDataset
from fastar.experiments import measure, regular, star
from fastar.experiments.plan import plan_run
from fastar.experiments.session import Session, new_session
from fastar.matching.weight.match_weights import bytes_of_one
from fastar.models import build_model
from fastar.runs import RunFolder
from fastar.runtime import device as devices
from fastar.runtime.memory import cap_gpu
from fastar.symmetry import derive_symmetry
from fastar.training import Matcher, RegularStep, fit

TRAIN, TEST = 96, 48
COMMON = (
    *("device=cuda", "sources.number=3", "sources.heldout=1", "train.epochs=2", "train.batch_size=24", "workers=1"),
    *("train.warmup_epochs=0", "evaluation.points=3", "evaluation.regular_pairs=2", "evaluation.batch_size=32"),
    *("logging.tensorboard=false", "checkpoint.epochs=0"),
)


class Peaks:
    """The most that tensors took in each phase; a phase ends where `mark` is told the next one's name."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._phase = "before"
        torch.cuda.reset_peak_memory_stats()

    def mark(self, phase: str) -> None:
        peak = torch.cuda.max_memory_allocated()
        self.found[self._phase] = max(self.found.get(self._phase, 0), peak)
        self._phase = phase
        gc.collect()
        torch.cuda.reset_peak_memory_stats()

    def around(self, patch: pytest.MonkeyPatch, owner: Any, name: str, phase: str) -> None:
        """Calls of `owner.name` are of `phase`."""
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            before = self._phase
            self.mark(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self.mark(before)

        patch.setattr(owner, name, outer)


def whole_run(context: Session, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Train, match and measure everything; the peak of each phase."""
    peaks, settings = Peaks(), context.settings
    for owner, name in (
        (regular, "evaluate_rows"),
        (star, "re_estimate"),
        (measure, "measure"),
    ):
        peaks.around(patch, owner, name, "evaluation")
    peaks.around(patch, Matcher, "__call__", "matching")
    with context.run.open(settings, context.progress):
        peaks.mark("training")
        sources = regular.regular_models(context, "source", settings.sources.number)
        centre, released, permutations = star.star_model(context, sources)
        heldouts = [one.released() for one in regular.regular_models(context, "heldout", settings.sources.heldout)]
        measure.measure(context, centre, released, heldouts, permutations)
        peaks.mark("after")
    return peaks.found


def check(context: Session, patch: pytest.MonkeyPatch) -> None:
    plan = plan_run(context.settings, context.run.path, 1000)
    found, planned = whole_run(context, patch), plan["needed"]["gpu"]
    print(found, planned, [(item["what"], item["bytes"]) for item in plan["items"] if item["place"] == "gpu"])
    for moment in ("training", "evaluation"):
        assert planned[moment] == pytest.approx(found[moment], rel=0.15)


@pytest.fixture(autouse=True)
def simulated() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not devices.simulated():
        pytest.skip("a real GPU's libraries outweigh networks this small; tools/bench_imagenet.py compares there")


def held_images(
    count: int, side: int, channels: int, device: torch.device, augmentation: Augmentation
) -> DeviceDataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, side, side, channels), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    return DeviceDataset(
        images.to(device),
        labels.to(device),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        augmentation=augmentation,
    )


def of_held_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, *overrides: str) -> Session:
    """A run on made images, as if they were CIFAR-10."""
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], train=TRAIN, test=TEST))
    settings = load_settings(
        dataset="cifar10",
        arch=arch,
        overrides=[*COMMON, f"dataset.directory={tmp_path}", f"dataset.limit={TRAIN}", *overrides],
    )
    context = new_session(settings, RunFolder(tmp_path / "run"))
    augmentation = Augmentation(pad=4, flip=True)
    return with_data(
        context,
        files=SimpleNamespace(digest="made", classes=[str(n) for n in range(10)]),
        train=held_images(TRAIN, 32, 3, context.device, augmentation),
        test=held_images(TEST, 32, 3, context.device, augmentation),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("resnet8", ("train.precision=fp32", "sources.store=device")),
        ("resnet18", ("train.precision=bf16", "sources.store=file", "model.width=0.125", "train.optimizer=adam")),
        ("resnet18", ("train.precision=bf16", "sources.store=host", "model.width=0.125", "matching.method=activation")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(one.partition("=")[2] for one in value),
)
def test_of_images_that_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, overrides: tuple[str, ...]
) -> None:
    check(of_held_images(tmp_path, monkeypatch, arch, *overrides), monkeypatch)


@pytest.mark.gpu
def test_of_images_that_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", TRAIN // 2), ("val", TEST // 3)):
        for number in range(count):
            path = tmp_path / "raw" / split / f"c{number % 4}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((70, 80, 3), number % 256, np.uint8)).save(path)
    overrides = (
        "dataset.own_name=made",
        f"dataset.root={tmp_path / 'raw'}",
        f"dataset.directory={tmp_path / 'betons'}",
    )
    more = ("dataset.resolution=64", "model.width=0.125", "train.precision=bf16", "sources.store=host")
    settings = load_settings(
        dataset="imagefolder", arch="imagenet-resnet18", overrides=[*COMMON, *overrides, *more, "train.batch_size=32"]
    )
    context = new_session(settings, RunFolder(tmp_path / "run"))
    _ = context.data.files
    check(context, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"perturbations": 2}, {"restarts": 2, "perturbations": 2}], ids=str)
def test_the_automatic_chunk_of_matching(settings: dict[str, int]) -> None:
    """Two chunks take at most half of what is free, whatever a way out of local optima holds beside them."""
    count, device = 12, torch.device("cuda")
    states = [build_model("resnet20", input_shape=(3, 32, 32), classes=10, seed=n, width=0.5) for n in range(count + 1)]
    groups = derive_symmetry(states[0], (torch.zeros(2, 3, 32, 32),))
    theta = {name: value.detach().to(device) for name, value in states[0].state_dict().items()}
    rows = [model.state_dict() for model in states[1:]]
    sources = {name: torch.stack([row[name] for row in rows]).to(device) for name in groups.parameters}
    free = 4 * 4 * bytes_of_one(groups)  # four sources in each chunk, if nothing is perturbed
    before, whole = torch.cuda.memory_allocated(), torch.cuda.mem_get_info(device)[1]
    torch.cuda.reset_peak_memory_stats()
    cap_gpu(device, before + free)
    try:
        match_weights(groups, theta, sources, threads=2, **settings)
    finally:
        cap_gpu(device, whole)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.2 * free < taken <= 0.5 * free


class Noted(RegularStep):
    """Notes what is allocated when an epoch begins."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.allocated: list[int] = []

    def begin_epoch(self, epoch: int, steps: int) -> None:
        gc.collect()
        self.allocated.append(torch.cuda.memory_allocated())


@pytest.mark.gpu
def test_an_epoch_s_last_batch_is_gone_when_the_next_one_s_matching_begins() -> None:
    images = held_images(TRAIN, 32, 3, torch.device("cuda"), Augmentation(pad=4, flip=True))
    model = build_model("resnet8", input_shape=(3, 32, 32), classes=10, seed=0, width=0.25).cuda()
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    batch = 4 * 48 * 3 * 32 * 32
    recipe = TrainSettings(epochs=3, batch_size=48, precision="fp32")
    step = Noted(model, recipe)
    fit(step, images, recipe, name="x", seed=0)
    first, *others = step.allocated
    # The last good state is new after the first epoch; each of its tensors is rounded up to 512 bytes.
    assert all(state <= one - first < batch / 4 for one in others)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_regular_model_s_training_is_gone_when_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: bool
) -> None:
    context = of_held_images(
        tmp_path, monkeypatch, "resnet8", "train.optimizer=adamw", "train.lr=0.001", f"train.graph={graph}"
    )
    measured, seen = regular.evaluate_rows, []

    def noting(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        seen.append(torch.cuda.memory_allocated())
        return measured(*args, **kwargs)

    monkeypatch.setattr(regular, "evaluate_rows", noting)
    _ = context.network.layout, context.data.train, context.data.test
    gc.collect()
    before = torch.cuda.memory_allocated()
    with context.run.open(context.settings, context.progress):
        regular.train_regular(context, "source", 0)
    state = 4 * context.network.layout.numel
    # The state, a network and its row; theta, gradient and two moments would be four more. Tensors are rounded up.
    assert 3 * state < seen[0] - before < 4 * state
