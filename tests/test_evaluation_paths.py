"""Losses along paths: the ends, the barrier's invariants, sharing, and the formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from evaluation_cases import Batches, alone, data, mlp, population_by_hand, resnet, row
from matching_calls import match_weights
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.evaluation import Endpoint, PathLosses, Segment, barrier, barrier_gaps, evaluate_paths, evaluate_rows
from fastar.evaluation.batch_norm import own_statistics
from fastar.evaluation.paths import accuracy_barrier
from fastar.flat import FlatLayout
from fastar.symmetry import derive_symmetry

BUILDERS: dict[str, Callable[[int], nn.Module]] = {"mlp": mlp, "resnet8": resnet}
both = pytest.mark.parametrize("arch", sorted(BUILDERS))


def end(name: str, model: nn.Module) -> Endpoint:
    return Endpoint(name, row(model), own_statistics(model) or None)


def evaluate(
    model: nn.Module,
    paths: list[Segment],
    *,
    points: int = 11,
    resident: int | None = None,
    method: str = "population",
    splits: dict[str, Batches] | None = None,
) -> list[PathLosses]:
    return evaluate_paths(
        model,
        FlatLayout.from_module(model),
        paths,
        splits or {"train": data()},
        points=points,
        statistics_batches=data(),
        method=method,
        resident=resident,
    )


def re_estimated(model: nn.Module) -> dict[str, Tensor] | None:
    return population_by_hand(model, data()) or None


# The formula


def test_barrier_by_hand() -> None:
    assert barrier([0.0, 0.5, 1.0], [1.0, 4.0, 3.0]) == 2.0
    assert barrier([0.0, 0.25, 0.5, 1.0], [4.0, 4.0, 1.0, 0.0]) == 1.0  # line: 4, 3, 2, 0
    assert barrier_gaps([0.0, 0.25, 0.5, 1.0], [4.0, 4.0, 1.0, 0.0]) == [0.0, 1.0, -1.0, 0.0]


@pytest.mark.quick
def test_ends_and_level_lines_have_exactly_no_gap() -> None:
    generator = torch.Generator().manual_seed(0)
    t = [i / 10 for i in range(11)]
    for first, last in torch.rand(200, 2, generator=generator, dtype=torch.float64).tolist():
        gaps = barrier_gaps(t, [first, *[0.5] * 9, last])
        assert gaps[0] == gaps[-1] == 0
        assert barrier_gaps(t, [first] * 11) == [0] * 11
        line = [(1 - s) * first + s * last for s in t]
        assert barrier_gaps(t, line) == pytest.approx([0] * 11, abs=1e-15)  # a few roundings of numbers below 1


def test_barrier_of_a_valley_is_zero() -> None:
    assert barrier([0.0, 0.5, 1.0], [2.0, 0.5, 1.0]) == 0.0


def test_accuracy_barrier_and_largest_loss_by_hand() -> None:
    assert accuracy_barrier([0.0, 0.25, 0.5, 1.0], [1.0, 0.75, 0.25, 0.5]) == -0.5
    assert accuracy_barrier([0.0, 0.5, 1.0], [0.5, 0.875, 1.0]) == 0
    values = {
        "loss": {"train": [1.0, 4.0, 3.0], "test": [5.0, 1.0, 6.0]},
        "top5": {"train": [1.0, 0.0, 1.0], "test": [1.0, 0.0, 1.0]},
        "label_accuracy": {"train": [1.0, 0.25, 0.5], "test": [0.0, 0.5, 1.0]},
        "accuracy": {"train": [0.0, 0.0, 0.0], "test": [0.0, 0.0, 0.0]},
    }
    path = PathLosses("path", "a", "b", [0.0, 0.5, 1.0], values)
    assert [path.largest_loss(split) for split in ("train", "test")] == [4.0, 6.0]
    assert [path.accuracy_barrier(split) for split in ("train", "test")] == [-0.5, 0.0], "of the first accuracy"
    without = PathLosses("path", "a", "b", [0.0, 0.5, 1.0], {"loss": values["loss"]})
    assert without.accuracy_barrier("train") is None


@pytest.mark.parametrize("seed", range(20))
def test_a_finer_grid_that_contains_the_coarser_never_lowers_a_barrier(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    finer = 1 + 60 * int(torch.randint(1, 5, (), generator=draw))
    t = [i / (finer - 1) for i in range(finer)]
    curve = (10 * torch.rand(finer, generator=draw, dtype=torch.float64)).tolist()
    found = []
    for step in (60, 30, 15, 5, 1):
        coarser, values = t[::step], curve[::step]
        found.append([barrier(coarser, values), -accuracy_barrier(coarser, values), max(values)])
    for coarse, fine in itertools.pairwise(found):
        assert all(before <= after for before, after in zip(coarse, fine, strict=True))


def test_barrier_is_no_more_than_a_number_per_split() -> None:
    losses = PathLosses("x", "a", "b", [0.0, 0.5, 1.0], {"loss": {"train": [1.0, 4.0, 3.0], "test": [0.0, 0.5, 0.0]}})
    assert losses.barrier("train") == 2.0
    assert losses.barrier("test") == 0.5


# The ends


@pytest.mark.quick
@both
def test_points_equal_plain_evaluation_of_each_model_alone(arch: str) -> None:
    build = BUILDERS[arch]
    first, second = build(1), build(2)
    (found,) = evaluate(build(0), [Segment("x", end("a", first), end("b", second))], points=5)
    assert found.t == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert (found.first, found.second, found.kind) == ("a", "b", "x")
    ones, others = dict(first.named_parameters()), dict(second.named_parameters())
    for k, t in enumerate(found.t):
        point = build(0)
        with torch.no_grad():
            for name, parameter in point.named_parameters():
                parameter.copy_(((1 - t) * ones[name].double() + t * others[name].double()).float())
        loss, accuracy = alone(point, data(), re_estimated(point))
        assert found.loss["train"][k] == pytest.approx(loss, rel=2e-5)  # fp32 against float64 through nine layers
        assert found.values["accuracy"]["train"][k] == accuracy
    assert barrier(found.t, found.loss["train"]) == found.barrier("train")


@pytest.mark.quick
@both
def test_the_ends_have_exactly_their_own_losses(arch: str) -> None:
    build = BUILDERS[arch]
    model, first, second = build(0), build(1), build(2)
    (found,) = evaluate(model, [Segment("x", end("a", first), end("b", second))])
    rows = torch.stack([row(first), row(second)])
    own = evaluate_rows(model, FlatLayout.from_module(model), rows, {"train": data()}, statistics_batches=data())
    assert [found.loss["train"][0], found.loss["train"][-1]] == own["train"].loss.tolist()
    assert [found.values["accuracy"]["train"][0], found.values["accuracy"]["train"][-1]] == own["train"][
        "accuracy"
    ].tolist()


@pytest.mark.quick
@both
def test_a_path_to_itself_has_no_barrier(arch: str) -> None:
    model = BUILDERS[arch](1)
    same, copy = end("a", model), end("copy", model)
    for path in (Segment("x", same, same), Segment("x", same, copy)):
        (found,) = evaluate(BUILDERS[arch](0), [path])
        assert len(set(found.loss["train"])) == 1  # interpolating equal numbers gives them back bit for bit
        assert found.barrier("train") == 0


@pytest.mark.quick
@both
def test_a_path_to_its_permuted_copy_has_no_barrier_once_matched(arch: str) -> None:
    build = BUILDERS[arch]
    model = build(1)
    layout = FlatLayout.from_module(model)
    symmetry = derive_symmetry(build(0), (torch.zeros(2, 3, 8, 8),), verify=False)
    shuffled = build(0)
    shuffled.load_state_dict(symmetry.apply(symmetry.random(seed=5), model.state_dict()))
    found = match_weights(symmetry, layout.views(row(model)), layout.views(row(shuffled)[None].clone()), seed=0)
    matched = build(0)
    matched.load_state_dict(symmetry.apply(found.permutations.select(0), shuffled.state_dict()))
    assert torch.equal(row(matched), row(model))  # recovered exactly
    paths = [Segment(name, end("a", model), end(name, other)) for name, other in (("raw", shuffled), ("ok", matched))]
    raw, ok = evaluate(build(0), paths)
    assert ok.barrier("train") == 0  # the same bits all along
    assert raw.barrier("train") > 0.01  # unmatched, there is one
    # One function, but its sums run in another order: fp32 rounding.
    assert raw.loss["train"][-1] == pytest.approx(raw.loss["train"][0], rel=2e-5)
    assert raw.values["accuracy"]["train"][-1] == raw.values["accuracy"]["train"][0]


# Every sample once, everyone together


@pytest.mark.quick
def test_every_sample_counts_once() -> None:
    """With an uneven last batch; a mean of batches' means would be another number."""
    model = mlp(1)
    uneven, whole = data(count=50, size=16), data(count=50, size=50)
    layout = FlatLayout.from_module(model)
    found = evaluate_rows(model, layout, row(model)[None], {"uneven": uneven, "whole": whole})
    loss, accuracy = alone(model, whole)
    for measured in found.values():
        assert float(measured.loss[0]) == pytest.approx(loss, rel=1e-6)
        assert float(measured["accuracy"][0]) == accuracy
    means = [alone(model, lambda batch=batch: [batch])[0] for batch in uneven()]
    assert abs(sum(means) / len(means) - loss) > 1e-3 * loss
    assert (accuracy * 50) == pytest.approx(round(accuracy * 50))


