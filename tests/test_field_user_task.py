"""What a user's task may be given, and what is said of what does not fit."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import Heard
from safetensors.torch import save_file
from task_cases import Net, build, recipe, tensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from typer.testing import CliRunner

import fastar
from fastar import FastarError, Recipe
from fastar.cli.main import app
from fastar.errors import UserCodeError
from fastar.experiments.reuse import matching_paths
from fastar.runtime.user_code import find_function, source_digest, users_traceback

RECIPE = Recipe(epochs=1, batch_size=16)


class Tied(nn.Module):
    """A language model whose tokens go in and out by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden, self.out = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.tokens(x))))


def test_tied_weights_are_trained_saved_and_read_again(tmp_path: Path):
    tokens = torch.randint(7, (32, 6), generator=torch.Generator().manual_seed(0))
    sources = fastar.train_sources(Tied, tokens, RECIPE, number=2, loss="lm", out=tmp_path / "run", progress=False)
    star = fastar.train_star(Tied, sources, tokens, RECIPE, loss="lm", out=tmp_path / "run", progress=False)
    assert torch.equal(star.state["tokens.weight"], star.state["out.weight"])
    assert star.barrier(sources[0]).value >= 0
    again = fastar.load_run(tmp_path / "run", Tied)
    assert torch.equal(again.sources[1].module()(tokens), sources[1].module()(tokens))
    given = [one.module() for one in sources]
    other = fastar.train_star(Tied, given, tokens, RECIPE, loss="lm", progress=False)
    assert all(torch.equal(value, star.state[name]) for name, value in other.state.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_type_is_trained_in_float32(dtype: torch.dtype):
    [one] = fastar.train_sources(lambda: build().to(dtype), tensors(), RECIPE, number=1, progress=False)
    assert {value.dtype for value in one.state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (lambda: nn.LazyLinear(3), "parameters without a shape yet; run one batch through its lazy modules first"),
        (lambda: torch.compile(build()), "returned a compiled network; return it as it is, and set train.compile=true"),
        (lambda: nn.DataParallel(build()), "give the network inside, its .module"),
    ],
)
def test_networks_that_cannot_be_trained_as_they_are(made: Any, line: str):
    with pytest.raises(FastarError, match=line):
        fastar.train_sources(made, tensors(), RECIPE, number=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"kind": "heldouts"}, "kind is 'heldouts': choose source or heldout"),
        ({"number": "2"}, "number is '2': give a whole number of networks, 1 or more"),
        ({"number": 0}, "number is 0: give a whole number of networks, 1 or more"),
        ({"recipe": {"epochs": 1}}, "recipe is a dict: give a fastar.Recipe"),
        ({"metrics": "accuracy"}, r"metrics is one text: give a list, \['accuracy'\]"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], line: str):
    with pytest.raises(FastarError, match=line):
        fastar.train_sources(build, tensors(), **{"recipe": RECIPE, "progress": False, **arguments})


def test_sources_are_a_list_not_one_network():
    for one in (build(), "run/sources", build().state_dict()):
        with pytest.raises(FastarError, match=f"sources is a {type(one).__name__}: give a list of networks"):
            fastar.train_star(build, one, tensors(), RECIPE, progress=False)  # type: ignore[arg-type]
        with pytest.raises(FastarError, match=f"heldouts is a {type(one).__name__}: give a list of networks"):
            fastar.train_star(build, [build()], tensors(), RECIPE, heldouts=one, progress=False)  # type: ignore[arg-type]


def test_other_sources_do_not_take_the_place_of_those_of_a_star(tmp_path: Path):
    first = [build(), build()]
    star = fastar.train_star(build, (one for one in first), tensors(), RECIPE, out=tmp_path / "run", progress=False)  # type: ignore[arg-type]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    with pytest.raises(FastarError, match=r"sources\[0\] is another; choose another out"):
        fastar.train_star(build, [build(), build()], tensors(), RECIPE, out=tmp_path / "run", progress=False)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    again = fastar.train_star(build, first, tensors(), RECIPE, out=tmp_path / "run", progress=False)
    assert all(torch.equal(value, star.state[name]) for name, value in again.state.items())


def test_a_run_is_read_with_data_of_another_shape(tmp_path: Path):
    sources = fastar.train_sources(build, tensors(), RECIPE, number=2, out=tmp_path, progress=False)
    fastar.train_star(build, sources, tensors(), RECIPE, out=tmp_path, progress=False)
    x, y = tensors()
    with pytest.raises(FastarError, match="the network's forward, on the first train batch, failed"):
        fastar.load_run(tmp_path, build, (x[:, :3], y))


