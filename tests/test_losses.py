"""Losses and metrics, each against plain torch in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import Largest, WithLogits, drawn, labels, measured
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.losses import find_loss, prediction, split_of


def close(value: float | Tensor) -> Any:
    """Sums of some hundred fp32 numbers, against float64."""
    return pytest.approx(float(value), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), 1), ((6, 5, 3, 2), 1), ((6, 4, 5), 2)], ids=["samples", "pixels", "tokens"]
)
def test_cross_entropy(shape: tuple[int, ...], axis: int, smoothing: float) -> None:
    logits = drawn(*shape)
    targets = labels(5, *(n for i, n in enumerate(shape) if i != axis))
    targets[0] = -100
    loss, wide = find_loss("cross_entropy"), logits.double().movedim(axis, 1)
    found = measured(loss, [(logits, targets)])
    kept = targets != -100
    assert found["loss"] == close(F.cross_entropy(wide, targets))
    assert found["accuracy"] == close((wide.argmax(1) == targets)[kept].double().mean())
    trained = loss.mean(logits, targets, smoothing)
    assert float(trained) == close(F.cross_entropy(wide, targets, label_smoothing=smoothing))


def test_cross_entropy_of_probabilities_and_of_small_whole_numbers() -> None:
    logits, loss = drawn(6, 5), find_loss("cross_entropy", ["accuracy", "top5"])
    shares = drawn(6, 5, seed=2).softmax(1)
    found = measured(loss, [(logits, shares)])
    assert found["loss"] == close(F.cross_entropy(logits.double(), shares.double()))
    assert found["accuracy"] == close((logits.argmax(1) == shares.argmax(1)).double().mean())
    assert found["top5"] == 1.0
    for dtype in (torch.uint8, torch.int32):
        targets = labels(5, 6)
        small = targets.to(dtype)
        assert float(loss.mean(logits, small, 0.1)) == float(loss.mean(logits, targets, 0.1))
        assert measured(loss, [(logits, small)]) == measured(loss, [(logits, targets)])


def test_the_five_largest_logits() -> None:
    logits = drawn(40, 9)
    targets = labels(9, 40)
    targets[:3] = -100
    best = logits.topk(5).indices[3:]
    wanted = (best == targets[3:, None]).any(1).double().mean()
    assert measured(find_loss("cross_entropy", ["top5"]), [(logits, targets)])["top5"] == close(wanted)


@pytest.mark.parametrize(
    "shapes", [((7,), (7,)), ((7, 1), (7,)), ((7,), (7, 1)), ((7, 3), (7, 3)), ((7, 2, 4, 1),) * 2]
)
def test_squared_errors(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    outputs, targets = drawn(*shapes[0]), drawn(*shapes[1], seed=3)
    found = measured(find_loss("mse", ["rmse", "mae"]), [(outputs, targets)])
    difference = outputs.double().flatten() - targets.double().flatten()
    assert found["loss"] == close(difference.square().mean())
    assert found["rmse"] == close(difference.square().mean().sqrt())
    assert found["mae"] == close(difference.abs().mean())


@pytest.mark.parametrize("name", ["mse", "bce"])
@pytest.mark.parametrize("shapes", [((7, 7), (7,)), ((7, 1), (7, 7)), ((7, 3), (7, 1)), ((6,), (7,))])
def test_shapes_that_torch_would_stretch_are_refused(name: str, shapes: Any) -> None:
    with pytest.raises(FastarError, match=r"give one shape for both") as refused:
        find_loss(name).mean(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    assert str(list(shapes[0])) in str(refused.value)
    assert str(list(shapes[1])) in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_several_labels(dtype: torch.dtype) -> None:
    logits, targets = drawn(8, 5), labels(2, 8, 5).to(dtype)
    found = measured(find_loss("bce"), [(logits, targets)])
    wanted = F.binary_cross_entropy_with_logits(logits.double(), targets.double())
    assert found["loss"] == close(wanted)
    assert float(find_loss("bce").mean(logits, targets)) == close(wanted)
    assert found["label_accuracy"] == close(((logits > 0) == targets.bool()).double().mean())


def test_language_models_predict_the_next_token() -> None:
    """Token i + 1 from place i; those that are ignored count nowhere."""
    logits, tokens = drawn(3, 6, 11), labels(11, 3, 6)
    tokens[0, 3:] = -100
    loss = find_loss("lm", ["perplexity", "token_accuracy"])
    found = measured(loss, [(logits, tokens)])
    kept = [(b, i) for b in range(3) for i in range(5) if tokens[b, i + 1] != -100]
    logs = logits.double().log_softmax(-1)
    wanted = -sum(float(logs[b, i, tokens[b, i + 1]]) for b, i in kept) / len(kept)
    assert found["loss"] == close(wanted)
    assert float(loss.mean(logits, tokens)) == close(wanted)
    assert found["perplexity"] == close(math.exp(wanted))
    right = [float(logits[b, i].argmax() == tokens[b, i + 1]) for b, i in kept]
    assert found["token_accuracy"] == close(sum(right) / len(right))


@pytest.mark.parametrize("name", ["lm", "cross_entropy"])
def test_a_mean_is_over_all_tokens_of_a_split(name: str) -> None:
    """Batches of unequal numbers of tokens count by these."""
    logits, tokens = drawn(6, 8, 5), labels(5, 6, 8)
    tokens[0, 1:] = -100
    tokens[1, 2:] = -100
    loss = find_loss(name)
    whole = measured(loss, [(logits, tokens)])
    parts = measured(loss, [(logits[:2], tokens[:2]), (logits[2:3], tokens[2:3]), (logits[3:], tokens[3:])])
    of_batches = (float(loss.mean(logits[:2], tokens[:2])) + float(loss.mean(logits[2:], tokens[2:]))) / 2
    assert parts == {key: close(value) for key, value in whole.items()}
    assert parts["loss"] != close(of_batches)


def test_a_function_of_outputs_and_batch() -> None:
    outputs, inputs, targets = drawn(7, 2), drawn(7, 3, seed=4), labels(2, 7)

    def weighted(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(outputs, y, reduction="none") * x[:, 0].abs()

    def size(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0].square().sum(1)

    loss = find_loss(weighted, [size, "accuracy"])
    assert loss.names == ["loss", "size", "accuracy"]
    _, given = split_of(nn.Linear(3, 2), whole=loss.whole)((inputs, targets))
    wanted = F.cross_entropy(outputs.double(), targets, reduction="none") * inputs.double()[:, 0].abs()
    found = measured(loss, [(outputs[:5], (inputs[:5], targets[:5])), (outputs[5:], (inputs[5:], targets[5:]))])
    assert found["loss"] == close(wanted.mean())
    assert found["size"] == close(inputs.double().square().sum(1).mean())
    assert found["accuracy"] == close((outputs.argmax(1) == targets).double().mean())
    assert float(loss.mean(outputs, given)) == close(wanted.mean())


def test_a_users_metric_beside_a_named_loss() -> None:
    outputs, inputs, targets = drawn(6, 4), drawn(6, 3), labels(4, 6)

    def margin(outputs: Tensor, batch: Any) -> Tensor:
        best = outputs.topk(2).values
        return best[:, 0] - best[:, 1]

    plain, loss = find_loss("cross_entropy", ["accuracy"]), find_loss("cross_entropy", ["accuracy", margin])
    assert loss.whole
    assert not plain.whole
    found, of_plain = measured(loss, [(outputs, (inputs, targets))]), measured(plain, [(outputs, targets)])
    best = outputs.double().topk(2).values
    assert found == {**of_plain, "margin": close((best[:, 0] - best[:, 1]).mean())}
    assert torch.equal(loss.mean(outputs, (inputs, targets), 0.1), plain.mean(outputs, targets, 0.1))


@pytest.mark.parametrize(
    ("module", "targets"),
    [
        (nn.CrossEntropyLoss(reduction="none"), labels(5, 6)),
        (nn.MSELoss(reduction="none"), drawn(6, 5, seed=5)),
        (nn.L1Loss(reduction="none"), drawn(6, 5, seed=5)),
        (nn.SmoothL1Loss(reduction="none"), drawn(6, 5, seed=5)),
        (nn.BCEWithLogitsLoss(reduction="none"), labels(2, 6, 5).float()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_loss_modules_of_torch(module: Any, targets: Tensor) -> None:
    outputs, loss = drawn(6, 5), find_loss(module)
    wanted = type(module)()(outputs.double(), targets if targets.dtype == torch.int64 else targets.double())
    assert loss.name == type(module).__name__
    assert loss.names == ["loss"]
    assert float(loss.mean(outputs, targets)) == close(wanted)
    assert measured(loss, [(outputs[:4], targets[:4]), (outputs[4:], targets[4:])])["loss"] == close(wanted)


def test_ignored_targets_of_a_loss_module() -> None:
    outputs, targets = drawn(3, 5, 4), labels(5, 3, 4)
    targets[0, 1:] = 2
    module = nn.CrossEntropyLoss(reduction="none", ignore_index=2)
    wanted = nn.CrossEntropyLoss(ignore_index=2)(outputs.double(), targets)
    assert measured(find_loss(module), [(outputs, targets)])["loss"] == close(wanted)


@pytest.mark.parametrize("ignored", [-100, 2])
def test_weighted_classes_have_the_mean_of_torch(ignored: int) -> None:
    """Of tokens too, over all batches; the weights may be of another device than the outputs."""
    outputs, targets, weight = drawn(4, 5, 3), labels(5, 4, 3), torch.rand(5) + 0.5
    targets[0, 1:] = ignored
    loss = find_loss(nn.CrossEntropyLoss(weight, reduction="none", ignore_index=ignored))
    wanted = nn.CrossEntropyLoss(weight.double(), ignore_index=ignored)(outputs.double(), targets)
    assert float(loss.mean(outputs, targets)) == close(wanted)
    assert measured(loss, [(outputs[:1], targets[:1]), (outputs[1:], targets[1:])])["loss"] == close(wanted)
    away = find_loss(nn.CrossEntropyLoss(weight.to("meta"), reduction="none"))
    assert away.mean(outputs.to("meta"), targets.to("meta")).is_meta
    here = find_loss(nn.CrossEntropyLoss(weight, reduction="none"))
    assert here.mean(outputs.to("meta"), targets.to("meta")).is_meta


def test_metrics_in_the_form_of_torchmetrics() -> None:
    """Each model has a copy of its own, and the user's object is left alone."""
    given = Largest()
    loss = find_loss("mse", [given, "mae"])
    outputs, targets = drawn(6, 2), drawn(6, 2, seed=6)
    found = measured(loss, [(outputs[:4], targets[:4]), (outputs[4:], targets[4:])])
    assert found["Largest"] == close(outputs.max())
    assert measured(loss, [(outputs[:1], targets[:1])])["Largest"] == close(outputs[:1].max())
    assert given.found == -torch.inf
    with_batches = find_loss(lambda outputs, batch: outputs[:, 0], [given])
    assert measured(with_batches, [(outputs, (drawn(6, 3), targets))])["Largest"] == close(outputs.max())