def test_models_share_two_passes_over_the_data_and_shared_ends_are_evaluated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    star, others = end("star", resnet(1)), [end(str(seed), resnet(seed)) for seed in (2, 3, 4)]
    passes: list[str] = []

    def counted(name: str) -> Batches:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            passes.append(name)
            return iter(data()())

        return batches

    template = resnet(0)
    shown = 0

    def count(module: nn.Module, args: object) -> None:
        nonlocal shown
        shown += 1

    template.register_forward_pre_hook(count)
    evaluate_paths(
        template,
        FlatLayout.from_module(template),
        [*(Segment("x", star, other) for other in others), Segment("x", others[0], others[1])],
        {"train": counted("train"), "test": counted("test")},
        points=3,
        statistics_batches=counted("statistics"),
    )
    assert sorted(passes) == ["statistics", "test", "train"]
    # The star, three ends and four middles; four batches in each of the three passes.
    assert shown == 8 * 4 * 3


@pytest.mark.parametrize("resident", [1, 2, 5, 100])
def test_how_many_are_resident_does_not_matter(resident: int) -> None:
    ends = [end(str(seed), resnet(seed)) for seed in (1, 2, 3)]
    paths = [Segment("x", ends[0], ends[1]), Segment("x", ends[0], ends[2]), Segment("x", ends[2], ends[1])]
    splits = {"train": data(), "test": data(seed=1, count=20)}
    reference = evaluate(resnet(0), paths, points=4, splits=splits)
    assert evaluate(resnet(0), paths, points=4, splits=splits, resident=resident) == reference


