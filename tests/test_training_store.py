"""Where sources are kept: the rule, what the device holds, that no number depends on it, and matching."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import Killed, at_call, kill, small
from torch import Tensor
from training_cases import CPU, PlainConvNet, batches, network

from fastar.config import MatchingSettings, StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.experiments.star_domain import train_sources
from fastar.flat import FlatLayout
from fastar.runs import model_files
from fastar.runs.safetensors_file import SafetensorsFile
from fastar.symmetry import derive_symmetry
from fastar.training import SourcesStore, StarStep, match_store
from fastar.training.prefetch import FetchedRows, Slots
from fastar.training.sources import choose_placement

SETTINGS = TrainSettings(precision="fp32")
SHAPE = (3, 5, 5)
LAYOUT = FlatLayout.from_module(network(PlainConvNet, 0))
CUDA = torch.device("cuda")
GB = 10**9


def make_store(place: str, count: int = 7, folder: Path | None = None, **more: Any) -> SourcesStore:
    states = [network(PlainConvNet, 1 + n).state_dict() for n in range(count)]
    return SourcesStore(LAYOUT, states, [f"source {n}" for n in range(count)], CPU, store=place, folder=folder, **more)


def train(sources: SourcesStore, epochs: int = 3, steps: int = 9) -> tuple[list[float], Tensor]:
    """A star whose `match` reverses the hidden units of every second source, part by part."""

    def reverse(theta: Tensor, sources: SourcesStore, epoch: int) -> None:
        for views in sources.parts():
            for name, axis in PlainConvNet.hidden:
                views[name][::2] = views[name][::2].flip(axis + 1)

    model = network(PlainConvNet, 0)
    step = StarStep(model, SETTINGS, StarSettings(), sources, seed=2, match=reverse)
    losses = []
    for epoch in range(epochs):
        step.begin_epoch(epoch, steps)
        for images, labels in batches(steps, epoch, SHAPE):
            losses.append(float(step(images, labels, torch.tensor(0.05))))
    return losses, step.theta


@pytest.mark.parametrize("place", ["host", "file"])
def test_no_number_depends_on_the_place(place: str, tmp_path: Path) -> None:
    wanted, theta = train(make_store("device"))
    found, same = train(make_store(place, folder=tmp_path))
    assert found == wanted
    assert torch.equal(same, theta)


def test_what_matching_reaches_is_told_with_and_without_vectors(tmp_path: Path) -> None:
    """Part by part: inner products of theta with the rows as they then are, each in its place."""
    model = network(PlainConvNet, 0)
    symmetry = derive_symmetry(model, (torch.zeros(2, *SHAPE),))
    # As on a GPU: three rows at a time are copied there and back.
    sources = make_store("file", folder=tmp_path, free=lambda device: 8 * 4 * 3 * LAYOUT.numel, in_place=False)
    theta = LAYOUT.flatten(model.state_dict())
    _, whole, weights = match_store(symmetry, theta, sources, MatchingSettings(), start=None, seed=0, threads=1)
    one = {name: value.double() for name, value in LAYOUT.views(theta).items()}
    for n in range(len(sources)):
        products = {name: float((one[name] * view[n].double()).sum()) for name, view in sources.views().items()}
        vectors = sum(value for name, value in products.items() if one[name].ndim == 1)
        assert abs(vectors) > 0.01  # else the two were one
        assert float(whole[n]) == pytest.approx(sum(products.values()), rel=1e-6)  # sums of float32 products
        assert float(weights[n]) == pytest.approx(sum(products.values()) - vectors, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_device_holds_two_rows_of_a_file(count: int, tmp_path: Path) -> None:
    sources = make_store("file", count, tmp_path)
    feed = sources.feed([0] * 5)
    assert [feed.take(step).data_ptr() for step in range(2)] == [feed.take(step).data_ptr() for step in range(2, 4)]
    resident = make_store("device", count)
    assert resident.feed([0]).take(0).data_ptr() == resident.rows.data_ptr()


def test_fetched_rows_arrive_in_order_and_stay_until_they_are_done() -> None:
    rows = torch.arange(6.0)[:, None].expand(6, 16).contiguous()
    indices = [3, 3, 0, 5, 1, 1, 2, 4]
    feed = FetchedRows(Slots(rows, CPU), indices)
    taken: list[int] = []
    before = rows[0]
    for step, index in enumerate(indices):
        here = feed.take(step)
        if step:  # the row before is still needed: its slot must not have been filled anew
            assert (before == indices[step - 1]).all()
            feed.done(step - 1)
        assert (here == index).all()
        taken.append(int(here[0]))
        before = here
    assert taken == indices
    feed.close()


def test_the_next_steps_rows_are_fetched_while_a_step_runs(tmp_path: Path) -> None:
    model, coming = network(PlainConvNet, 0), []
    step = StarStep(model, SETTINGS, StarSettings(), make_store("file", folder=tmp_path), seed=2)
    step.begin_epoch(0, 4)
    feed: Any = step._draws.feed
    model.register_forward_pre_hook(lambda *_: coming.append(sorted(feed._coming)))
    for images, labels in batches(4, 0, SHAPE):
        step(images, labels, torch.tensor(0.05))
    assert coming == [[1, 2], [2, 3], [3], []]


def test_rows_changed_by_matching_are_what_is_fetched(tmp_path: Path) -> None:
    sources = make_store("file", 3, tmp_path)
    first = sources.feed([1, 1])
    old = first.take(0).clone()
    for views in sources.parts():
        views["out.bias"][1] += 1.0
    feed = sources.feed([1])
    difference = LAYOUT.views(feed.take(0) - old)
    assert (difference["out.bias"] - 1).abs().max() < 1e-6
    assert not difference["conv.weight"].any()


def test_parts_cover_all_rows_in_order_and_are_written_back() -> None:
    """As on a GPU, where parts are copies."""
    sources = make_store("host", 7, in_place=False, part_rows=3)
    wanted = sources.rows.clone()
    sizes = []
    for views in sources.parts():
        sizes.append(len(views["out.bias"]))
        assert views["out.bias"].data_ptr() not in range(
            sources.rows.data_ptr(), sources.rows.data_ptr() + 4 * sources.rows.numel()
        )
        views["conv.weight"].mul_(2.0)
    assert sizes == [3, 3, 1]
    for n, row in enumerate(wanted):
        expected = LAYOUT.unflatten(row)
        expected["conv.weight"] = expected["conv.weight"] * 2
        assert torch.equal(sources.rows[n], LAYOUT.flatten(expected))


def test_few_rows_at_a_time_where_the_device_is_nearly_full() -> None:
    # Of what is free an eighth; the store itself asks for host memory first.
    sources = make_store("file", 7, free=lambda device: 8 * 4 * LAYOUT.numel * 2, in_place=False)
    assert [len(views["out.bias"]) for views in sources.parts()] == [2, 2, 2, 1]
    assert len(list(make_store("file", 7, free=lambda device: 0, in_place=False).parts())) == 7


def test_a_file_leaves_nothing_behind_and_is_really_a_file(tmp_path: Path) -> None:
    sources = make_store("file", folder=tmp_path)
    assert os.listdir(tmp_path) == []
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped
    assert torch.equal(sources.rows, make_store("device").rows)


def test_a_file_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FastarError, match=r"sources\.store=file: no .* GB for 7 sources in .*missing.*No such file"):
        make_store("file", folder=tmp_path / "missing")


@pytest.mark.parametrize(
    ("device", "free", "needed", "place"),
    [
        (CPU, {"cpu": 10}, 5, "device"),
        (CPU, {"cpu": 9}, 5, "file"),
        (CUDA, {"cuda": 10, "cpu": 0}, 5, "device"),
        (CUDA, {"cuda": 9, "cpu": 18}, 5, "host"),
        (CUDA, {"cuda": 9, "cpu": 9}, 5, "file"),
    ],
)
def test_auto_takes_the_first_place_of_which_half_is_enough(
    device: torch.device, free: dict[str, int], needed: int, place: str
) -> None:
    found = choose_placement("auto", needed * GB, device, sources=3, free=lambda device: free[device.type] * GB)
    assert found == place


@pytest.mark.parametrize(
    ("setting", "device", "message"),
    [
        (
            "device",
            CUDA,
            r"sources\.store=device: 50 sources need 5\.00 GB on cuda, 2\.00 GB are free; use .*host",
        ),
        ("device", CPU, r"sources\.store=device: 50 sources need 5\.00 GB on cpu, 2\.00 GB are free"),
        ("host", CUDA, r"sources\.store=host: 50 sources need 8\.59 GB on cpu, 2\.00 GB are free; use .*file"),
    ],
)
def test_a_forced_place_that_is_too_small_is_refused(setting: str, device: torch.device, message: str) -> None:
    with pytest.raises(FastarError, match=message):
        choose_placement(setting, 5 * GB, device, sources=50, free=lambda device: 2 * GB)
    assert choose_placement("file", 5 * GB, device, sources=50, free=lambda device: 2 * GB) == "file"


def test_the_store_asks_for_its_true_size() -> None:
    free = {"free": lambda device: 7 * 4 * LAYOUT.numel}
    assert make_store("device", 7, **free).store == "device"
    with pytest.raises(FastarError, match="8 sources"):
        make_store("device", 8, **free)


@pytest.mark.parametrize("given", [False, True])
def test_a_source_is_read_once_and_hashed_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """What is read to be checked is what goes into the row, of a run's own sources and of those that are given."""
    other = tmp_path / "other"
    train_sources(small(data), other)
    run, changes = other, []
    if given:
        run, changes = tmp_path / "run", [f"sources.folder={other / 'sources'}", "sources.heldout=1"]
    reads: list[str] = []
    hashed: list[int] = []
    read, digest = SafetensorsFile.read, model_files.tensors_digest
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, names: (reads.append(self.path.name), read(self, names))[1]
    )
    monkeypatch.setattr(model_files, "tensors_digest", lambda state: (hashed.append(len(state)), digest(state))[1])
    at_call(monkeypatch, StarStep, 1, kill)
    with pytest.raises(Killed):
        train_star(small(data, *changes), run)
    assert reads == ["seed-0000.safetensors", "seed-0001.safetensors"]
    assert len(hashed) == 2