def test_torchmetrics_itself() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    logits, targets = drawn(30, 4), labels(4, 30)
    given = torchmetrics.classification.MulticlassAccuracy(4, average="micro")
    found = measured(find_loss("cross_entropy", ["accuracy", given]), [(logits, targets)])
    assert found["MulticlassAccuracy"] == close(found["accuracy"])


LOGITS = drawn(4, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        (LOGITS, "hidden"),
        [LOGITS, LOGITS + 1],
        {"loss": torch.zeros(()), "logits": LOGITS},
        {"aux": LOGITS + 1, "out": LOGITS},
        {"anything": LOGITS, "text": "x"},
        WithLogits(LOGITS),
        LOGITS.double(),
    ],
    ids=["tensor", "tuple", "list", "logits", "out", "one", "object", "double"],
)
def test_the_prediction_of_outputs(outputs: Any) -> None:
    assert torch.equal(prediction(outputs), LOGITS)
    assert float(find_loss("cross_entropy").mean(outputs, labels(3, 4))) > 0


def test_outputs_without_the_expected_key_list_those_that_are_there() -> None:
    with pytest.raises(FastarError, match=r"have no 'logits'; their keys are 'mu', 'sigma'"):
        prediction({"mu": LOGITS, "sigma": LOGITS})
    with pytest.raises(FastarError, match=r"the network returns tuple of str"):
        prediction(("a", LOGITS))
    with pytest.raises(FastarError, match=r"the network returns NoneType"):
        prediction(None)


