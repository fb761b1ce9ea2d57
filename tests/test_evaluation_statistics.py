"""Batch-norm statistics re-estimated from the population, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from evaluation_cases import alone, assert_unchanged, data, mlp, population_by_hand, resnet, row, snapshot
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.evaluation import evaluate_rows, re_estimate
from fastar.evaluation.batch_norm import (
    BatchStatistics,
    PopulationStatistics,
    evaluating,
    own_statistics,
    set_statistics,
)
from fastar.flat import FlatLayout


def test_the_first_layer_has_the_statistics_of_the_whole_data() -> None:
    """Its inputs depend on no batch: the mean and biased variance of one convolution over all samples, by hand."""
    model, batches = resnet(0), data()
    found = re_estimate(model, batches())
    images = torch.cat([part for part, _ in batches()])
    values = torch.nn.functional.conv2d(images.double(), model.conv1.weight.double(), padding=1)  # type: ignore[union-attr, operator]
    values = values.movedim(1, 0).flatten(1)
    # fp32 convolutions and fp32 batch statistics: 1e-6 of the values' size.
    torch.testing.assert_close(found["bn1.running_mean"].double(), values.mean(1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found["bn1.running_var"].double(), values.var(1, correction=0), rtol=1e-5, atol=0)
    unbiased = values.var(1, correction=1)
    assert (found["bn1.running_var"].double() - unbiased).abs().min() > 1e-4 * unbiased.min()  # told apart


@pytest.mark.parametrize("size", [50, 16, 7])
def test_every_layer_has_the_statistics_of_its_own_inputs(size: int) -> None:
    model, batches = resnet(1), data(size=size)
    found, wanted = re_estimate(model, batches()), population_by_hand(model, batches)
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * 9
    for name, value in wanted.items():  # nine layers of fp32 rounding
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_law_of_total_variance_from_the_batches_moments() -> None:
    """The same from what torch itself keeps of each batch: weighted means, and variances within plus between."""
    model, batches = resnet(2), data()
    moments: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for images, labels in batches():
        single = re_estimate(model, [(images, labels)])
        for name in (key.removesuffix(".running_mean") for key in single if key.endswith("running_mean")):
            positions = len(images) * {"0": 64, "1": 16, "2": 4}[name.split(".")[1] if "stages" in name else "0"]
            moments.setdefault(name, []).append(
                (positions, single[f"{name}.running_mean"].double(), single[f"{name}.running_var"].double())
            )
    found = re_estimate(model, batches())
    for name, parts in moments.items():
        total = sum(n for n, _, _ in parts)
        mean = sum(n * m for n, m, _ in parts) / total  # type: ignore[operator]
        variance = sum(n * (v + (m - mean).square()) for n, m, v in parts) / total  # type: ignore[operator]
        torch.testing.assert_close(found[f"{name}.running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[f"{name}.running_var"].double(), variance, rtol=1e-6, atol=1e-6)


def test_nothing_depends_on_the_statistics_before() -> None:
    model = resnet(3)
    first = re_estimate(model, data()())
    set_statistics(model, {name: torch.full_like(value, 7.0) for name, value in first.items()})
    again = re_estimate(model, data()())
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    """E[x^2] - E[x]^2 cancels; in float64 it leaves what fp32's batch statistics had."""
    model = nn.Sequential(nn.BatchNorm2d(2))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 2, 4, 4, generator=generator) * 0.01 + 100
    found = re_estimate(model, [(part, part) for part in images.split(10)])
    wanted = images.double().movedim(1, 0).flatten(1).var(1, correction=0)
    torch.testing.assert_close(found["0.running_var"].double(), wanted, rtol=1e-2, atol=0)


def test_without_batch_norm_there_is_nothing() -> None:
    assert re_estimate(mlp(0), data()()) == {}


def test_a_layer_used_twice_is_refused() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    before = snapshot(model)
    with pytest.raises(FastarError, match="batch-norm layer 0 is used twice"):
        re_estimate(model, data()())
    assert_unchanged(model, before)


# The model is left as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["population", "reference"])
def test_the_model_is_left_as_it_was(method: str, training: bool) -> None:
    model = resnet(0).train(training)
    model.stages[1].eval()  # type: ignore[index, operator]
    model.bn1.momentum = None  # type: ignore[union-attr]
    before = snapshot(model)
    rows = torch.stack([row(resnet(1)), row(resnet(2))])
    evaluate_rows(
        model, FlatLayout.from_module(model), rows, {"train": data()}, statistics_batches=data(), method=method
    )
    assert_unchanged(model, before)
    re_estimate(model, data()())
    assert_unchanged(model, before)


