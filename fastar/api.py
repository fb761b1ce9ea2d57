"""Matching and barriers of a user's own networks: `fastar.match`, `fastar.apply`, `fastar.barrier`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_map_only

from fastar import matching
from fastar.config import MatchingSettings, matching_settings
from fastar.errors import FastarError
from fastar.evaluation import Endpoint, Segment, evaluate_paths
from fastar.evaluation.batch_norm import batch_norm_layers, joined, layer_of_single_values
from fastar.evaluation.batches import (
    Batches,
    Data,
    batches_of,
    check_labels,
    check_loss,
    check_network,
    classes_of,
    float_copy,
    in_float,
    labelled,
    tried,
    with_parameters,
)
from fastar.evaluation.ends import check_end, outputs_of
from fastar.flat import FlatLayout
from fastar.flat.forward import Batch
from fastar.flat.state_check import check_computed, check_one_value, check_state_of, copied, is_vector, tensors_of
from fastar.matching import EXAMPLE_BATCHES, Examples, ManyResult, MatchResult, To
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import (
    ExampleInputs,
    Permutations,
    PermutationSpec,
    Symmetry,
    check_same_function,
    symmetry_by_settings,
)
from fastar.symmetry.symmetry import Member

TIE_ALIKE = "tie them in both networks or in neither"


class Matched(Permutations):
    """Group name -> index int64 [size]: how the units of one network are permuted to match another's.

    Args:
        indices: new[i] = old[index[i]].
        symmetry: the groups, and where their units lie.
        result: how the matching went.
    """

    def __init__(self, indices: Mapping[str, Tensor], symmetry: Symmetry, result: MatchResult):
        super().__init__(indices)
        self.symmetry = symmetry
        self.result = result


def match(
    model_a: nn.Module,
    model_b: nn.Module,
    *,
    example_inputs: Tensor | ExampleInputs,
    method: str = "weight",
    data: Data | None = None,
    spec: PermutationSpec | None = None,
    allow_partial: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
    **options: object,
) -> Matched:
    """Permutations of the hidden units of `model_b` that bring it towards `model_a` (paper, section 3.1).

    The groups of units are derived from the network's graph and proven on random weights. Neither model is changed;
    `apply` does it.

    Args:
        model_a: the model to match to.
        model_b: of the same architecture, on any device.
        example_inputs: what the forward takes: a tensor, a tuple of tensors, or a mapping of keywords to tensors.
        method: weight (coordinate descent on the weights), activation (correlations of activations), sinkhorn
            (gradients) or none.
        data: (inputs, labels) batches, of which the first few are looked at; needed by activation.
        spec: the groups written out by hand, for networks whose graph cannot be traced.
        allow_partial: hold in place what cannot be proven, and go on; `Matched.symmetry.frozen` says what.
        seed: of random choices.
        options: further settings of matching, such as `perturbations=5`.

    Raises:
        FastarError: another architecture, groups that cannot be proven, or a method or option that does not exist.
    """
    settings = matching_settings({"method": method, **options})
    device = _device(model_a, "model_a")
    _device(model_b, "model_b")
    source = model_b.state_dict()
    check_state_of(model_a, source, "model_b")
    models = {"model_a": model_a, "model_b": model_b}
    symmetry = _symmetry(models, example_inputs, settings, spec, allow_partial)
    result = matching.match(
        settings,
        symmetry,
        model_a.state_dict(),
        {name: source[name][None].to(device) for name in symmetry.moved},
        examples=_examples(model_a, data, settings),
        seed=seed,
        progress=progress,
    )
    return Matched(result.permutations.select(0) if symmetry.groups else {}, symmetry, result)


@dataclass(frozen=True)
class ManyMatched:
    """How a set of networks was matched.

    Args:
        permutations: of each network; of pairwise none.
        average: the mean of the permuted networks, a network itself; of pairwise none. Batch-norm statistics so
            averaged are not its own: re-estimate them.
        symmetry: the groups, and where their units lie.
        result: objectives, rounds, pairs.
    """

    permutations: list[Permutations]
    average: nn.Module | None
    symmetry: Symmetry
    result: ManyResult

    def __repr__(self) -> str:
        average = "no average" if self.average is None else f"average {type(self.average).__name__}"
        return f"ManyMatched({self.result!r}, {self.symmetry!r}, {average})"


def match_many(
    models: Sequence[nn.Module],
    *,
    example_inputs: Tensor | ExampleInputs,
    to: To | None = None,
    centre: nn.Module | None = None,
    method: str = "weight",
    data: Data | None = None,
    spec: PermutationSpec | None = None,
    allow_partial: bool = False,
    rounds: int = 20,
    seed: int = 0,
    progress: Progress = SILENT,
    **options: object,
) -> ManyMatched:
    """Match a set of networks to a `centre` (to="star"), to each other through their mean, or pairwise; average them.

    None is changed: `apply(matched.permutations[n], models[n], symmetry=matched.symmetry)` gives the permuted ones.

    Args:
        models: of one architecture.
        to: star, mean or pairwise (`fastar.matching.match_many` says what each does); None: star with a centre, else
            mean. mean follows the weights: methods that look at data need one of the others.
        centre: of star: the network that all are matched to.
        rounds: of mean, at most.
        example_inputs, method, data, spec, allow_partial, seed, options: as of `match`.

    Raises:
        FastarError: as `match`; too few models, or a centre that is missing or not needed.
    """
    settings = matching_settings({"method": method, **options})
    if isinstance(models, nn.Module) or not isinstance(models, Sequence):
        raise FastarError(f"models is a {type(models).__name__}: give a list of networks")
    if not models:
        raise FastarError("there are no models to match: give at least two")
    first = models[0] if centre is None else centre
    device = _device(first, "models[0]" if centre is None else "centre")
    for n, model in enumerate(models):
        _device(model, f"models[{n}]")
    states = [model.state_dict() for model in models]
    for n, state in enumerate(states):
        check_state_of(first, state, f"models[{n}]")
        if to != "pairwise":
            check_one_value(first, state, f"models[{n}]", f"their average can hold but one; {TIE_ALIKE}")
    called = {} if centre is None else {"centre": centre}
    called |= {f"models[{n}]": model for n, model in enumerate(models)}
    symmetry = _symmetry(called, example_inputs, settings, spec, allow_partial)
    result = matching.match_many(
        symmetry,
        [_tensors(state, device) for state in states],
        to=to or ("mean" if centre is None else "star"),
        centre=None if centre is None else centre.state_dict(),
        settings=settings,
        examples=_examples(first, data, settings),
        rounds=rounds,
        seed=seed,
        progress=progress,
    )
    found = [] if result.permutations is None else [result.permutations.select(n) for n in range(len(models))]
    average = None
    if result.mean is not None:
        average = copied(first)
        state = average.state_dict()  # with its modules' versions
        state.update(result.mean)
        average.load_state_dict(state)
    return ManyMatched(found, average, symmetry, result)


def _tensors(state: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What of a state dict can be matched: it may hold more than tensors (`get_extra_state`)."""
    return {name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)}


