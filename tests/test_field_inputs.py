"""What users give `fastar.match`, `match_many`, `apply` and `barrier`, and what torch is set to meanwhile."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastar
from fastar.errors import FastarError
from fastar.models import build_model

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = torch.zeros(2, 1, 4, 4)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*norm, nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 1, 4, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(2)
    ]


@contextmanager
def torch_set_to(what: torch.dtype | str) -> Iterator[None]:
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        if isinstance(what, torch.dtype):
            torch.set_default_dtype(what)
        else:
            torch.set_default_device(what)
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)


def all_results(networks: list[nn.Module], data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What the package computes for three networks, in plain numbers and tensors."""
    found: dict[str, Any] = {}
    for method in ("weight", "activation", "sinkhorn"):
        way: dict[str, Any] = {"method": method, "data": data}
        if method == "sinkhorn":
            way["sinkhorn"] = {"steps": 3, "objective": "random"}
        matched = fastar.match(networks[0], networks[1], example_inputs=EXAMPLE, **way)
        nearer = fastar.apply(matched, networks[1])
        found[method] = dict(matched), matched.result.objective, nearer.state_dict()
    many = fastar.match_many(networks, example_inputs=EXAMPLE)
    assert many.average is not None
    found["many"] = [dict(one) for one in many.permutations], many.average.state_dict(), many.result.objective
    found["barrier"] = vars(fastar.barrier(networks[0], networks[1], data, points=3))
    return found


def assert_same(first: Any, second: Any) -> None:
    """Bits, dtypes and devices too."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert (first.dtype, first.device) == (second.dtype, second.device)
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key, value in first.items():
            assert_same(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.fixture(scope="module")
def given() -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]], dict[str, Any]]:
    networks, data = [network(seed) for seed in range(3)], batches()
    return networks, data, all_results(networks, data)


@pytest.mark.parametrize("what", [torch.float64, "meta"], ids=str)
def test_results_are_the_same_under_any_default_dtype_and_device(what: torch.dtype | str, given: Any) -> None:
    networks, data, expected = given
    with torch_set_to(what):
        assert_same(all_results(networks, data), expected)


@pytest.mark.parametrize("arch", ["mlp", "resnet8", "vit"])
def test_models_are_made_in_float32_under_any_default_dtype(arch: str) -> None:
    def made() -> dict[str, Tensor]:
        return dict(build_model(arch, input_shape=(1, 8, 8), classes=3, seed=1).state_dict())

    expected = made()
    with torch_set_to(torch.float64):
        assert_same(made(), expected)
        assert torch.get_default_dtype() == torch.float64


def test_every_tensor_that_is_made_says_its_dtype_and_device() -> None:
    """Models aside, whose layers are torch's: they are made under a default of their own, on the device that is set."""
    floating = {"zeros", "ones", "empty", "rand", "randn", "full", "tensor", "linspace", "eye", "empty_strided"}
    whole = {"arange", "randint", "randperm", "as_tensor", "asarray"}
    silent = []
    for file in sorted([*ROOT.glob("fastar/**/*.py"), *ROOT.glob("kernels/*.py")]):
        if file.parent.name == "models":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                name, said = ast.unparse(node.func).removeprefix("torch."), {word.arg for word in node.keywords}
                needed = {"dtype", "device"} if name in floating else {"device"} if name in whole else set()
                if needed - said:
                    silent.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not silent


IMAGES, LABELS = (torch.cat(parts) for parts in zip(*batches(), strict=True))
NETWORKS = network(0), network(1)
STATE = NETWORKS[1].state_dict()
HWC = IMAGES.permute(0, 2, 3, 1)


def match(*networks: Any, **more: Any) -> fastar.Matched:
    return fastar.match(*networks, example_inputs=EXAMPLE, **more)


def said_by(call: Callable[[], object]) -> str:
    with pytest.raises(FastarError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (STATE, "is of type OrderedDict, not a network: a state dict? give the network, with it loaded"),
        (dict(STATE), "is of type dict, not a network: a state dict?"),
        (nn.Sequential, "is the class Sequential, not a network: give a network, such as Sequential(...)"),
        (network, "is of type function, not a network: give the network that it makes"),
        ("model.pt", "is of type str, not a network"),
        (None, "is of type NoneType, not a network"),
        (nn.DataParallel(NETWORKS[1]), "is a DataParallel: give the network inside, its .module"),
    ],
)
def test_what_came_where_a_network_is_expected(given: Any, said: str) -> None:
    one = NETWORKS[0]
    for number, call in enumerate((match, lambda a, b: fastar.barrier(a, b, batches()))):
        assert said_by(lambda call=call: call(given, one)).startswith(f"model_a {said}"), number
        assert said_by(lambda call=call: call(one, given)).startswith(f"model_b {said}"), number
    assert f"models[1] {said}" in said_by(lambda: fastar.match_many([one, given], example_inputs=EXAMPLE))
    permutations = fastar.Matched({}, None, None)  # type: ignore[arg-type]
    assert f"model {said}" in said_by(lambda: fastar.apply(permutations, given))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_no_network_that_can_be_changed() -> None:
    traced = torch.jit.trace(NETWORKS[0].eval(), EXAMPLE)
    assert "model_b is TorchScript" in said_by(lambda: match(NETWORKS[0], traced))


