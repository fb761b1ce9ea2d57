"""Matching of networks: `fastar.match`, `fastar.match_many`, `fastar.apply`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastar import matching
from fastar.api.networks import device_of
from fastar.config import MatchingSettings, matching_settings
from fastar.errors import FastarError
from fastar.evaluation.batch_norm import joined, layer_of_single_values
from fastar.evaluation.batches import (
    Data,
    batches_of,
    check_network,
    check_targets,
    float_copy,
    in_float,
)
from fastar.evaluation.ends import outputs_of
from fastar.flat.state_check import check_one_value, check_state_of, copied
from fastar.losses import Loss, LossChoice, find_loss, sample_count, split_of
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
    loss: LossChoice = "cross_entropy",
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
        data: (inputs, targets) batches or a Dataset, of which the first few batches are used; needed by activation.
        loss: as of `barrier`; of `sinkhorn` on a loss.
        spec: the groups written out by hand, for networks whose graph cannot be traced.
        allow_partial: hold in place what cannot be proven, and go on; `Matched.symmetry.frozen` says what.
        seed: of random choices.
        options: further settings of matching, such as `perturbations=5`.

    Raises:
        FastarError: another architecture, groups that cannot be proven, or a method or option that does not exist.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> matched = fastar.match(a, b, example_inputs=torch.zeros(2, 4))
        >>> {group: len(index) for group, index in matched.items()}
        {'0': 8}
    """
    settings = matching_settings({"method": method, **options})
    device = device_of(model_a, "model_a")
    device_of(model_b, "model_b")
    source = model_b.state_dict()
    check_state_of(model_a, source, "model_b")
    models = {"model_a": model_a, "model_b": model_b}
    symmetry = _symmetry(models, example_inputs, settings, spec, allow_partial)
    result = matching.match(
        settings,
        symmetry,
        model_a.state_dict(),
        {name: source[name][None].to(device) for name in symmetry.moved},
        examples=_examples(model_a, data, settings, find_loss(loss)),
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
    loss: LossChoice = "cross_entropy",
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
        example_inputs, method, data, loss, spec, allow_partial, seed, options: as of `match`.

    Raises:
        FastarError: as `match`; too few models, or a centre that is missing or not needed.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> matched = fastar.match_many([a, b], example_inputs=torch.zeros(2, 4))
        >>> nearer = [fastar.apply(p, m, symmetry=matched.symmetry) for p, m in zip(matched.permutations, [a, b])]
        >>> matched.average
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=3, bias=True)
        )
    """
    settings = matching_settings({"method": method, **options})
    if isinstance(models, nn.Module) or not isinstance(models, Sequence):
        raise FastarError(f"models is a {type(models).__name__}: give a list of networks")
    if not models:
        raise FastarError("there are no models to match: give at least two")
    named = ({} if centre is None else {"centre": centre}) | {f"models[{n}]": model for n, model in enumerate(models)}
    first, (device, *_) = next(iter(named.values())), [device_of(model, name) for name, model in named.items()]
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
        examples=_examples(first, data, settings, find_loss(loss)),
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


def _examples(model: nn.Module, data: Data | None, settings: MatchingSettings, loss: Loss) -> Callable[[], Examples]:
    """The first batches, for methods that look at data."""

    def examples() -> Examples:
        if data is None:
            raise FastarError(f"method={settings.method!r} needs data: give (inputs, labels) batches as data")
        device = device_of(model, "the model")
        split = split_of(model, whole=loss.whole)
        found = list(islice(batches_of(data, device, "data", split)(), EXAMPLE_BATCHES))
        if not found:
            raise FastarError(f"method={settings.method!r} needs data, and there is no batch in what was given as data")
        twin, floats = float_copy(model, device), list(in_float(lambda: iter(found))())
        by_loss = settings.method == "sinkhorn"
        for inputs, targets in floats if by_loss else floats[:1]:
            if by_loss:
                check_targets(twin, inputs, targets, loss, "data")
            else:
                outputs_of(twin, inputs, "the model, on data,")
        inputs = floats[0][0]
        if any(sample_count(one) == 1 for one, _ in found) and layer_of_single_values(
            twin, inputs, sample_count(inputs)
        ):
            found = list(joined(found))
        return Examples(model, found, loss)

    return examples


def apply(permutations: Permutations, model: nn.Module, *, symmetry: Symmetry | None = None) -> nn.Module:
    """A copy of `model` with its hidden units permuted: it computes the same in evaluation mode.

    What a forward pass uses in training alone (an auxiliary classifier) was not seen, and stays as it is.

    Args:
        permutations: what `match` returned; of others (an inverse, say) `symmetry` is needed.
        model: of the architecture that was matched.
        symmetry: the groups of this architecture; None: those that `permutations` came with.

    Raises:
        FastarError: another architecture than the one that was matched, or no groups.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> x = torch.randn(5, 4)
        >>> nearer = fastar.apply(fastar.match(a, b, example_inputs=x), b)
        >>> torch.allclose(nearer(x), b(x), atol=1e-5)
        True
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
