"""The peers: the plain star trainer of tools/bench_reference.py, and a DataLoader's images in memory."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench import plain_star as plain
from bench.spent import Spent, Tasks
from torch import nn

import fastar
from fastar.config import StarSettings, TrainSettings
from fastar.flat import FlatLayout
from fastar.models import build_model
from fastar.runtime.seeds import derive_seed
from fastar.training import SourcesStore, StarStep, draw

STEPS, SOURCES, LR = 6, 3, 0.05
TOOLS = Path(__file__).resolve().parent.parent / "tools"


def network(seed: int) -> nn.Module:
    return build_model("mlp", input_shape=(3, 4, 4), classes=3, seed=seed, width=6)


def made_images(count: int, side: int = 4, **more: object) -> plain.Images:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, side, side, generator=generator)
    return plain.Images(images, torch.randint(3, (count,), generator=generator), **more)  # type: ignore[arg-type]


def test_its_star_step_is_algorithm_1_as_fastar_does_it() -> None:
    model, *sources = (network(seed) for seed in range(1 + SOURCES))
    names = [str(n) for n in range(SOURCES)]
    store = SourcesStore(
        FlatLayout.from_module(model), [one.state_dict() for one in sources], names, torch.device("cpu")
    )
    settings = TrainSettings(lr=LR, precision="fp32")
    chosen = StarSettings(match_every_epochs=0)
    step = StarStep(copy.deepcopy(model), settings, chosen, store, seed=7)
    step.begin_epoch(0, STEPS)

    recipe = plain.Training(1, 8, LR, settings.momentum, settings.weight_decay)
    optimizer = recipe.optimizer(list(model.parameters()))
    parameters = [plain.parameters_of(one) for one in sources]
    drawn = zip(*draw(chosen, SOURCES, STEPS, derive_seed(7, "draws", 0)), strict=True)
    batches = made_images(8 * STEPS).epoch(8, torch.Generator().manual_seed(0))
    for (n, t), (images, labels) in zip(drawn, batches, strict=True):
        wanted = plain.star_step(model, dict(model.named_parameters()), parameters[n], t, (images, labels), optimizer)
        found = step(images, labels, torch.tensor(LR))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)  # fp32 sums in another order
    for name, value in step.layout.views(step.theta).items():
        torch.testing.assert_close(value, dict(model.named_parameters())[name].detach(), rtol=1e-4, atol=1e-6)


def test_its_barrier_is_fastars() -> None:
    first, second = (build_model("resnet8", input_shape=(3, 16, 16), classes=3, seed=n, width=0.25) for n in (1, 2))
    data = made_images(64, side=16)
    (losses,) = plain.losses_along(first, second, 5, data, [data], batch_size=64, seed=0)
    wanted = fastar.barrier(first, second, (data.images, data.labels), points=5)
    assert losses == pytest.approx(wanted.loss, rel=2e-3)  # torch's running variances are unbiased
    assert plain.barrier(losses) == pytest.approx(wanted.value, abs=2e-3)


def test_its_batches_are_crops_of_padded_images_and_mirrors_of_them() -> None:
    black = torch.tensor([-1.0, -2.0, -3.0])
    data = made_images(12, pad=2, flip=True, black=black)
    seen = []
    for images, labels in data.epoch(4, torch.Generator().manual_seed(1)):
        assert images.shape == (4, 3, 4, 4)
        for image, label in zip(images, labels, strict=True):
            padded = black.view(3, 1, 1).repeat(12, 1, 8, 8)
            padded[:, :, 2:6, 2:6] = data.images
            crops = [padded[:, :, y : y + 4, x : x + 4] for y in range(5) for x in range(5)]
            same = torch.stack([(crop == view).all((1, 2, 3)) for crop in crops for view in (image, image.flip(2))])
            (whose,) = same.any(0).nonzero()
            assert data.labels[whose] == label
            seen.append(int(whose))
    assert sorted(seen) == list(range(12))


def test_its_rate_is_fastars() -> None:
    from fastar.training.schedule import learning_rate

    recipe, settings = plain.Training(4, 8, LR, 0.9, 0), TrainSettings(epochs=4, lr=LR)
    rates = [learning_rate(settings, step, 5, 4, LR) for step in range(20)]
    assert [recipe.lr_at(step, 20) for step in range(20)] == pytest.approx(rates)


def test_tasks_are_told_apart_by_what_is_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.spent.time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0]))
    tasks, whole = Tasks(), Spent()
    with whole.counted():
        now[0] += 1  # a session begins
        for outer, inner in (
            ("source models", ("reading digits train", "training source 0")),
            ("matching", ()),
            ("models trained together", ()),
            ("training star", ("matching", "matching")),
            ("heldout models", ()),
            ("matching", ()),
            ("evaluating", ()),
        ):
            with tasks.task(outer, 2):
                now[0] += 10
                for name in inner:
                    with tasks.task(name, 1):
                        now[0] += 100
    found = {name: spent.wall for name, spent in tasks.parts(whole).items()}
    assert found == {"sources": 130, "steps": 10, "matching": 210, "barriers": 20, "rest": 101}
    assert all(spent.cpu == found[name] for name, spent in tasks.parts(whole).items())


def test_images_in_memory_are_those_of_the_files(tmp_path: Path) -> None:
    """The peer of loading: not augmented the same, augmented a crop of the padded image, mirrored or not."""
    tool = runpy.run_path(str(TOOLS / "bench_loader.py"))
    tool["write_images"](tmp_path, ("a", "b"), (6, 5), 3, 4)
    files = tool["Files"](tmp_path / "train", "RGB", tool["unchanged"])
    plain, augmented = tool["InMemory"](files, 0, False), tool["InMemory"](files, 2, True)
    assert len(plain) == len(files) == 4
    black = torch.from_numpy(-files.mean / files.std)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for index in range(len(files)):
            wanted, label = files[index]
            found, same = plain[index]
            assert (label, found.dtype) == (same, torch.float32)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
            padded = black.view(3, 1, 1).repeat(1, 10, 9)
            padded[:, 2:8, 2:7] = wanted
            crop = augmented[index][0]
            crops = [padded[:, y : y + 6, x : x + 5] for y in range(5) for x in range(5)]
            assert any(torch.allclose(one, crop, atol=1e-5) for given in crops for one in (given, given.flip(2)))