def test_what_came_where_many_or_permutations_are_expected() -> None:
    for given, kind in ((nn.ModuleList(NETWORKS), "ModuleList"), (iter(NETWORKS), "tuple_iterator"), ({}, "dict")):
        said = said_by(lambda given=given: fastar.match_many(given, example_inputs=EXAMPLE))
        assert said == f"models is a {kind}: give a list of networks"
    said = said_by(lambda: fastar.apply({"0": torch.arange(6)}, NETWORKS[0]))  # type: ignore[arg-type]
    assert said.startswith("permutations are a dict: give what fastar.match returned")


WANTED = "give (inputs, labels) batches: a DataLoader, a list, a function that begins a new pass, or two tensors"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, f"data is int: {WANTED}"),
        ("train", f"data is str: {WANTED}"),
        (NETWORKS[0], f"data is Sequential: {WANTED}"),
        (lambda: None, f"the function given as data returns NoneType: {WANTED}"),
        ((IMAGES.numpy(), LABELS.numpy()), "data is tuple of ndarray, ndarray: make tensors of NumPy's arrays"),
        ([(IMAGES.numpy(), LABELS)], "one is tuple of ndarray, Tensor; torch.from_numpy makes tensors of NumPy's"),
        ((IMAGES, LABELS[:3]), "data: 32 inputs and 3 labels; give one label for each"),
        ((IMAGES, LABELS[0]), "data: 32 inputs and no labels"),
        ((HWC, LABELS), "(these look like [batch, height, width, channels]: inputs.permute(0, 3, 1, 2))"),
        ((IMAGES[:, 0], LABELS), "(float32 [32, 4, 4] on cpu)"),
        ((IMAGES.byte(), LABELS), "(uint8 [32, 1, 4, 4] on cpu)"),
        ((IMAGES.expand(-1, 3, -1, -1), LABELS), "does not run on a batch of inputs (float32 [32, 3, 4, 4] on cpu)"),
        ([], "there is no"),
    ],
)
def test_what_came_where_batches_are_expected(given: Any, said: str) -> None:
    """In one line, of data and of those for statistics."""
    assert said in said_by(lambda: fastar.barrier(*NETWORKS, given))
    statistics = said_by(lambda: fastar.barrier(*NETWORKS, batches(), statistics_data=given))
    assert said.replace("data is", "statistics_data is").replace("as data", "as statistics_data") in statistics


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (IMAGES, "the targets are float32 [32, 1, 4, 4]"),
        ({"images": IMAGES, "labels": LABELS}, "the network's forward takes none of them: it takes input"),
        ([(IMAGES, LABELS, LABELS)], "does not run on a batch of inputs (float32 [32, 1, 4, 4], int64 [32] on cpu)"),
        ([(IMAGES, LABELS.tolist())], "labels must be whole numbers, one for each of 32 inputs; they are list of int"),
        ([{"x": IMAGES, "y": LABELS}], "a batch has the keys 'x', 'y'"),
    ],
)
def test_batches_of_a_form_that_this_network_or_loss_does_not_take(given: Any, said: str) -> None:
    assert said in said_by(lambda: fastar.barrier(*NETWORKS, given))


def test_a_dataset_is_taken_as_its_samples() -> None:
    whole = fastar.barrier(*NETWORKS, TensorDataset(IMAGES, LABELS), points=3)
    assert whole == fastar.barrier(*NETWORKS, (IMAGES, LABELS), points=3)


