"""Matching and barriers of a user's own networks: `fastar.match`, `fastar.apply`, `fastar.barrier`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral

import torch
from torch import Tensor, nn
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
from fastar.evaluation.ends import check_end, interpolated_buffers, outputs_of
from fastar.flat import FlatLayout
from fastar.flat.forward import Batch
from fastar.flat.state_check import check_computed, check_one_value, check_state_of, copied
from fastar.matching import EXAMPLE_BATCHES, Examples, ManyResult, MatchResult, To
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import (
    TIE_ALIKE,
    ExampleInputs,
    Permutations,
    PermutationSpec,
    Symmetry,
    check_same_function,
    check_ties,
    symmetry_by_settings,
)


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
    """The outcome of matching a set of networks.

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
    named = ({} if centre is None else {"centre": centre}) | {f"models[{n}]": model for n, model in enumerate(models)}
    first, (device, *_) = next(iter(named.values())), [_device(model, name) for name, model in named.items()]
    states = [model.state_dict() for model in models]
    for n, state in enumerate(states):
        check_state_of(first, state, f"models[{n}]")
        if to != "pairwise":
            check_one_value(first, state, f"models[{n}]", f"their average can hold but one; {TIE_ALIKE}")
    symmetry = _symmetry(named, example_inputs, settings, spec, allow_partial)
    result = matching.match_many(
        symmetry,
        # A state dict may hold more than tensors (`get_extra_state`).
        [{n: v.to(device) for n, v in state.items() if isinstance(v, Tensor)} for state in states],
        to=to or ("mean" if centre is None else "star"),
        centre=None if centre is None else centre.state_dict(),
        settings=settings,
        examples=_examples(first, data, settings),
        rounds=rounds,
        seed=seed,
        progress=progress,
    )
    found = [] if result.permutations is None else [result.permutations.select(n) for n in range(len(models))]
    return ManyMatched(found, None if result.mean is None else _with_state(first, result.mean), symmetry, result)


def _with_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with other tensors."""
    twin = copied(model)
    state = twin.state_dict()  # with its modules' versions
    state.update(tensors)
    twin.load_state_dict(state)
    return twin


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
        check_ties(symmetry, one, called)
    return symmetry


def _examples(model: nn.Module, data: Data | None, settings: MatchingSettings) -> Callable[[], Examples]:
    """The first batches, for methods that look at data."""

    def examples() -> Examples:
        if data is None:
            raise FastarError(f"method={settings.method!r} needs data: give (inputs, labels) batches as data")
        device = _device(model, "the model")
        found = list(islice(batches_of(data, device, "data")(), EXAMPLE_BATCHES))
        if not found:
            raise FastarError(f"method={settings.method!r} needs data, and there is no batch in what was given as data")
        twin, floats = float_copy(model, device), list(in_float(lambda: iter(found))())
        by_loss = settings.method == "sinkhorn"
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
    check_ties(symmetry, model, "model")
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

    Models are evaluated in float32 on the device of `model_a`; neither is changed. Parameters are interpolated, and
    buffers of the state dict that hold a value for each unit (those of frozen batch-norms) and differ. Batch-norm
    statistics are re-estimated at every point, ends included (paper, appendix B.3). All else has to be the same in
    both: other buffers are compared, and each model is run once, on the first batch and with its own batch-norm
    statistics, beside the network that stands for it at its end of the path.

    Args:
        model_a: at t = 0; its forward takes a batch of inputs and returns logits [batch, classes]. Labels are whole
            numbers [batch] from 0 to classes - 1.
        model_b: at t = 1.
        data: what losses are measured on.
        points: equispaced values of t, ends included.
        statistics_data: what batch-norm statistics are taken from, best the training data, shuffled; None: `data`. A
            batch of one sample that a layer could not take a variance of is joined to the one before it.

    Raises:
        FastarError: models that are no networks of one architecture, that differ in more than parameters, or that draw
            random numbers in evaluation mode; data, labels or outputs that do not fit; a loss that is not finite.
    """
    if not isinstance(points, Integral) or points < 2:
        raise FastarError(f"points={points}: a path needs its two ends, give a whole number of at least 2")
    models = {"model_a": model_a, "model_b": model_b}
    device, _ = (_device(given, name) for name, given in models.items())
    states = [given.state_dict() for given in models.values()]
    check_state_of(model_a, states[1], "model_b")
    check_one_value(model_a, states[1], "model_b", f"a path can hold but one; {TIE_ALIKE}")
    model = with_parameters(float_copy(model_a, device), interpolated_buffers(model_a, model_b))
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