def _symmetry(
    models: Mapping[str, nn.Module],
    example_inputs: Tensor | ExampleInputs,
    settings: MatchingSettings,
    spec: PermutationSpec | None,
    allow_partial: bool,
) -> Symmetry:
    """The groups of the first of `models`, as the caller wants them found; they are checked to be those of all."""
    (name, model), *others = models.items()
    twin = copied(model).cpu()
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    inputs = tree_map_only(Tensor, Tensor.cpu, given)
    if settings.method != "none":
        for called, other in others:
            check_same_function(model, other, inputs, (name, called))
    if spec is not None and settings.method != "none":
        symmetry = spec.symmetry(twin, inputs)
    else:
        symmetry = symmetry_by_settings(settings, twin, inputs, allow_partial=allow_partial)
    for called, one in models.items():
        _check_ties(symmetry, one, called)
    return symmetry


def _examples(model: nn.Module, data: Data | None, settings: MatchingSettings) -> Callable[[], Examples]:
    """The first batches, for methods that look at data."""
    method = settings.method

    def examples() -> Examples:
        if data is None:
            raise FastarError(f"method={method!r} needs data: give (inputs, labels) batches as data")
        device = _device(model, "the model")
        found = list(islice(batches_of(data, device, "data")(), EXAMPLE_BATCHES))
        if not found:
            raise FastarError(f"method={method!r} needs data, and there is no batch in what was given as data")
        twin, floats = float_copy(model, device), list(in_float(lambda: iter(found))())
        by_loss = method == "sinkhorn"
        for inputs, labels in floats if by_loss else floats[:1]:
            outputs = outputs_of(twin, inputs, "the model, on data,")
            if by_loss:
                check_loss(outputs, labels, "data")
        if any(labels.ndim and len(labels) == 1 for _, labels in found):
            inputs, labels = floats[0]
            if layer_of_single_values(twin, inputs, len(labels)) is not None:
                found = list(joined(found))
        return Examples(model, found)

    return examples


