"""examples/star_from_scratch.py computes what fastar does: its step, its matching, its barrier."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastar
from fastar.config import StarSettings, TrainSettings
from fastar.flat import FlatLayout
from fastar.runtime.seeds import derive_seed
from fastar.training import SourcesStore, StarStep, draw

FILE = Path(__file__).resolve().parent.parent / "examples" / "star_from_scratch.py"
LR, STEPS, SOURCES = 0.05, 8, 3


@pytest.fixture(scope="module")
def example() -> Any:
    torch_state = torch.random.get_rng_state()
    yield SimpleNamespace(**runpy.run_path(str(FILE)))
    torch.random.set_rng_state(torch_state)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(32, 64, generator=generator), torch.randint(10, (32,), generator=generator)) for _ in range(STEPS)
    ]


def test_its_star_step_is_fastars(example: Any) -> None:
    star, *sources = (example.state_of(example.network(seed)) for seed in range(1 + SOURCES))
    model = example.network(0)
    names = [str(n) for n in range(SOURCES)]
    store = SourcesStore(FlatLayout.from_module(model), sources, names, torch.device("cpu"))
    settings = TrainSettings(lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4, precision="fp32")
    chosen = StarSettings(match_every_epochs=0)
    step = StarStep(model, settings, chosen, store, seed=7, match=lambda *_: None)
    step.begin_epoch(0, STEPS)
    found = [float(step(images, labels, torch.tensor(LR))) for images, labels in batches()]

    indices, ts = draw(chosen, SOURCES, STEPS, derive_seed(7, "draws", 0))
    velocity = {name: torch.zeros_like(value) for name, value in star.items()}
    wanted = [
        example.star_step(example.network(0), star, sources[n], float(t), batch, velocity, LR)
        for n, t, batch in zip(indices, ts, batches(), strict=True)
    ]
    # fp32 sums in another order, over eight steps.
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, value in step.layout.views(step.theta).items():
        torch.testing.assert_close(value, star[name], rtol=1e-4, atol=1e-6)


def test_neither_matching_finds_more_in_the_others_answer(example: Any) -> None:
    a, b = example.network(1), example.network(2)
    theta, source = example.state_of(a), example.state_of(b)
    mine = example.match(theta, source)
    assert any(not torch.equal(mine[name], source[name]) for name in source)
    for matched in (mine, fastar.apply(fastar.match(a, b, example_inputs=torch.zeros(1, 64)), b).state_dict()):
        again = example.match(theta, {name: value.detach() for name, value in matched.items()})
        assert all(torch.equal(again[name], matched[name]) for name in matched)
    inputs = torch.randn(5, 64)
    moved = example.functional_call(b, mine, inputs)
    torch.testing.assert_close(moved, b(inputs), rtol=1e-5, atol=1e-5)


def test_its_barrier_is_fastars(example: Any) -> None:
    data = batches()
    images, labels = (torch.cat(tensors) for tensors in zip(*data, strict=True))
    a, b = example.network(1), example.network(2)
    wanted = example.barrier(example.network(0), example.state_of(a), example.state_of(b), (images, labels))
    assert fastar.barrier(a, b, data).value == pytest.approx(wanted, abs=1e-6)


@pytest.mark.slow
def test_it_finds_a_star(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    lines = capsys.readouterr().out.splitlines()
    unmatched, regular, sources, heldouts = (float(line.rsplit(maxsplit=1)[-1]) for line in lines)
    assert sources < heldouts < regular < unmatched
    assert np.isfinite(unmatched)