class Two(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return left * scale + right


def test_batches_of_every_form() -> None:
    x, z, y = drawn(4, 3), drawn(4, 3, seed=7), labels(3, 4)
    split = split_of(Two(), whole=False)
    inputs, targets = split((x, z, y))
    assert isinstance(inputs, tuple)
    assert [inputs[0] is x, inputs[1] is z, targets is y] == [True] * 3
    assert split([[x, z], y])[0] == (x, z)
    named = {"left": x, "right": z, "labels": y, "id": torch.arange(4)}
    inputs, targets = split(named)
    assert inputs.keys() == {"left", "right"}
    assert targets is y
    assert split_of(Two(), whole=True)(named) == (inputs, named)
    assert split((x, y)) == (x, y)
    assert split((x,)) == (x, x)
    assert split(x)[1] is x
    tokens = split_of(nn.Embedding(3, 2), whole=False)({"input": y})
    assert tokens[0] == {"input": y}
    assert tokens[1] is y  # a language model's targets are its tokens
    with pytest.raises(FastarError, match=r"has the keys 'a', 'label', and the network's forward takes none of them"):
        split({"a": x, "label": y})
    with pytest.raises(FastarError, match=r"a batch is str"):
        split("abc")


def scalar(outputs: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(outputs, batch[1])


def square(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch[1]) ** 2


def number(outputs: Tensor, batch: Any) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (scalar, r'loss scalar returns a tensor of shape \[\], .* each of 4 samples: .*reduction="none"'),
        (square, r"loss square returns a tensor of shape \[4, 3\], and must return one number for each of 4 samples"),
        (number, r"loss number returns float, and must return one number"),
    ],
)
def test_what_a_users_loss_must_return(chosen: Any, says: str) -> None:
    with pytest.raises(FastarError, match=says) as refused:
        find_loss(chosen).mean(LOGITS, (LOGITS, LOGITS))
    assert "\n" not in str(refused.value)
    with pytest.raises(FastarError, match=says.replace("loss ", "metric ", 1)):
        measured(find_loss("mse", [chosen]), [(LOGITS, (LOGITS, LOGITS))])


