"""What users give that does not fit: one line each, before any work where it can be seen, and nothing half-written."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar as fastar_command
from data_cases import Drawing
from run_cases import SMALL, poison
from task_cases import Net, build, recipe, tensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import fastar
from fastar.errors import FastarError, UserCodeError
from fastar.training import RegularStep, StarStep

TRAIN = tensors()
QUIET: dict[str, Any] = {"progress": False}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(call: Callable[[], Any], folder: Path, left: list[str] | None = None) -> str:
    """The one line that says why; what is in the folder afterwards is `left` (None: there is no folder)."""
    with pytest.raises(FastarError) as error:
        call()
    assert "\n" not in str(error.value)
    assert folder.exists() == (left is not None), files(folder)
    if left is not None:
        assert files(folder) == left
    return str(error.value)


class Builds:
    """A build that does something else at each call, or the same."""

    def __init__(self, *made: Callable[[], Any]):
        self.made = list(made)
        self.__name__ = self.__qualname__ = "build"

    def __call__(self) -> Any:
        return (self.made.pop(0) if len(self.made) > 1 else self.made[0])()


def frozen() -> nn.Module:
    net = Net()
    net.hidden.weight.requires_grad_(False)
    return net


def fixed() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def raising() -> nn.Module:
    raise RuntimeError("no weights\nhere")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            Builds(Net, lambda: Net(width=7)),
            r"another network at each call \(hidden.weight was \[6, 4\], is \[7, 4\] now\)",
        ),
        (fixed, r"builds the same weights whatever the seed; draw them from torch's generator, and set no seed in it"),
        (frozen, r"parameter hidden.weight is frozen \(requires_grad=False\), and all parameters are trained"),
        (lambda: 3, r"returned int, not a torch.nn.Module; return a network, or \(network, example inputs\)"),
        (lambda: None, r"returned NoneType, not a torch.nn.Module"),
        (raising, r"calling it failed \(RuntimeError: no weights here\)"),
        (
            lambda: Net(inputs=5),
            r"forward, on the first train batch, failed \(RuntimeError: mat1 .*\), in its module 'hidden'; .* \[2, 4\]",
        ),
        (Net(), r"build is a Net: give a function that returns a fresh network"),
        ("mynets:build", r"build is a str: give a function"),
    ],
)
def test_builds_that_do_not_fit(make: Any, says: str, tmp_path: Path) -> None:
    out, before = tmp_path / "run", torch.get_rng_state()
    call = lambda: fastar.train_sources(make, TRAIN, recipe(), number=2, out=out, **QUIET)  # noqa: E731
    assert re.search(says, refused(call, out))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_build_need_not_draw_where_sources_are_given(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        star = fastar.train_star(fixed, [Net(), Net()], TRAIN, recipe(), out=tmp_path / "run", **QUIET)
    assert star.results["train"]["star_source"]["n"] == 2


def scalar(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def detached(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1], reduction="none").detach()


def broken(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.logits


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (scalar, r"loss scalar returns a tensor of shape \[\], .* take no mean over the batch, such as by reduction="),
        (nn.CrossEntropyLoss(), r'loss CrossEntropyLoss returns one number for a batch: make it with reduction="none"'),
        (detached, r"the loss detached has no gradient: return a tensor that is computed from the network's outputs"),
        (broken, r"loss broken failed \(AttributeError: "),
        ("mse", r"the network gives float32 \[2, 3\], the targets are int64 \[2\]: give one shape for both"),
        ("hinge", r"unknown loss 'hinge': "),
    ],
)
def test_losses_that_do_not_fit(loss: Any, says: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call = lambda: fastar.train_sources(build, TRAIN, recipe(), number=2, loss=loss, out=out, **QUIET)  # noqa: E731
    assert re.search(says, refused(call, out))
    star = lambda: fastar.train_star(build, [Net(), Net()], TRAIN, recipe(), loss=loss, out=out, **QUIET)  # noqa: E731
    assert re.search(says, refused(star, out))


def test_test_data_are_tried_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "run"
    test = (torch.zeros(5, 7), torch.zeros(5, dtype=torch.int64))
    call = lambda: fastar.train_sources(build, TRAIN, recipe(), number=2, test=test, out=out, **QUIET)  # noqa: E731
    assert refused(call, out).startswith("the network's forward, on the first test batch, failed (RuntimeError: mat1")


def test_outputs_without_the_expected_key(tmp_path: Path) -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            return {"mean": super().forward(x), "spread": x}

    out = tmp_path / "run"
    call = lambda: fastar.train_sources(Two, TRAIN, recipe(), number=2, out=out, **QUIET)  # noqa: E731
    says = (
        "the network's outputs have no 'logits'; their keys are 'mean', 'spread': return the prediction under 'logits'"
    )
    assert refused(call, out).startswith(says)


def test_a_dataset_whose_length_changes(tmp_path: Path) -> None:
    """Said at the epoch in which it is seen; what was finished stays, and the run goes on with the whole dataset."""

    class Shrinking(Dataset[Any]):
        asked, most = 0, 10**9

        def __len__(self) -> int:
            return 48 if self.asked < self.most else 47

        def __getitem__(self, index: int) -> Any:
            type(self).asked += 1
            return TRAIN[0][index], TRAIN[1][index]

    def train(number: int) -> Any:
        return fastar.train_sources(build, Shrinking(), recipe(), number=number, out=tmp_path / "run", **QUIET)

    whole = train(1)
    kept = files(tmp_path / "run")
    Shrinking.most = Shrinking.asked + 60
    left = [*kept]
    found = refused(lambda: train(2), tmp_path / "run", left)
    assert found == "the train data: had 48 samples and has 47 now: its length must not change"
    Shrinking.most = 10**9
    again = train(2)
    assert torch.equal(again[0].state["out.bias"], whole[0].state["out.bias"])


@pytest.mark.parametrize("kind", [RegularStep, StarStep])
def test_a_loss_that_is_not_finite_names_model_and_place(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a star: the source and t of the step."""
    sources = fastar.train_sources(build, TRAIN, recipe(), number=2, **QUIET) if kind is StarStep else []
    poison(monkeypatch, kind, lambda number: number == 5)
    how: dict[str, Any] = {"recipe": recipe(), "out": tmp_path, **QUIET}
    star, source = (partial(fastar.train_star, build, sources), partial(fastar.train_sources, build))
    with pytest.raises(FastarError) as error:
        (star if kind is StarStep else source)(TRAIN, **how)
    place = r" \(source \S+, t=0\.\d{4}\)" if kind is StarStep else ""
    name = "star" if kind is StarStep else "source 0"
    says = rf"training {name}: loss not finite at epoch 2, step 2{place}; lower \S+ \(it is 0.1\)"
    assert re.match(says, str(error.value)), error.value
    assert f"(the model after epoch 1 is in {tmp_path / 'last-good'}" in str(error.value)