def test_batch_sizes_of_the_losses_do_not_matter() -> None:
    path = Segment("x", end("a", resnet(1)), end("b", resnet(2)))
    found = [evaluate(resnet(0), [path], splits={"train": data(size=size)})[0] for size in (50, 16, 7)]
    for other in found[1:]:
        assert other.loss["train"] == pytest.approx(found[0].loss["train"], rel=1e-6)  # fp32 sums of a batch
        assert other.values["accuracy"] == found[0].values["accuracy"]


def test_results_come_in_the_order_of_the_paths() -> None:
    ends = {seed: end(str(seed), mlp(seed)) for seed in (1, 2, 3)}
    pairs = [(3, 1), (1, 2), (1, 3), (3, 3)]
    found = evaluate(mlp(0), [Segment(f"{a}{b}", ends[a], ends[b]) for a, b in pairs], points=3)
    assert [(path.kind, path.first, path.second) for path in found] == [(f"{a}{b}", str(a), str(b)) for a, b in pairs]
    there, back = found[0], found[2]
    assert there.loss["train"] == pytest.approx(back.loss["train"][::-1], rel=1e-6)
    assert there.loss["train"][0] == found[3].loss["train"][1] != there.loss["train"][2]


def test_no_paths() -> None:
    assert evaluate(mlp(0), []) == []


