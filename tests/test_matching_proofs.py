"""What is kept of a proof: found again for the same graph, never for another, never torn."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fastar.models import build_model
from fastar.symmetry import Group, Member, Symmetry, derive, derive_symmetry
from fastar.symmetry import cache as proofs

INPUTS = (torch.zeros(2, 6),)
SCALE: Any = 1.0  # a global that a forward pass reads
UNEVEN = torch.arange(1.0, 8.0)  # a factor of its own for each of 7 units


def act(x: Tensor) -> Tensor:
    return x.relu()


class Net(nn.Module):
    """Reads an attribute of the class, a global, a default and what a closure holds."""

    factors: ClassVar[list[Any]] = [1.0]

    def __init__(self, width: int = 7, *, scale: Any = 1.0):
        super().__init__()
        self.slope: Any = 1.0
        self.hidden, self.readout = nn.Linear(6, width), nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("mask", torch.ones(()))
        self.constant = torch.ones(())  # no buffer: lifted into the graph
        self.act = lambda x: helper()(x) * scale

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        x = self.act(self.norm(self.hidden(x)) * self.slope) * SCALE * self.factors[0] * self.mask * self.constant
        return self.readout(x * power)


@functools.lru_cache
def helper() -> Callable[[Tensor], Tensor]:
    return act


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process is."""
    monkeypatch.setattr(proofs, "_remembered", {})


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done: traced, proven."""
    seen: list[str] = []
    trace, verify = derive.trace, derive.verify_symmetry

    def tracing(*arguments: Any) -> Any:
        seen.append("traced")
        return trace(*arguments)

    def proving(*arguments: Any, **options: Any) -> None:
        seen.append("proven")
        verify(*arguments, **options)

    monkeypatch.setattr(derive, "trace", tracing)
    monkeypatch.setattr(derive, "verify_symmetry", proving)
    return seen


def records(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "symmetries").glob("*.json"))


def test_the_second_time_proves_nothing(done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = derive_symmetry(Net(), INPUTS)
    assert [g.size for g in first.groups] == [7]
    assert done == ["traced", "proven"]
    (file,) = records(tmp_path)
    other = Net()
    nn.init.ones_(other.hidden.weight)  # other weights and statistics are the same architecture
    other(torch.randn(5, 6))
    assert derive_symmetry(other.train(), (torch.ones(2, 6),)) == first
    forget(monkeypatch)
    assert derive_symmetry(other, INPUTS) == first  # from the file
    file.unlink()
    assert derive_symmetry(other, INPUTS) == first  # remembered by the process, without the file
    assert done == ["traced", "proven", "traced", "traced", "traced"]
    assert derive_symmetry(other, INPUTS, cached=False) == first
    assert done[-2:] == ["traced", "proven"]


def a_global(patch: pytest.MonkeyPatch) -> nn.Module:
    patch.setattr(sys.modules[__name__], "SCALE", UNEVEN)
    return Net()


def a_class_attribute(patch: pytest.MonkeyPatch) -> nn.Module:
    patch.setattr(Net, "factors", [UNEVEN])
    return Net()


def a_closure(patch: pytest.MonkeyPatch) -> nn.Module:
    return Net(scale=UNEVEN)


def a_default(patch: pytest.MonkeyPatch) -> nn.Module:
    patch.setattr(Net.forward, "__defaults__", (UNEVEN,))
    return Net()


def a_helper(patch: pytest.MonkeyPatch) -> nn.Module:
    patch.setattr(sys.modules[__name__], "act", lambda x: x.relu() * UNEVEN)
    helper.cache_clear()
    return Net()


def a_forward(patch: pytest.MonkeyPatch) -> nn.Module:
    patch.setattr(Net, "forward", lambda self, x: self.readout(self.hidden(x).relu() * UNEVEN))
    return Net()


def a_hook(patch: pytest.MonkeyPatch) -> nn.Module:
    model = Net()
    model.hidden.register_forward_hook(lambda module, inputs, out: out * UNEVEN)
    return model


def an_attribute(patch: pytest.MonkeyPatch) -> nn.Module:
    model = Net()
    model.slope = UNEVEN
    return model


def a_buffer(patch: pytest.MonkeyPatch) -> nn.Module:
    model = Net()
    model.mask = UNEVEN
    model._non_persistent_buffers_set.add("mask")  # one of the state dict would move
    return model


def a_constant(patch: pytest.MonkeyPatch) -> nn.Module:
    model = Net()
    model.constant = UNEVEN
    return model


CHANGES = [
    a_global,
    a_class_attribute,
    a_closure,
    a_default,
    a_helper,
    a_forward,
    a_hook,
    an_attribute,
    a_buffer,
    a_constant,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_function_is_derived_anew(
    change: Callable[[pytest.MonkeyPatch], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    helper.cache_clear()
    try:
        assert len(derive_symmetry(Net(), INPUTS).groups) == 1
        assert derive_symmetry(change(monkeypatch), INPUTS).groups == ()  # every unit has a factor of its own
    finally:
        helper.cache_clear()


def test_a_hook_of_all_modules_is_not_served_what_was_found_without_it() -> None:
    own = build_model("mlp", input_shape=(1, 4, 4), classes=3, seed=0)
    images = (torch.zeros(2, 1, 4, 4),)
    kept = derive_symmetry(own, images, name=["mlp"])

    def uneven(module: nn.Module, inputs: object, out: Any) -> Any:
        return out * torch.linspace(1, 2, out.shape[-1]) if isinstance(module, nn.Linear) else out

    handle = register_module_forward_hook(uneven)
    try:
        assert proofs.digest_of_name(["mlp"], own, images) is None
        assert derive_symmetry(own, images, name=["mlp"], verify=False) == derive_symmetry(own, images, name=["mlp"])
        assert derive_symmetry(own, images, name=["mlp"]) != kept
    finally:
        handle.remove()
    assert derive_symmetry(own, images, name=["mlp"]) == kept


def test_values_that_only_proofs_see_are_part_of_the_name(done: list[str]) -> None:
    model = Net()
    derive_symmetry(model, INPUTS)
    model.mask = torch.tensor(2.0)
    derive_symmetry(model, INPUTS)
    model.constant = torch.tensor(2.0)
    derive_symmetry(model, INPUTS)
    model.slope = 2.0
    derive_symmetry(model, INPUTS)
    assert done == ["traced", "proven"] * 4


def test_other_shapes_ties_and_inputs_are_derived_anew(done: list[str]) -> None:
    assert derive_symmetry(Net(7), INPUTS).groups[0].size == 7
    assert derive_symmetry(Net(9), INPUTS).groups[0].size == 9
    derive_symmetry(Net(7), (torch.zeros(4, 6),))
    derive_symmetry(Net(7), INPUTS, allow_partial=True)
    square = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    derive_symmetry(square, INPUTS)
    assert done.count("proven") == 5
    square[2].weight = square[0].weight
    assert derive_symmetry(square, INPUTS).tied == {"2.weight": "0.weight"}


@pytest.mark.parametrize("damage", ["torn", "empty", "altered", "foreign", "binary"])
def test_a_damaged_record_is_not_believed(
    done: list[str], tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = derive_symmetry(Net(), INPUTS)
    (file,) = records(tmp_path)
    whole = file.read_text()
    foreign = '{"symmetry": []}'
    file.write_bytes(
        {
            "torn": whole[: len(whole) // 2].encode(),
            "empty": b"",
            "altered": whole.replace('"axis": 1', '"axis": 0').encode(),
            "foreign": (hashlib.sha256(foreign.encode()).hexdigest() + "\n" + foreign).encode(),
            "binary": b"\xff\x00",
        }[damage]
    )
    forget(monkeypatch)
    assert derive_symmetry(Net(), INPUTS) == first
    assert done == ["traced", "proven"] * 2
    assert file.read_text() == whole, "it was not written again"


def test_off_keeps_nothing_and_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTAR_CACHE", "off")
    assert len(derive_symmetry(Net(), INPUTS).groups) == 1
    assert records(tmp_path) == []
    forget(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path / "file"))
    assert len(derive_symmetry(Net(), INPUTS).groups) == 1
    assert "cannot be written" in caplog.text


OWN: dict[str, Any] = {"arch": "mlp", "input_shape": (1, 4, 4), "classes": 3, "seed": 0}
IMAGES = (torch.zeros(2, 1, 4, 4),)


def own(key: object = ("mlp", {}), classes: int = 3) -> Symmetry:
    return derive_symmetry(build_model(**{**OWN, "classes": classes}), IMAGES, name=key)


def test_fastar_s_own_architectures_are_not_even_traced(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = own()
    forget(monkeypatch)
    assert own() == first
    assert done == ["traced", "proven"]
    own(("mlp", {"width": 512}))
    assert done[2:] == ["traced"]  # another name; the graph is proven
    own(classes=4)
    assert done[3:] == ["traced", "proven"]  # other shapes under one name
    monkeypatch.setattr(proofs, "_sources", lambda room: f"other {room}")
    own()
    assert done[5:] == ["traced", "proven"]


def test_a_name_counts_for_fastar_s_own_modules_alone(done: list[str]) -> None:
    class Other(Net):
        pass

    hooked = build_model(**OWN)
    next(hooked.children()).register_forward_hook(lambda module, inputs, out: out)
    replaced = build_model(**OWN)
    replaced.forward = lambda x: x.flatten(1)[:, :3]  # type: ignore[method-assign]
    for model in (Net(), Other(), hooked, replaced):
        assert proofs.digest_of_name("mlp", model, IMAGES) is None
    assert proofs.digest_of_name("mlp", build_model(**OWN), IMAGES) is not None
    assert proofs.digest_of_name({"what": {1, 2}}, build_model(**OWN), IMAGES) is None
    for _ in range(2):
        derive_symmetry(Net(), INPUTS, name="net")
    assert done == ["traced", "proven", "traced"]


def test_another_process_finds_the_record(tmp_path: Path) -> None:
    first = own()
    code = (
        "import torch\nfrom fastar.symmetry import derive, derive_symmetry\nfrom fastar.models import build_model\n"
        "model = build_model('mlp', input_shape=(1, 4, 4), classes=3, seed=5)\n"
        "def fail(*a, **k): raise SystemExit('proven again')\n"
        "derive.verify_symmetry = fail\n"
        "graph = derive_symmetry(model, (torch.zeros(2, 1, 4, 4),))\n"
        "derive.trace = fail\n"
        "name = derive_symmetry(model, (torch.zeros(2, 1, 4, 4),), name=('mlp', {}))\n"
        "assert graph == name\nprint(len(name.groups))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(len(first.groups))]


BY_HAND = Symmetry(
    (Group("hidden", 7, (Member("hidden.weight", 0), Member("readout.weight", 1))),),
    {"hidden.weight": (7, 6), "readout.weight": (3, 7)},
)


def test_commands_that_keep_the_same_record_at_once_never_show_a_torn_one(tmp_path: Path) -> None:
    """Three processes write it over and over while this one reads it; what is found is always whole."""
    symmetry, digest = BY_HAND, "a" * 64
    proofs.keep(digest, symmetry)
    running = set()
    for _ in range(3):
        writer = os.fork()
        if writer == 0:
            code = 1
            try:
                for _ in range(15):
                    proofs.keep(digest, symmetry)
                code = 0
            finally:
                os._exit(code)
        running.add(writer)
    while running:
        proofs._remembered.clear()
        assert proofs.find(digest) == symmetry
        for writer in sorted(running):
            ended, status = os.waitpid(writer, os.WNOHANG)
            if ended:
                running.remove(writer)
                assert os.waitstatus_to_exitcode(status) == 0
    assert not [path for path in (tmp_path / "cache" / "symmetries").iterdir() if path.suffix != ".json"]


def test_threads_that_keep_the_same_record_at_once_write_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They have one process id, as processes of two containers with one home may have."""
    both, fsync = threading.Barrier(2), os.fsync

    def meeting(handle: int) -> None:
        both.wait(60)  # each has a file open, and has not renamed it
        fsync(handle)

    symmetry, digest = BY_HAND, "b" * 64
    monkeypatch.setattr(os, "fsync", meeting)
    threads = [threading.Thread(target=proofs.keep, args=(digest, symmetry)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.text == ""
    proofs._remembered.clear()
    assert proofs.find(digest) == symmetry


def test_a_graph_with_what_has_no_digest_is_proven_every_time(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(value: object) -> object:
        raise proofs._Unknown("a value of its own kind")

    monkeypatch.setattr(proofs, "_plain", refuse)
    for _ in range(2):
        assert len(derive_symmetry(Net(), INPUTS).groups) == 1
    assert done == ["traced", "proven"] * 2


def test_graphs_inside_a_graph_count() -> None:
    class Chooses(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.hidden, self.readout, self.factor = nn.Linear(6, 7), nn.Linear(7, 3), factor

        def forward(self, x: Tensor) -> Tensor:
            x = self.hidden(x)
            other = torch.cond(x.sum() > 0, lambda y: y * self.factor, lambda y: y - 1, (x * 0,))
            return self.readout(x.relu()) + other.sum()

    def digest(factor: float) -> str | None:
        model = Chooses(factor)
        return proofs.digest_of_graph(derive.trace(model, INPUTS, "Chooses"), model)

    assert digest(2.0) is not None
    assert digest(2.0) == digest(2.0)
    assert digest(2.0) != digest(3.0)


def test_a_record_is_json_with_its_checksum(tmp_path: Path) -> None:
    derive_symmetry(Net(), INPUTS)
    (file,) = records(tmp_path)
    whole, _, body = file.read_text().partition("\n")
    assert hashlib.sha256(body.encode()).hexdigest() == whole
    assert {"groups", "parameters", "buffers", "tied", "frozen"} == set(json.loads(body)["symmetry"])
