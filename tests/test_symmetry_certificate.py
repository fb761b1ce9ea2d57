"""The certificate that a symmetry is complete: what stays is shown to stay, and what was missed is found."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.models import build_model
from fastar.symmetry import (
    Arrangement,
    Certificate,
    Group,
    Held,
    Member,
    PermutationSpec,
    Symmetry,
    certify,
    derive_symmetry,
    without_groups,
)
from fastar.symmetry.held import held_runs
from fastar.symmetry.permutations import Permutations

ROOT = Path(__file__).resolve().parent.parent
VECTORS = (torch.zeros(2, 6),)


def certified(model: nn.Module, inputs: tuple[Tensor, ...], *, partial: bool = False) -> Certificate:
    return certify(model, derive_symmetry(model, inputs, allow_partial=partial), inputs)


def entry(certificate: Certificate, tensor: str, axis: int) -> Held:
    (found,) = (one for one in certificate.held if (one.tensor, one.axes) == (tensor, (axis,)))
    return found


OWN = {
    "mlp": ((1, 8, 8), {}),
    "resnet8": ((3, 16, 16), {"width": 4}),
    "vit": ((3, 8, 8), {"patch": 4, "dim": 12, "depth": 1, "heads": 3}),
}


@pytest.mark.parametrize("arch", OWN)
def test_own_networks_are_complete(arch: str) -> None:
    shape, options = OWN[arch]
    model = build_model(arch, input_shape=shape, classes=5, seed=0, **options)
    found = certified(model, (torch.zeros(2, *shape),))
    assert found.complete, found.lines()
    assert found.lines()[-1] == "complete: every axis that no group moves is shown to stay"
    assert all(one.verdict == "proven" for one in found.held)
    assert all(one.change is not None and one.change > 1e-5 for one in found.held)


def test_own_networks_say_what_holds() -> None:
    model = build_model("resnet8", input_shape=(3, 16, 16), classes=5, seed=0, width=4)
    found = certified(model, (torch.zeros(2, 3, 16, 16),))
    first = entry(found, "conv1.weight", 1)
    assert first.positions == 3
    assert first.why[0].startswith("the input, read by aten.conv2d")
    assert entry(found, "conv1.weight", 2).why[0].startswith("positions of the kernel, aten.conv2d")
    assert entry(found, "classifier.bias", 0).why == ("output 0",)
    (line,) = (one for one in found.lines() if "positions of the kernel" in one)
    assert "alike" in line  # one line for all kernels


@pytest.mark.parametrize("arch", OWN)
def test_each_group_that_is_taken_away_is_found_by_its_axes(arch: str) -> None:
    shape, options = OWN[arch]
    model = build_model(arch, input_shape=shape, classes=5, seed=0, **options)
    inputs = (torch.zeros(2, *shape),)
    symmetry = derive_symmetry(model, inputs)
    parents = {group.parent for group in symmetry.groups}
    for group in symmetry.groups:
        if group.name in parents or not group.members:
            continue
        less = dataclasses.replace(symmetry, groups=tuple(one for one in symmetry.groups if one is not group))
        found = certify(model, less, inputs)
        assert not found.complete
        assert found.missed, found.lines()
        axes = {axis for one in found.missed for axis in one.axes}
        wanted = {f"{m.tensor} axis {m.axis}" for m in group.members if m.tensor in symmetry.parameters}
        assert wanted <= axes
        assert any(line.startswith("missed freedom") for line in found.lines())


class Middle(nn.Module):
    """8 hidden units, between which something else stands."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> object:
        return self.down(self.between(torch.relu(self.up(x))))

    def between(self, x: Tensor) -> Tensor:
        return x