def test_a_function_that_cannot_be_called_shows_no_frames_of_fastar():
    with pytest.raises(UserCodeError, match="missing 1 required positional argument") as caught:
        fastar.train_sources(lambda width: build(), tensors(), RECIPE, number=1, progress=False)
    assert users_traceback(caught.value) == ""


def test_a_traceback_is_of_the_users_frames_alone():
    with pytest.raises(UserCodeError) as caught:
        fastar.train_sources(partial(Net, 5), tensors(), RECIPE, number=1, progress=False)
    shown = users_traceback(caught.value)
    assert re.findall(r"in (\w+)\n", shown) == ["forward"]
    assert shown.splitlines()[-1].startswith("RuntimeError: mat1 and mat2")


def test_a_module_that_does_not_parse_is_to_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_nets.py").write_text("def build(: pass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FastarError, match=r"cannot import broken_nets \(SyntaxError.*; mend it"):
        find_function("broken_nets:build", "--model")


def test_files_of_sources_that_are_not_there(tmp_path: Path):
    torch.save(build().state_dict(), tmp_path / "one.pt")
    command = ["plan", "--model", "task_cases:build", "--data", "task_cases:tensors"]
    result = CliRunner().invoke(app, [*command, "--sources-from", str(tmp_path / "no*.pt")])
    assert isinstance(result.exception, FastarError)
    assert "no*.pt: no checkpoint (.safetensors, .pt, .pth, .ckpt, .bin) there" in str(result.exception)
    assert matching_paths(tmp_path / "one.pt") == [tmp_path / "one.pt"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_plan_looks_at_the_names_and_shapes_of_given_sources(suffix: str, tmp_path: Path):
    save = torch.save if suffix == "pt" else save_file
    for number, width in enumerate((6, 6, 7)):
        save(Net(width=width).state_dict(), tmp_path / f"{number}.{suffix}")
    command = ["plan", "--model", "task_cases:build", "--data", "task_cases:tensors_twice", "train.batch_size=9"]
    result = CliRunner().invoke(app, [*command, "--sources-from", str(tmp_path / f"*.{suffix}")])
    assert isinstance(result.exception, FastarError)
    assert f"{tmp_path}/2.{suffix} has 'hidden." in str(result.exception)
    assert "'hidden.weight' of shape [7, 4] where the model's is [6, 4]" in str(result.exception)


@pytest.mark.parametrize("arguments", ["width", "=3"])
def test_model_arguments_that_are_no_pairs(arguments: str):
    command = ["plan", "--model", "task_cases:build", "--data", "task_cases:tensors", "--model-args", arguments]
    result = CliRunner().invoke(app, command)
    assert str(result.exception) == f"--model-args {arguments}: write key=value, such as width=64"


WEIGHT = torch.ones(3)
SCALES = {"loss": 1.0}


class Scaled:
    """A loss that is an object."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.scale * F.cross_entropy(outputs, batch[1], reduction="none")


def by_weight(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1], weight=WEIGHT, reduction="none")


def by_scale(outputs: Tensor, batch: Any) -> Tensor:
    return SCALES["loss"] * F.cross_entropy(outputs, batch[1], reduction="none")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(reduction="none", label_smoothing=0.3)),
        (nn.CrossEntropyLoss(WEIGHT, reduction="none"), nn.CrossEntropyLoss(2 * WEIGHT, reduction="none")),
        (Scaled(1.0), Scaled(2.0)),
        (partial(by_scale, scale=WEIGHT), partial(by_scale, scale=2 * WEIGHT)),
        (by_weight, "WEIGHT"),
        (by_scale, "SCALES"),
    ],
)
def test_a_loss_with_other_values_is_another_loss(first: Any, second: Any, monkeypatch: pytest.MonkeyPatch):
    digest = source_digest([first])
    assert source_digest([copy.deepcopy(first)]) == digest
    if isinstance(second, str):
        monkeypatch.setitem(globals(), second, {"WEIGHT": 2 * WEIGHT, "SCALES": {"loss": 2.0}}[second])
        second = first
    assert source_digest([second]) != digest


def test_data_that_mean_something_else_are_named() -> None:
    x, y = tensors(16)
    for train, words in (
        ([x, y], "is a list of two tensors: give a tuple"),
        ([(x[i], y[i]) for i in range(16)], "give samples, not batches"),
    ):
        with pytest.raises(fastar.FastarError, match=words):
            fastar.train_sources(build, train, recipe(), number=1, progress=False)
    with pytest.raises(fastar.FastarError, match="bce takes targets from 0 to 1; they are from 0 to 5"):
        fastar.train_sources(
            build, (x, torch.full((16, 3), 5.0) * (x[:, :3] > 0)), recipe(), number=1, loss="bce", progress=False
        )
    with pytest.raises(fastar.FastarError, match="a ReLU, has no parameters"):
        fastar.train_sources(nn.ReLU, (x, x), recipe(), number=1, loss="mse", progress=False)


class Listed(Dataset[Any]):
    """A dataset of these tensors."""

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(one[index] for one in self.tensors)


def without_nan(outputs: Tensor, batch: Any) -> Tensor:
    """A loss that knows of missing targets."""
    return (outputs - batch[1].nan_to_num()).square().mean(1)


def test_tensors_of_which_no_loss_can_be_taken_are_named(tmp_path: Path) -> None:
    """Before anything is written; not where the loss knows what to do with them."""
    x, y = tensors(16)
    x[3, 1] = torch.nan
    out = tmp_path / "run"
    train = partial(fastar.train_sources, build, recipe=recipe(), number=1, progress=False)
    says = r"the train data: tensor 0 holds nan at \[3, 1\], and the loss cross_entropy of that sample is nan: replace"
    with pytest.raises(FastarError, match=says):
        train(train=(x, y), out=out)
    with pytest.raises(FastarError, match=r"the test data: tensor 0 holds nan at \[3, 1\]"):
        train(train=tensors(16), test=(x, y), out=out)
    assert not out.exists()
    x, y = x.nan_to_num(), x[:, :3].clone()
    y[3, 1] = torch.inf
    with pytest.raises(FastarError, match=r"tensor 1 holds inf at \[3, 1\], and the loss mse of that sample is inf"):
        train(train=(x, y), loss="mse")
    y[3, 1] = torch.nan
    assert train(train=(x, y), loss=without_nan)[0].value > 0


def test_a_sample_that_is_not_finite_is_named_and_not_tried_again(tmp_path: Path) -> None:
    """A dataset's is named where its batch is met."""
    x, y = tensors(48)
    x[37, 1] = torch.nan
    heard = Heard()
    says = r"tensor 0 of sample 37 of the training data holds nan: replace it, or leave that out"
    with pytest.raises(FastarError, match=rf"training source 0: loss not finite at epoch 1, step \d; {says}"):
        fastar.train_sources(
            build, Listed(x, y), recipe(on_nonfinite="retry"), number=1, out=tmp_path / "run", progress=heard
        )
    assert not any("going back" in line for line in heard.lines)


@pytest.mark.parametrize("number", [3, -1])
def test_classes_that_the_network_does_not_have_are_named(number: int, tmp_path: Path) -> None:
    """Of tensors before anything is written, of a dataset where their batch is met."""
    x, y = tensors(48)
    y[37] = number
    says = f"sample 37 has the class {number}, and the network's outputs are of 3 classes, from 0"
    out = tmp_path / "run"
    with pytest.raises(FastarError, match=f"the train data: {says}"):
        fastar.train_sources(build, (x, y), RECIPE, number=1, out=out, progress=False)
    assert not out.exists()
    with pytest.raises(FastarError, match=f"the train data: {says}"):
        fastar.train_sources(build, Listed(x, y), RECIPE, number=1, out=out, progress=False)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    with pytest.raises(FastarError, match="the train data: sample 5 has the class"):
        fastar.train_sources(build, batches, RECIPE, number=1, out=out, progress=False)
    y[37] = -100  # ignored
    assert fastar.train_sources(build, (x, y), RECIPE, number=1, progress=False)[0].value > 0


def test_a_network_that_cannot_be_matched_may_have_sources_and_no_star(tmp_path: Path) -> None:
    class Spectrum(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](torch.fft.fft(self[0](x)).abs())

    def made() -> nn.Module:
        return Spectrum(nn.Linear(4, 6), nn.Linear(6, 3))

    heard = Heard()
    sources = fastar.train_sources(made, tensors(), RECIPE, number=2, out=tmp_path, progress=heard)
    assert [
        one for one in heard.lines if one.startswith("a star of these networks will be refused as it stands: cannot")
    ]
    with pytest.raises(FastarError, match="cannot derive the permutation groups"):
        fastar.train_star(made, sources, tensors(), RECIPE, out=tmp_path, progress=False)