def test_one_source_is_held_at_a_time() -> None:
    held: list[weakref.ref[Tensor]] = []

    def states() -> Iterator[dict[str, Tensor]]:
        for n in range(4):
            assert not any(reference() is not None for reference in held)
            state = {name: value.clone() for name, value in network(PlainConvNet, n).state_dict().items()}
            held.extend(map(weakref.ref, state.values()))
            yield state
            del state

    names = [str(n) for n in range(4)]
    sources = SourcesStore(LAYOUT, states(), names, CPU)
    for n, row in enumerate(sources.rows):
        assert torch.equal(row, LAYOUT.flatten(network(PlainConvNet, n).state_dict()))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "file"])
def test_places_on_a_gpu(place: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = []
    for where in ("device", place):
        states = [network(PlainConvNet, 1 + n).state_dict() for n in range(7)]
        names = [str(n) for n in range(7)]
        sources = SourcesStore(LAYOUT, states, names, torch.device("cuda"), store=where, folder=tmp_path)
        model = network(PlainConvNet, 0).cuda()
        step = StarStep(model, SETTINGS, StarSettings(), sources, seed=2)
        step.begin_epoch(0, 40)
        for images, labels in batches(40, 0, SHAPE):
            step(images.cuda(), labels.cuda(), torch.tensor(0.05, device="cuda"))
        found.append(step.theta.cpu())
    # The same kernels on the same numbers; sums in backward may be taken in another order.
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["device", "file"])
def test_memory_is_given_back(place: str, tmp_path: Path) -> None:
    z = make_store(place, folder=tmp_path)
    step = StarStep(network(PlainConvNet, 0), SETTINGS, StarSettings(), z, seed=0)
    step.begin_epoch(0, 3)
    held = [weakref.ref(tensor) for tensor in (z.rows, step.theta, step.optimizer.state()[0])]
    step.release()
    gc.collect()
    assert [reference() for reference in held] == [None] * 3
    assert len(z) == 0