class Table(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.arange(1.0, 9), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        return x * self.scale


class Ordered(Middle):
    def between(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Shown(Middle):
    def forward(self, x: Tensor) -> object:
        x = torch.relu(self.up(x))
        return self.down(x), x


@pytest.mark.parametrize(
    ("network", "what"), [(Table, "buffer 'scale'"), (Ordered, "aten.cumsum.default"), (Shown, "output 1")]
)
def test_what_holds_is_named_with_evidence(network: type[nn.Module], what: str) -> None:
    found = certified(network(), VECTORS)
    assert found.complete, found.lines()
    for tensor, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        one = entry(found, tensor, axis)
        assert any(why.startswith(what) for why in one.why)
        assert one.verdict == "proven"
        assert one.change is not None
        assert one.change > 1e-3


class Detour(Middle):
    """There and back: what stands between does nothing, which no rule sees."""

    def between(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x)).real


class Chosen(Middle):
    """Units are read in another order, which a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def between(self, x: Tensor) -> Tensor:
        return (x.cumsum(1) - F.pad(x.cumsum(1)[:, :-1], (1, 0))).index_select(1, self.order)


class Grouped(nn.Module):
    """Both groups read their 4 channels in one order, which could be another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
        self.last = nn.Conv2d(6, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x))))).mean((2, 3))