def test_what_came_where_batches_to_match_by_are_expected() -> None:
    said = "the model, on data, does not run on a batch of inputs (float32 [32, 4, 4, 1] on cpu)"
    assert said in said_by(lambda: match(*NETWORKS, data=(HWC, LABELS), method="activation"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([(IMAGES[0], LABELS[0])], "of shape [] (one sample? wrap it in a DataLoader: data is to be batches)"),
        ([(IMAGES, LABELS[:5])], "one for each of 32 inputs; they are torch.int64 of shape [5]"),
        ([(IMAGES, LABELS.float())], "they are torch.float32 of shape [32]"),
        ([(IMAGES, LABELS), (IMAGES, LABELS + 3)], "labels from 3 to 5, where the model has 3 classes, from 0"),
        ((IMAGES[:0], LABELS[:0]), "no data"),
    ],
)
def test_labels_that_do_not_fit(data: Any, said: str) -> None:
    assert said in said_by(lambda: fastar.barrier(*NETWORKS, data))


def test_labels_that_a_loss_to_match_by_cannot_take() -> None:
    by_loss = {"method": "sinkhorn", "sinkhorn": {"objective": "mid", "steps": 1}}
    for labels, said in (
        (LABELS + 3, "labels from 3 to 5, where the model has 3 classes, from 0"),
        (LABELS.float(), "they are torch.float32 of shape [32]"),
        (LABELS[:5], "one for each of 32 inputs; they are torch.int64 of shape [5]"),
    ):
        assert said in said_by(lambda labels=labels: match(*NETWORKS, data=[(IMAGES, labels)], **by_loss))
    whole, short = (match(*NETWORKS, data=[(IMAGES, one)], **by_loss) for one in (LABELS, LABELS.int()))
    assert whole == short


def test_points_are_a_whole_number() -> None:
    for points in (1, 2.5, "3"):
        said = said_by(lambda points=points: fastar.barrier(*NETWORKS, batches(), points=points))
        assert said.startswith(f"points={points}: a path needs its two ends")


def test_data_that_are_shuffled_are_begun_as_often_as_before() -> None:
    """Each pass of a DataLoader draws from torch's generator: once to look at the first batch, then for the passes."""
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True)
    torch.manual_seed(0)
    fastar.barrier(*NETWORKS, data, points=3, statistics_data=data)
    after = torch.rand(())
    torch.manual_seed(0)
    for _ in range(3):
        list(data)
    assert torch.rand(()) == after


class Words(nn.Module):
    """A table of words, and what reads them out: one parameter, two, or two that share memory."""

    def __init__(self, seed: int, kind: str):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.table, self.hidden, self.out = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        if kind == "one":
            self.out.weight = self.table.weight
        elif kind == "shared":
            self.out.weight.data = self.table.weight.data

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.hidden(self.table(x).mean(1))))
        return logits


WORDS = torch.arange(12).view(3, 4)


def test_two_values_of_what_is_one_parameter() -> None:
    """A path, and an average, could hold but one of them; permutations do not mix them."""
    one, two, equal = Words(0, "one"), Words(1, "two"), Words(1, "two")
    equal.out.weight.data.copy_(equal.table.weight.data)
    data, example = [(WORDS, torch.tensor([0, 1, 2]))], {"example_inputs": WORDS}
    said = "has two values for 'table.weight' and 'out.weight', which are one tensor in the model"
    assert f"model_b {said}: a path can hold but one; tie them" in said_by(lambda: fastar.barrier(one, two, data))
    for way in ({}, {"to": "star", "centre": Words(2, "one")}):
        given = [one, Words(2, "one"), two]
        assert f"models[2] {said}: their average" in said_by(
            lambda given=given, way=way: fastar.match_many(given, **example, **way)
        )
    fastar.barrier(one, equal, data)
    fastar.barrier(two, one, data)
    found = fastar.match_many([one, equal], **example)
    assert found.average is not None
    average = found.average.state_dict()
    assert torch.equal(average["table.weight"], average["out.weight"])
    pairs = fastar.match_many([one, two], to="pairwise", **example)
    assert pairs.average is None
    nearer = fastar.apply(fastar.match(one, two, **example), two)
    torch.testing.assert_close(nearer(WORDS), two(WORDS), rtol=1e-4, atol=1e-5)  # sums in another order


def test_two_parameters_that_share_memory_move_in_one_way() -> None:
    """The permutations of two were applied to one memory, and the network computed something else."""
    shared, two = Words(0, "shared"), Words(1, "two")
    said = "'out.weight' and 'table.weight' are two tensors that share memory, and would have to move in two ways"
    for pair, name in (((shared, two), "model_a"), ((two, shared), "model_b")):
        assert f"{name}: {said}" in said_by(lambda pair=pair: fastar.match(*pair, example_inputs=WORDS))
    matched = fastar.match(two, Words(2, "two"), example_inputs=WORDS)
    assert f"model: {said}" in said_by(lambda: fastar.apply(matched, shared))