@pytest.mark.parametrize("as_what", ["module", "state", "file"])
def test_sources_of_another_network(as_what: str, tmp_path: Path) -> None:
    """The first differences are named, and which source it is."""
    out, other = tmp_path / "run", Net(width=7)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    wrong = {"module": other, "state": other.state_dict(), "file": tmp_path / "other.pt"}[as_what]
    call = lambda: fastar.train_star(build, [Net(), wrong], TRAIN, recipe(), out=out, **QUIET)  # noqa: E731
    found = refused(call, out)
    name = str(tmp_path / "other.pt") if as_what == "file" else "sources[1]"
    assert found.startswith(f"{name} ")
    assert "hidden.weight" in found
    assert "[7, 4]" in found
    assert found.endswith("it is of another architecture or width than the model")


@pytest.mark.parametrize(
    ("sources", "more", "says"),
    [
        ([], {}, r"there are no sources: give those of fastar.train_sources, modules, state dicts or files"),
        ([Net()], {}, r"a barrier between regular models needs two of them"),
        ([Net(), 3], {}, r"sources\[1\] is a int: give a trained model, a module, a state dict or a file"),
        ([Net(), Net()], {"heldouts": [3]}, r"heldouts\[0\] is a int: give"),
        ([Net(), "nowhere.pt"], {}, r"nowhere.pt"),
        ([Net(), {"hidden.weight": torch.full((6, 4), torch.nan)}], {}, r"sources\[1\]: hidden.weight has NaN"),
        ([Net(), Net()], {"matching": {"methods": "weight"}}, r"unknown key matching.methods: did you mean"),
        ([Net(), Net()], {"metrics": ["acuracy"]}, r"unknown metric 'acuracy': did you mean 'accuracy'\?"),
    ],
)
def test_sources_that_do_not_fit(sources: Any, more: dict[str, Any], says: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call = lambda: fastar.train_star(build, sources, TRAIN, recipe(), out=out, **more, **QUIET)  # noqa: E731
    assert re.search(says, refused(call, out))


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ((TRAIN[0][:10], TRAIN[1][:10]), r"train.batch_size=16 is more than the 10 training samples"),
        ((TRAIN[0], TRAIN[1][:10]), r"the train data: its tensors have the shapes \[48, 4\], \[10\]"),
        ((TRAIN[0].numpy(), TRAIN[1].numpy()), r"the train data holds arrays of NumPy"),
        (iter([TRAIN]), r"the train data can be gone through once only"),
        (None, r"the train data is a NoneType"),
        (Drawing(0), r"the train data: holds no sample"),
    ],
)
def test_data_that_do_not_fit(train: Any, says: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call = lambda: fastar.train_sources(build, train, recipe(), number=2, out=out, **QUIET)  # noqa: E731
    assert re.search(says, refused(call, out))


def test_a_function_that_raises_in_training_says_where(tmp_path: Path) -> None:
    """The user's error is the cause, so that Python shows its traceback; what was finished stays."""
    calls: list[int] = []

    class Sometimes(Net):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 12:
                raise ZeroDivisionError("by chance")
            return super().forward(x)

    with pytest.raises(UserCodeError, match=r"training source 0 failed \(ZeroDivisionError: by chance\)") as error:
        fastar.train_sources(Sometimes, TRAIN, recipe(epochs=9), number=1, out=tmp_path / "run", **QUIET)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


MODULE = """
import torch
from torch import nn
from task_cases import Net, tensors

def build():
    return Net()
def no_weights():
    return helper()
def helper():
    raise ValueError("no weights here")
def data():
    return tensors(), tensors(20, seed=1)
def picky(outputs, batch):
    raise KeyError("weight")
def no_data():
    return open("nowhere.csv")
"""


@pytest.mark.parametrize(
    ("option", "function", "frames", "line"),
    [
        (
            "--model",
            "no_weights",
            ["no_weights", "helper"],
            "own:no_weights: calling it failed (ValueError: no weights ",
        ),
        ("--loss", "picky", ["picky"], "loss picky failed (KeyError: 'weight')"),
        (
            "--data",
            "no_data",
            ["no_data"],
            "--data own:no_data: calling it, without arguments, failed (FileNotFoundErr",
        ),
    ],
)
def test_on_the_command_line_a_users_traceback_is_above_our_line(
    option: str, function: str, frames: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2; the traceback begins in the user's file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "own.py").write_text(MODULE)
    given = {"--model": "own:build", "--data": "own:data", "--loss": "cross_entropy", option: f"own:{function}"}
    options = [part for pair in given.items() for part in pair]
    settings = [one for one in SMALL if not one.startswith("dataset.")]
    done = fastar_command("train-star", *options, "--out", "run", "--quiet", *settings, "train.batch_size=20")
    assert done.code == 2, done.err
    assert done.out == ""
    *above, last = done.err.rstrip("\n").split("\n")
    assert last.startswith(f"fastar: {line}")
    assert above[0] == "Traceback (most recent call last):"
    assert re.match(r'  File ".*own\.py", line \d+, in ', above[1])
    assert all(any(f"in {frame}" in one for one in above) for frame in frames)
    assert not any("fastar/" in one for one in above)
    assert not (tmp_path / "run").exists()