UNSEEN = {
    "detour": (Detour, VECTORS, {"up.weight axis 0", "up.bias axis 0", "down.weight axis 1"}),
    "chosen": (Chosen, VECTORS, {"up.weight axis 0", "up.bias axis 0", "down.weight axis 1"}),
    "grouped": (
        *(Grouped, (torch.zeros(2, 3, 9, 9),)),
        {"first.weight axis 0", "first.bias axis 0", "second.weight axis 1"},
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_freedom_that_the_derivation_does_not_see_is_missed(name: str) -> None:
    make, inputs, axes = UNSEEN[name]
    found = certified(make(), inputs, partial=True)
    assert not found.complete
    (one,) = found.missed
    assert set(one.axes) == axes
    assert one.change < 1e-8
    (line,) = (line for line in found.lines() if line.startswith("missed freedom"))
    assert all(axis in line for axis in axes)


class Ranked(Middle):
    """A maximum has no gradient where two units are the same: of one of them alone, as torch derives it."""

    def between(self, x: Tensor) -> Tensor:
        return x.max(1, keepdim=True)[0] + torch.zeros_like(x)


def test_a_gradient_that_tells_equal_units_apart_is_not_believed() -> None:
    model = Ranked()
    symmetry = derive_symmetry(model, VECTORS)
    none = without_groups(model)
    found = certify(model, none, VECTORS)
    assert symmetry.groups
    assert entry(found, "up.weight", 0).verdict == "missed", found.lines()


class Unread(Middle):
    """A parameter that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(5))


def test_what_has_no_effect_is_said() -> None:
    found = certified(Unread(), VECTORS)
    assert entry(found, "spare", 0).verdict == "without effect"


def test_a_specification_is_certified_too() -> None:
    class Branching(Middle):
        def between(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    model, inputs = Branching(), (torch.ones(2, 6),)
    axes = {"up.weight": ("h", None), "up.bias": ("h",), "down.weight": (None, "h"), "down.bias": (None,)}
    symmetry = PermutationSpec(axes).symmetry(model, inputs)
    found = certify(model, symmetry, inputs)
    assert found.complete, found.lines()
    assert found.untraced is not None
    assert any(line.startswith("no graph:") for line in found.lines())
    nothing = PermutationSpec({name: (None,) * len(one) for name, one in axes.items()}).symmetry(model, inputs)
    (missed,) = certify(model, nothing, inputs).missed
    assert set(missed.axes) == {"up.weight axis 0", "up.bias axis 0", "down.weight axis 1"}


def test_no_pass_is_begun_when_there_is_no_time() -> None:
    """A clock that goes on by one each time it is asked: at the start, and before each pass."""
    model = build_model("resnet8", input_shape=(3, 16, 16), classes=5, seed=0, width=4)
    inputs = (torch.zeros(2, 3, 16, 16),)
    symmetry = derive_symmetry(model, inputs)
    whole = certify(model, symmetry, inputs)
    for seconds in (1, 4, 8):
        found = certify(model, symmetry, inputs, seconds=seconds, clock=itertools.count().__next__)
        assert found.passes == seconds - 1 < whole.passes
    assert [one.verdict for one in found.held].count("derived") > 0
    assert any("by the gradient alone" in line for line in found.lines())
    nothing = certify(model, symmetry, inputs, seconds=0, clock=itertools.count().__next__)
    assert nothing.passes == 0
    assert not nothing.complete
    assert all("not tried: no time" in line for line in nothing.lines())


def test_the_model_is_not_touched_and_the_answer_is_the_same_again() -> None:
    model = build_model("resnet8", input_shape=(3, 16, 16), classes=5, seed=0, width=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = (torch.zeros(2, 3, 16, 16),)
    generator = torch.get_rng_state()
    first, second = (certified(model, inputs) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastar", "symmetry", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "FASTAR_CACHE": "off", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_command(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.down(torch.fft.ifft(torch.fft.fft(torch.relu(self.up(x)))).real)\n"
        "def build():\n"
        "    return Net()\n"
    )
    own = run("mlp", "--dataset", "digits", "--certify", folder=tmp_path)
    assert (own.returncode, own.stderr) == (0, "")
    assert "group:  hidden.0, " in own.stdout
    assert "held:   classifier" in own.stdout
    assert own.stdout.endswith("complete: every axis that no group moves is shown to stay\n")

    short = ("nets:build", "--input-shape", "2x6", "--allow-partial")
    plain = run(*short, folder=tmp_path)
    assert plain.returncode == 0
    assert plain.stdout.startswith("groups: 0, units: 0\nleft:   ")
    missed = run(*short, "--certify", "--json", folder=tmp_path)
    assert (missed.returncode, missed.stderr) == (0, "")
    result = json.loads(missed.stdout)
    assert result["groups"] == []
    assert not result["certificate"]["complete"]
    (one,) = result["certificate"]["missed"]
    assert set(one["axes"]) == {"up.weight axis 0", "up.bias axis 0", "down.weight axis 1"}

    refused = run("resnet8", folder=tmp_path)
    assert refused.returncode == 2
    assert "--dataset" in refused.stderr


def test_permutations_of_what_was_missed_are_real() -> None:
    """A group that is taken away moves the network as the certificate says: by hand, all at once."""
    model = Middle()
    symmetry = derive_symmetry(model, VECTORS)
    (missed,) = certify(model, dataclasses.replace(symmetry, groups=()), VECTORS).missed
    (group,) = symmetry.groups
    assert set(missed.axes) == {f"{member.tensor} axis {member.axis}" for member in group.members}
    swap = Permutations({group.name: torch.tensor([1, 0, *range(2, 8)])})
    state, x = model.state_dict(), torch.randn(5, 6)
    after = torch.func.functional_call(model, symmetry.apply(swap, state), (x,))
    assert isinstance(after, Tensor)
    torch.testing.assert_close(after, model(x))


def test_positions_that_stay_are_found_where_axes_before_theirs_are_merged() -> None:
    """w [2, 2, 4] is read as [4, 4], its last axis in another order: of it positions 2 and 0 move, 1 and 3 stay."""
    group = Group("units", 2, (Member("w", 1),))
    arranged = {"w": Arrangement(((0, 1), (2,)), {2: (2, 0, 1, 3)})}
    first, last = held_runs(Symmetry((group,), {"w": (2, 2, 4)}, arranged=arranged))
    assert (first.axes, last.axes) == ((0, 1), (2,))
    assert last.at.tolist() == [1, 3]


def test_split_axes_are_refused() -> None:
    symmetry = Symmetry((), {"w": (6, 2)}, arranged={"w": Arrangement(((0,), (1,), (2,)), split={0: (2, 3)})})
    with pytest.raises(FastarError, match=r"'w': axes that are split.*cannot be certified"):
        list(held_runs(symmetry))