def test_a_path_has_two_ends() -> None:
    with pytest.raises(ValueError, match="points=1"):
        evaluate(mlp(0), [Segment("x", end("a", mlp(1)), end("b", mlp(2)))], points=1)


# The reference's way


def test_in_the_references_way_ends_keep_their_statistics_and_inner_points_a_moving_average() -> None:
    first, second = resnet(1), resnet(2)
    (found,) = evaluate(resnet(0), [Segment("x", end("a", first), end("b", second))], points=3, method="reference")
    assert found.loss["train"][0] == pytest.approx(alone(first, data())[0], rel=2e-5)
    assert found.loss["train"][2] == pytest.approx(alone(second, data())[0], rel=2e-5)
    middle = resnet(0).train()
    ones, others = dict(first.named_parameters()), dict(second.named_parameters())
    with torch.no_grad():
        for name, parameter in middle.named_parameters():
            parameter.copy_((ones[name] + others[name]) / 2)
        for images, _ in data()():
            middle(images)  # torch's own moving average, momentum 0.1
    assert found.loss["train"][1] == pytest.approx(alone(middle, data())[0], rel=2e-5)
    (population,) = evaluate(resnet(0), [Segment("x", end("a", first), end("b", second))], points=3)
    for one, other in zip(found.loss["train"], population.loss["train"], strict=True):
        assert abs(one - other) > 1e-3  # another way indeed


# Errors


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = mlp(0)
    rows = torch.stack([row(mlp(1)), torch.full_like(row(mlp(1)), float("nan"))])
    with pytest.raises(FastarError, match="model 1 has a loss that is not finite"):
        evaluate_rows(model, FlatLayout.from_module(model), rows, {"a": data()})


@pytest.mark.parametrize(("first", "second", "named"), [(1, 1e25, "b"), (-1e25, 1, "a")])
def test_a_point_whose_loss_is_not_finite_is_named(first: float, second: float, named: str) -> None:
    """Of several that are held at once, the bad one, and an end by its own name."""
    good, *ends = (Endpoint(n, row(resnet(k)) * s) for k, (n, s) in enumerate((("g", 1), ("a", first), ("b", second))))
    between = r"the point t=0.5 from (g to [ab]|a to b)"
    for resident in (1, 100):
        with pytest.raises(FastarError, match=f"^({named}|{between}) has a loss that is not finite on train"):
            evaluate(resnet(0), [Segment("x", good, good), Segment("x", *ends)], points=3, resident=resident)


def test_an_empty_split_is_refused() -> None:
    model = mlp(0)
    with pytest.raises(FastarError, match="the split is empty"):
        evaluate_rows(model, FlatLayout.from_module(model), row(model)[None], {"a": lambda: []})


def test_rows_of_another_length_are_refused() -> None:
    model = mlp(0)
    with pytest.raises(ValueError, match="rows must be"):
        evaluate_rows(model, FlatLayout.from_module(model), row(model)[None, :-16], {"a": data()})
    with pytest.raises(ValueError, match="rows must be"):
        evaluate_rows(model, FlatLayout.from_module(model), row(model), {"a": data()})


def test_rows_in_fp32_through_a_model_whose_weights_are_bf16() -> None:
    """After training in bf16 the module holds working weights: evaluation lends it others, and they come back."""
    model = mlp(1)
    wanted = alone(model, data())[0]
    layout, rows = FlatLayout.from_module(model), row(model)[None]
    model.bfloat16()
    found = evaluate_rows(model, layout, rows, {"a": data()})["a"]
    assert float(found.loss[0]) == pytest.approx(wanted, rel=1e-6)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