def _device(model: nn.Module, name: str) -> torch.device:
    """The device of a network's parameters.

    Raises:
        FastarError: it is no network, or one without weights.
    """
    check_network(model, name)
    first = next(model.parameters(), None)
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise FastarError(f"{name} has parameters without a shape yet: run one batch through its lazy modules first")
    if first is None:
        raise FastarError(
            f"{name}, a {type(model).__name__}, has no parameters: there is nothing to match or to measure"
        )
    if first.is_meta:
        raise FastarError(f"{name} has no weights yet (its parameters are on the meta device): load them first")
    check_computed(model)
    return first.device


def _check_ties(symmetry: Symmetry, model: nn.Module, name: str) -> None:
    """A FastarError where `model` ties tensors that the symmetry moves apart: one tensor cannot move in two ways."""
    moves: dict[str, set[tuple[str, Member]]] = {}
    for group in symmetry.groups:
        for member in group.members:
            moves.setdefault(member.tensor, set()).add((group.name, replace(member, tensor="")))
    first: dict[object, str] = {}
    in_memory: dict[object, str] = {}
    for own, tensor in tensors_of(model).items():
        owner = first.setdefault(id(tensor), own)
        if symmetry.tied.get(own, own) != symmetry.tied.get(owner, owner):
            raise FastarError(
                f"{name}: {own!r} and {owner!r} are one tensor, but two in the model that the groups were derived "
                f"from: {TIE_ALIKE}"
            )
        if not tensor.numel():
            continue
        other = in_memory.setdefault((tensor.device, tensor.data_ptr()), own)
        if moves.get(own) != moves.get(other):
            raise FastarError(
                f"{name}: {own!r} and {other!r} are two tensors that share memory, and would have to move in two "
                "ways: tie them by using one nn.Parameter, or one buffer, twice"
            )


def apply(permutations: Permutations, model: nn.Module, *, symmetry: Symmetry | None = None) -> nn.Module:
    """A copy of `model` with its hidden units permuted: it computes the same in evaluation mode.

    What a forward pass uses in training alone (an auxiliary classifier) was not seen, and stays as it is.

    Args:
        permutations: what `match` returned; of others (an inverse, say) `symmetry` is needed.
        model: of the architecture that was matched.
        symmetry: the groups of this architecture; None: those that `permutations` came with.

    Raises:
        FastarError: another architecture than the one that was matched, or no groups.
    """
    if not isinstance(permutations, Permutations):
        raise FastarError(
            f"permutations are a {type(permutations).__name__}: give what fastar.match returned, or one of "
            "`permutations` of fastar.match_many"
        )
    check_network(model, "model")
    if symmetry is None:
        if not isinstance(permutations, Matched):
            raise FastarError("these permutations do not know their groups: give symmetry=matched.symmetry")
        symmetry = permutations.symmetry
    _check_ties(symmetry, model, "model")
    twin = copied(model)
    twin.load_state_dict(symmetry.apply(permutations, twin.state_dict()))
    return twin


@dataclass(frozen=True)
class Barrier:
    """Loss and accuracy along the straight path between two models, and its barrier.

    Args:
        t: points of the path, 0 at the first model, 1 at the second.
        loss: mean cross-entropy at each t.
        accuracy: at each t.
        value: the largest gap between the loss and the straight line between the ends' losses (paper, eq. 10).
    """

    t: list[float]
    loss: list[float]
    accuracy: list[float]
    value: float

    def __float__(self) -> float:
        return self.value


def barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    points: int = 11,
    statistics_data: Data | None = None,
    progress: Progress = SILENT,
) -> Barrier:
    """The loss barrier between two models of one architecture, as they are (paper, eq. 10).

    Models are evaluated in float32 on the device of `model_a`, whatever their dtype and that of their inputs; neither
    is changed. Parameters are interpolated, and buffers of the state dict that hold a value for each unit (those of
    frozen batch-norms) and differ; batch-norm statistics are re-estimated at every point, ends included (paper,
    appendix B.3). All else that a model computes with has to be the same in both, since nothing says what it is between
    two models. Other buffers are compared, also those that no state dict has (`persistent=False`). The rest
    (tensors and numbers that are plain attributes, kinds of layers, caches) is held by running each model once, on the
    first batch and with its own batch-norm statistics, beside the network that stands for it at its end of the path.

    Args:
        model_a: at t = 0; its forward takes a batch of inputs and returns logits [batch, classes]. Labels are whole
            numbers [batch] from 0 to classes - 1.
        model_b: at t = 1.
        data: what losses are measured on.
        points: equispaced values of t, ends included.
        statistics_data: what batch-norm statistics are taken from, best the training data, shuffled; None: `data`. A
            batch of one sample that a layer could not take a variance of is joined to the one before it.

    Raises:
        FastarError: no networks, another architecture or other buffers, an end of the path that does not compute what
            its model does, a model that draws random numbers in evaluation mode, fewer than 2 points, no data or data
            of one pass only, inputs that the forward does not take, outputs that are not logits, labels that do not fit
            them, a loss that is not finite.
    """
    if not isinstance(points, Integral) or points < 2:
        raise FastarError(f"points={points}: a path needs its two ends, give a whole number of at least 2")
    models = {"model_a": model_a, "model_b": model_b}
    device, _ = (_device(given, name) for name, given in models.items())
    states = [given.state_dict() for given in models.values()]
    check_state_of(model_a, states[1], "model_b")
    check_one_value(model_a, states[1], "model_b", f"a path can hold but one; {TIE_ALIKE}")
    between = _interpolated_buffers(model_a, model_b)
    model = with_parameters(float_copy(model_a, device), between)
    layout = FlatLayout.from_module(model)
    floats = in_float(batches_of(data, device, "data"))
    first = next(floats(), None)
    if first is None:
        raise FastarError("there is no data to measure on: no batch in what was given as data")
    check_labels(*first, "data")
    classes = classes_of(model, *first, "model_a")
    for (name, given), state in zip(models.items(), states, strict=True):
        check_end(float_copy(given, device), model, layout, state, first[0], name)
    batches = labelled(floats, classes, "data")
    ends = [Endpoint(name, layout.flatten(state).to(device)) for name, state in zip("ab", states, strict=True)]
    (measured,) = evaluate_paths(
        model,
        layout,
        [Segment("path", *ends)],
        {"data": batches},
        points=int(points),
        statistics_batches=_of_statistics(model, batches, first, statistics_data),
        progress=progress,
    )
    return Barrier(measured.t, measured.loss["data"], measured.accuracy["data"], measured.barrier("data"))


def _of_statistics(
    model: nn.Module, batches: Batches, first: tuple[Batch, Tensor], statistics_data: Data | None
) -> Batches:
    """The batches that batch-norm statistics are taken from."""
    if not batch_norm_layers(model):
        return batches
    if statistics_data is not None:
        device = first[1].device
        batches = tried(model, in_float(batches_of(statistics_data, device, "statistics_data")), "statistics_data")
    if layer_of_single_values(model, first[0], len(first[1])) is None:
        return batches
    return lambda: joined(batches())


def _equal(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have one shape and, in the coarser of their dtypes, one value; NaN equals itself."""
    if first.shape != second.shape:
        return False
    pairs = ((first, second.to(first)), (first.to(second), second))
    return any(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def _interpolated_buffers(model_a: nn.Module, model_b: nn.Module) -> list[str]:
    """The buffers that differ and can be interpolated; a FastarError where another one differs that is not a statistic
    of a batch-norm."""
    norms = [name for name, module in model_a.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)]
    buffers = [dict(model.named_buffers(remove_duplicate=False)) for model in (model_a, model_b)]
    persistent, found = model_a.state_dict().keys() & model_b.state_dict().keys(), []
    for name in dict.fromkeys((*buffers[0], *buffers[1])):
        module, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked" or (leaf in ("running_mean", "running_var") and module in norms):
            continue
        first, second = (own.get(name) for own in buffers)
        if first is not None and second is not None and _equal(first, second):
            continue
        if name in persistent and first is not None and first.is_floating_point() and is_vector(first):
            found.append(name)
            continue
        raise FastarError(
            f"model_a and model_b differ in buffer {name!r}, which is neither a parameter to interpolate nor a "
            "batch-norm's statistic to re-estimate: make it equal in both, or a parameter"
        )
    return found