def breaking(after: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i, batch in enumerate(data()()):
        if i == after:
            raise OSError("the disk is gone")
        yield batch


@pytest.mark.parametrize("where", ["statistics", "losses"])
@pytest.mark.parametrize("method", ["population", "reference"])
def test_the_model_is_left_as_it_was_after_an_error(method: str, where: str) -> None:
    model = resnet(0)
    model.bn1.momentum = 0.3  # type: ignore[union-attr]
    before = snapshot(model)
    precision = torch.get_float32_matmul_precision()
    with pytest.raises(OSError, match="the disk is gone"):
        evaluate_rows(
            model,
            FlatLayout.from_module(model),
            row(resnet(1))[None],
            {"train": (lambda: breaking(2)) if where == "losses" else data()},
            statistics_batches=(lambda: breaking(2)) if where == "statistics" else data(),
            method=method,
        )
    assert_unchanged(model, before)
    assert torch.get_float32_matmul_precision() == precision
    with pytest.raises(OSError, match="the disk is gone"):
        re_estimate(model, breaking(2))
    assert_unchanged(model, before)


def test_the_rows_are_only_read() -> None:
    model = resnet(0)
    rows = torch.stack([row(resnet(1)), row(resnet(2))])
    before = rows.clone()
    evaluate_rows(model, FlatLayout.from_module(model), rows, {"train": data()}, statistics_batches=data())
    assert torch.equal(rows, before)


# Many models at once


def test_statistics_do_not_depend_on_who_is_evaluated_beside() -> None:
    models = [resnet(seed) for seed in (1, 2, 3)]
    template = resnet(0)
    layout = FlatLayout.from_module(template)
    rows = torch.stack([row(model) for model in models])
    together = evaluate_rows(template, layout, rows, {"a": data()}, statistics_batches=data())["a"]
    for k, model in enumerate(models):
        single = evaluate_rows(template, layout, rows[k : k + 1], {"a": data()}, statistics_batches=data())["a"]
        assert single.loss[0] == together.loss[k]  # the same operations: the same bits
        loss, accuracy = alone(model, data(), population_by_hand(model, data()))
        assert float(single.loss[0]) == pytest.approx(loss, rel=2e-5)  # fp32 through nine layers
        assert float(single["accuracy"][0]) == accuracy


def test_given_statistics_are_used_as_they_are() -> None:
    models, template = [resnet(1), resnet(2)], resnet(0)
    rows = torch.stack([row(model) for model in models])
    found = evaluate_rows(
        template,
        FlatLayout.from_module(template),
        rows,
        {"a": data()},
        statistics=[own_statistics(models[0]), None],
        statistics_batches=data(),
    )["a"]
    assert float(found.loss[0]) == pytest.approx(alone(models[0], data())[0], rel=2e-5)
    re_estimated = alone(models[1], data(), population_by_hand(models[1], data()))[0]
    assert float(found.loss[1]) == pytest.approx(re_estimated, rel=2e-5)
    assert abs(re_estimated - alone(models[1], data())[0]) > 0.01  # it makes a difference


def test_the_references_way_is_a_moving_average_with_momentum_a_tenth() -> None:
    template, model = resnet(0), resnet(1)
    plain = resnet(1).train()
    plain.load_state_dict({**plain.state_dict(), **own_statistics(template)})
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.momentum == 0.1  # torch's own moving average is the oracle
    with torch.no_grad():
        for images, _ in data()():
            plain(images)
    template.bn1.momentum = 0.9  # type: ignore[union-attr]  # the template's momentum is not what counts
    found = evaluate_rows(
        template,
        FlatLayout.from_module(template),
        row(model)[None],
        {"a": data()},
        statistics_batches=data(),
        method="reference",
    )["a"]
    assert float(found.loss[0]) == pytest.approx(alone(plain, data())[0], rel=2e-5)


def test_batch_norm_without_data_is_refused() -> None:
    model = resnet(0)
    with pytest.raises(FastarError, match="statistics_batches are needed"):
        evaluate_rows(model, FlatLayout.from_module(model), row(model)[None], {"a": data()})


def test_an_unknown_method_is_refused() -> None:
    model = resnet(0)
    with pytest.raises(ValueError, match="method='popluation': population or reference"):
        evaluate_rows(
            model,
            FlatLayout.from_module(model),
            row(model)[None],
            {"a": data()},
            statistics_batches=data(),
            method="popluation",
        )


def test_a_model_that_overflows_is_named_and_spoils_no_other() -> None:
    """Torch's batch-norm adds to 0 times what its buffer held: NaN, if that was infinite."""
    template = resnet(0)
    layout = FlatLayout.from_module(template)
    rows = torch.stack([row(resnet(1)), row(resnet(2)) * 1e25, row(resnet(3))])
    with pytest.raises(FastarError, match=r"^two has a loss that is not finite on a: its weights"):
        evaluate_rows(template, layout, rows, {"a": data()}, statistics_batches=data(), called=["one", "two", "three"])
    batch = BatchStatistics(template)
    both = [PopulationStatistics(batch) for _ in range(2)]
    with torch.no_grad(), evaluating(template), batch.capturing():
        for images, _ in data()():
            for scale, population in zip((1e30, 1.0), both, strict=True):
                template(images * scale)
                population.add()
    spoilt, sound = (population.result() for population in both)
    assert not all(value.isfinite().all() for value in spoilt.values())
    wanted = re_estimate(template, data()())
    assert all(torch.equal(value, wanted[name]) for name, value in sound.items())


@pytest.mark.parametrize("build", [resnet, mlp])
def test_the_caller_s_autocast_changes_no_figure(build: Callable[[int], nn.Module]) -> None:
    template, rows = build(0), torch.stack([row(build(1)), row(build(2))])

    def losses() -> list[float]:
        layout = FlatLayout.from_module(template)
        return evaluate_rows(template, layout, rows, {"a": data()}, statistics_batches=data())["a"].loss.tolist()

    wanted = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            assert template(next(iter(data()()))[0]).dtype == torch.bfloat16
        assert losses() == wanted
        assert torch.is_autocast_enabled("cpu")
