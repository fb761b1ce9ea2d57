"""What is kept of a proof: found again for the same model and code, never for another, never torn."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fastar.matching import derive, derive_symmetry, proofs

SOURCE = """
import torch
from torch import nn
from {helper} import act

class Net(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.slope = 1.0
        self.hidden, self.readout = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.readout(act(self.hidden(x)) * self.slope)
"""
INPUTS = (torch.zeros(2, 6),)


class Place:
    """A model's code in two files of its own."""

    def __init__(self, folder: Path, tag: str):
        self.model, self.helper = folder / f"net_{tag}.py", folder / f"act_{tag}.py"
        self.model.write_text(SOURCE.format(helper=self.helper.stem))
        self.helper.write_text("def act(x):\n    return x.relu()\n")

    def load(self) -> ModuleType:
        """As a new process would see it."""
        proofs._remembered.clear()
        for path in (self.helper, self.model):
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            # Not through the loader's cache of byte code, which goes by whole seconds.
            exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        return module


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path / "cache"))
    tag = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]
    yield Place(tmp_path, tag)
    for name in (f"net_{tag}", f"act_{tag}"):
        sys.modules.pop(name, None)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of models that were traced."""
    seen: list[str] = []
    trace = derive._trace

    def counting(model: nn.Module, inputs: object, name: str) -> object:
        seen.append(name)
        return trace(model, inputs, name)  # type: ignore[arg-type]

    monkeypatch.setattr(derive, "_trace", counting)
    return seen


def records(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "symmetries").glob("*.json"))


def test_the_second_time_neither_traces_nor_proves(
    place: Place, traced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = derive_symmetry(place.load().Net(), INPUTS)
    assert [g.size for g in first.groups] == [7]
    (file,) = records(tmp_path)
    files = json.loads(file.read_text().partition("\n")[2])["files"]
    assert {str(place.model), str(place.helper)} <= set(files)
    monkeypatch.setattr(derive, "verify_symmetry", lambda *a: pytest.fail("proven again"))
    other = place.load().Net()
    torch.nn.init.ones_(other.hidden.weight)  # other weights are the same architecture
    assert derive_symmetry(other.train(), (torch.ones(2, 6),)) == first
    assert derive_symmetry(other, INPUTS) == first  # and remembered by the process, without the file
    file.unlink()
    assert derive_symmetry(other, INPUTS) == first
    assert traced == ["Net"]
    assert not derive_symmetry(other, INPUTS, cached=False, verify=False).frozen
    assert traced == ["Net", "Net"]


def edit_model(place: Place) -> nn.Module:
    place.model.write_text(place.model.read_text().replace("* self.slope", "* torch.arange(7.0)"))
    return place.load().Net()


def edit_helper(place: Place) -> nn.Module:
    place.helper.write_text("def act(x):\n    return x * (1.0 + __import__('torch').arange(7.0))\n")
    return place.load().Net()


def replace_forward(place: Place) -> nn.Module:
    module = place.load()
    module.Net.forward = lambda self, x: self.readout(self.hidden(x).relu() * torch.arange(7.0))
    return module.Net()


def add_hook(place: Place) -> nn.Module:
    model = place.load().Net()
    model.hidden.register_forward_hook(lambda module, inputs, out: out * torch.arange(7.0))
    return model


def other_attribute(place: Place) -> nn.Module:
    model = place.load().Net()
    model.slope = torch.arange(7.0)
    return model


@pytest.mark.parametrize("change", [edit_model, edit_helper, replace_forward, add_hook, other_attribute])
def test_what_changes_the_function_is_derived_anew(
    place: Place, traced: list[str], change: Callable[[Place], nn.Module]
) -> None:
    assert len(derive_symmetry(place.load().Net(), INPUTS).groups) == 1
    assert derive_symmetry(change(place), INPUTS).groups == ()  # every unit has a factor of its own
    assert traced == ["Net", "Net"]


def test_other_shapes_and_inputs_are_derived_anew(place: Place, traced: list[str]) -> None:
    net = place.load().Net
    assert derive_symmetry(net(7), INPUTS).groups[0].size == 7
    assert derive_symmetry(net(9), INPUTS).groups[0].size == 9
    derive_symmetry(net(7), (torch.zeros(2, 5, 6),))
    derive_symmetry(net(7), INPUTS, allow_partial=True)
    assert len(traced) == 4


@pytest.mark.parametrize("damage", ["torn", "empty", "altered", "foreign"])
def test_a_damaged_record_is_not_believed(place: Place, traced: list[str], tmp_path: Path, damage: str) -> None:
    first = derive_symmetry(place.load().Net(), INPUTS)
    (file,) = records(tmp_path)
    whole = file.read_text()
    body = whole.partition("\n")[2]
    foreign = '{"files": {}, "symmetry": []}'
    file.write_text(
        {
            "torn": whole[: len(whole) // 2],
            "empty": "",
            "altered": whole.replace('"axis": 1', '"axis": 0'),
            "foreign": hashlib.sha256(foreign.encode()).hexdigest() + "\n" + foreign,
        }[damage]
    )
    assert derive_symmetry(place.load().Net(), INPUTS) == first
    assert traced == ["Net", "Net"]
    assert file.read_text().partition("\n")[2] == body, "it was not written again"


def test_off_keeps_nothing_and_a_folder_that_cannot_be_written_is_no_error(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTAR_CACHE", "off")
    assert len(derive_symmetry(place.load().Net(), INPUTS).groups) == 1
    assert records(tmp_path) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path / "file"))
    assert len(derive_symmetry(place.load().Net(), INPUTS).groups) == 1
    assert "cannot be written" in caplog.text


def test_a_model_that_cannot_be_pickled_is_derived_every_time(traced: list[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))
    model.extra = lambda x: x
    for _ in range(2):
        assert len(derive_symmetry(model, INPUTS).groups) == 1
    assert len(traced) == 2
    assert proofs.digest_of(model, INPUTS) is None


def _digest(queue: multiprocessing.Queue[str | None]) -> None:
    queue.put(proofs.digest_of(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)), INPUTS))


def test_the_digest_is_the_same_in_another_process() -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[str | None] = context.Queue()
    process = context.Process(target=_digest, args=(queue,))
    process.start()
    theirs = queue.get(timeout=120)
    process.join()
    assert theirs is not None
    assert theirs == proofs.digest_of(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)), INPUTS)


def test_a_skeleton_takes_no_memory_and_keeps_ties() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[1].weight = model[0].weight
    bare = proofs.skeleton(model)
    assert all(t.is_meta for t in bare.state_dict().values())
    assert bare[1].weight is bare[0].weight
    assert not any(t.is_meta for t in model.state_dict().values())