def test_a_users_loss_that_raises_says_where_it_was_called() -> None:
    def broken(outputs: Tensor, batch: Any) -> Tensor:
        raise KeyError("weight")

    with pytest.raises(FastarError, match=r"loss broken failed \(KeyError: 'weight'\)") as refused:
        find_loss(broken).mean(LOGITS, (LOGITS, LOGITS))
    assert isinstance(refused.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "says"),
    [
        ("cross_entropy", LOGITS, drawn(4), r"network gives float32 \[4, 3\], the targets are float32 \[4\]"),
        ("cross_entropy", LOGITS, labels(3, 5), r"network gives float32 \[4, 3\], the targets are int64 \[5\]"),
        ("cross_entropy", LOGITS, labels(3, 4, 1), r"targets are int64 \[4, 1\]"),
        ("cross_entropy", LOGITS, "cat", r"the targets are str"),
        ("lm", LOGITS, labels(3, 4), r"lm takes logits \[batch, tokens, vocabulary\]"),
        ("lm", drawn(2, 5, 3), labels(3, 2, 4), r"targets are int64 \[2, 4\]"),
        ("mse", LOGITS, None, r"the targets are NoneType"),
    ],
)
def test_shapes_that_do_not_fit_are_said(name: str, outputs: Any, targets: Any, says: str) -> None:
    with pytest.raises(FastarError, match=says):
        find_loss(name).mean(outputs, targets)


@pytest.mark.parametrize(
    ("chosen", "metrics", "says"),
    [
        ("mes", None, r"unknown loss 'mes': did you mean 'mse'\? choose from cross_entropy, mse, bce, lm, or give"),
        (3, None, r"the loss is a int"),
        (nn.MSELoss(), None, r'loss MSELoss returns one number for a batch: make it with reduction="none"'),
        ("mse", ["maee"], r"unknown metric 'maee': did you mean 'mae'\?"),
        ("mse", ["mae", "mae"], r"two metrics are called mae"),
        ("mse", ["loss"], r"unknown metric 'loss'"),
        ("mse", [3], r"a metric is a int"),
        ("mse", "mae,rmse", r"give a list of metrics"),
        ("mse", [Largest], r"metric Largest is a class"),
    ],
)
def test_choices_that_are_wrong(chosen: Any, metrics: Any, says: str) -> None:
    with pytest.raises(FastarError, match=says):
        find_loss(chosen, metrics)


def test_a_metric_of_many_numbers_is_refused() -> None:
    class Counts(Largest):
        def compute(self) -> Tensor:
            return torch.zeros(3)

    with pytest.raises(FastarError, match=r"metric Counts: compute\(\) returns \[3\], not one number"):
        measured(find_loss("mse", [Counts()]), [(LOGITS, LOGITS)])


def test_models_of_a_pass_are_measured_apart() -> None:
    """Each as if it were alone; targets that are ignored count for none."""
    outputs, targets = [drawn(6, 3, seed=seed) for seed in (0, 1)], labels(3, 6)
    targets[2] = -100
    for name, metric in find_loss("cross_entropy", ["accuracy", Largest()]).measures().items():
        totals = metric.begin(torch.device("cpu"), 2)
        for _ in range(2):
            for model, one in enumerate(outputs):
                totals.add(model, one, targets)
        alone = [measured(find_loss("cross_entropy", ["accuracy", Largest()]), [(one, targets)]) for one in outputs]
        assert totals.values() == pytest.approx([found[name] for found in alone]), name
