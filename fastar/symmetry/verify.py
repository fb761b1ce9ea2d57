"""Numerical proof that the groups of a symmetry leave the network's function unchanged."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.flat.forward import gaps
from fastar.runtime.seeds import derive_seed
from fastar.symmetry.batched_index import along
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.random_network import ExampleInputs, RandomNetwork, State
from fastar.symmetry.symmetry import Group, Member, Symmetry

# float64 rounding through a few hundred layers stays below 1e-12 of the outputs' size; a wrong group changes them by
# their own size. In between there is room for either to be unlucky.
RELATIVE_TOLERANCE = 1e-8
# An output that is a difference of large values, or of a chaotic network, shows more rounding: it may differ by this
# many times what a change of all weights in their last digits does.
ROUNDING = 1e3
# A wrong permutation has to change the outputs by this many tolerances, so that a right one says something.
SHOWN = 1e3
# Draws of weights: their gain, and whether vectors are positive. With the first, ReLU keeps the size of activations;
# sigmoid needs the third; positive biases leave few units of narrow layers dead. Later ones are tried for what is not
# shown by those before.
DRAWS = ((math.sqrt(2), False), (1.0, False), (4.0, False), (math.sqrt(2), True), (1.0, True), (math.sqrt(2), True))


def verify_symmetry(
    model: nn.Module, symmetry: Symmetry, example_inputs: ExampleInputs, seed: int = 0, *, controls: bool = True
) -> None:
    """Permute every group at random in float64 and compare the outputs with the unpermuted network's.

    All parameters and batch-norm statistics are drawn at random first, so that nothing is hidden by weights that are
    zero or equal (fresh batch-norms, zero-initialised scales); so are other buffers where the model runs with them, and
    whole-number inputs. `model` is copied, not touched. Each output may differ by 1e-8 of its largest value
    (`RELATIVE_TOLERANCE`).

    Args:
        controls: also require that the comparison could have failed. Permuting any one site of a group in a parameter
            of two axes or more, by itself, has to change the outputs; so has another draw of such a parameter in which
            no group is, if the outputs are computed from it; and so has one site of each group at least. (Vectors by
            themselves may do nothing, as the bias of keys in attention.) False for symmetries that are derived: where
            a unit has no effect the derivation is the proof.

    Raises:
        FastarError: the outputs differ (names the groups), are not finite, do not depend on what is permuted, or are
            drawn at random; the model does not run on the inputs.
    """
    if not symmetry.groups:
        return
    proof = _Proof(RandomNetwork(model, example_inputs, seed), symmetry)
    for draw in range(len(DRAWS)):
        proof.compare(draw)
        left = proof.unseen() if controls else []
        if not left:
            return
    what = left[0]
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    raise FastarError(
        f"the permutation groups of {type(model).__name__} cannot be proven: its outputs do not depend on "
        f"{what}{more}, with random weights and these example inputs: give inputs for which they do, and write None "
        "for the axes of parameters that are not used in evaluation mode"
    )


class _Proof:
    """Comparisons on one network, and what they have still to show."""

    def __init__(self, network: RandomNetwork, symmetry: Symmetry):
        self.network, self.symmetry = network, symmetry
        self.permutations = moving(symmetry, network.seed)
        self.sites = [
            (group, member)
            for group in symmetry.groups
            for member in group.members
            if group.size > 1 and member.tensor in symmetry.names  # one name of each tensor
        ]
        shapes = {name: symmetry.parameters.get(name, ()) for name in symmetry.names}
        self.matrices = [name for name, shape in shapes.items() if len(shape) > 1 and 0 not in shape]
        placed = {member.tensor for _, member in self.sites}
        self.held = [name for name in self.matrices if name not in placed]  # parameters that no group is in
        self.shown: set[Member | str] = set()  # members, and parameters of `held`
        self.buffers = 2 if network.has_buffers else 0  # as `RandomNetwork.state` says
        self.draw = 0
        self.state: State = {}
        self.expected: list[Tensor] = []
        self.scales: list[float] = []
        self.noise: list[float] | None = None

    def compare(self, draw: int) -> None:
        """Raise FastarError if all groups permuted change the outputs of this draw of weights."""
        self._begin(draw)
        if not self._finite():
            if draw:
                return  # too large weights: nothing is shown with them
            raise FastarError(
                f"cannot verify the permutation groups of {self.network.name}: random weights give outputs that are "
                "not finite"
            )
        # In place, because a second copy of a large network takes longer than its forward pass.
        self.symmetry.apply_rows(self.permutations, {key: tensor[None] for key, tensor in self.state.items()})
        different = self.differs(self.state)
        self.state = self._drawn()
        if different:
            self.refuse()

    def _begin(self, draw: int) -> None:
        """The outputs on one draw of weights, with the inputs and buffers that the model runs on."""
        self.draw = draw
        self.state = self._drawn()
        while self.buffers and not self.network.runs(self.state):
            self.buffers -= 1
            self.state = self._drawn()
        if draw == 0:
            self.network.vary_integers(self.state)
        self.expected = self.network.outputs(self.state)
        self.scales = [largest(out) for out in self.expected]
        self.noise = None

    def _drawn(self) -> State:
        gain, positive = DRAWS[self.draw]
        return self.network.state(gain, positive=positive, buffers=self.buffers, number=self.draw)

    def _finite(self) -> bool:
        return all(scale < math.inf for scale in self.scales)

    def differs(self, state: State, times: float = 1.0) -> bool:
        """Tell whether any output is not what is expected, by more than `times` the tolerance."""
        found = gaps(self.expected, self.network.outputs(state))
        if all(gap <= times * RELATIVE_TOLERANCE * scale for gap, scale in zip(found, self.scales, strict=True)):
            return False
        if self.noise is None:
            self.noise = self._rounding()
        tolerances = [max(RELATIVE_TOLERANCE * s, ROUNDING * n) for s, n in zip(self.scales, self.noise, strict=True)]
        return not all(gap <= times * tolerance for gap, tolerance in zip(found, tolerances, strict=True))

    def _rounding(self) -> list[float]:
        """The change of each output when all weights change in their last digits."""
        generator = torch.Generator().manual_seed(derive_seed(self.network.seed, "verify", "rounding"))
        begun = self._drawn()
        for tensor in begun.values():
            if tensor.is_floating_point():
                tensor.mul_(
                    1 + 1e-15 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
                )
        return gaps(self.expected, self.network.outputs(begun))

    def refuse(self) -> None:
        """Raise FastarError, naming the groups that change the outputs."""
        identity = self.symmetry.identity()

        def wrong(trees: tuple[tuple[int, ...], ...]) -> list[str]:
            """Names of the groups that change the outputs, found by halving: a forward pass may take long."""
            names = [self.symmetry.groups[position].name for tree in trees for position in tree]
            moved = Permutations({**identity, **{one: self.permutations[one] for one in names}})
            if not trees or not self.differs(self.symmetry.apply(moved, self.state)):
                return []
            if len(trees) == 1:
                return [" with ".join(names)]
            half = len(trees) // 2
            return wrong(trees[:half]) + wrong(trees[half:])

        named = wrong(self.symmetry.trees)
        raise FastarError(
            f"permuting the groups found in {self.network.name} changes its outputs (groups "
            f"{', '.join(named) or 'together'}): it is not matched; an axis is left out or wrong, or its forward "
            "depends on the order of units in a way its graph does not show"
        )

    def unseen(self) -> list[str]:
        """Names for everything that could be permuted wrongly without changing the outputs, in all draws so far."""
        if self._finite():
            self._show()
        groups = {group.name: False for group, _ in self.sites}
        groups |= {group.name: True for group, member in self.sites if member in self.shown}
        return [
            *(
                f"the order of group {group.name!r} in axis {member.axis} of {member.tensor!r}"
                for group, member in self.sites
                if member.tensor in self.matrices and member not in self.shown
            ),
            *(repr(name) for name in self.held if name not in self.shown),
            *(f"the order of group {name!r}" for name, shown in groups.items() if not shown),
        ]

    def _show(self) -> None:
        """Permute and replace one thing at a time: what then changes the outputs is shown."""
        for group, member in self.sites:
            if member not in self.shown and self.differs(self._apart(group, member), SHOWN):
                self.shown.add(member)
        gain, positive = DRAWS[self.draw]
        other = self.network.state(gain, positive=positive, number=-1) if self.held else {}
        for name in self.held:
            if name in self.shown:
                continue
            if self.differs(self._with(name, other[name]), SHOWN) or not self._reads(name):
                self.shown.add(name)

    def _reads(self, name: str) -> bool:
        """Tell whether the outputs are computed from a parameter at all, a factor of 0 included: NaN passes it."""
        try:
            return self.differs(self._with(name, torch.full_like(self.state[name], math.nan)))
        except FastarError:
            return True  # the model noticed

    def _with(self, name: str, tensor: Tensor) -> State:
        """The state with another tensor under all its names."""
        return {**self.state, **dict.fromkeys(self.symmetry.names[name], tensor)}

    def _apart(self, group: Group, member: Member) -> State:
        """The state with one site of a group permuted by itself."""
        name, tensor = member.tensor, self.state[member.tensor].clone()
        index = self.permutations[group.name].numpy()
        if member.within is None:
            positions = torch.from_numpy(member.positions(index, group.size))
        else:
            positions = torch.from_numpy(member.inside(index, self.symmetry.blocks[group.name]))
        read = self.symmetry.read({name: tensor})[name]
        row = read.narrow(member.axis, member.offset, positions.shape[-1])
        row.copy_(along(read[None], member.axis, positions[None], member.within)[0])
        if name in self.symmetry.arranged:
            self.symmetry.arranged[name].write(read, tensor)
        return self._with(name, tensor)


def moving(symmetry: Symmetry, seed: int) -> Permutations:
    """Random permutations in which every group moves, and inside its blocks too: where it would not, it is reversed."""
    drawn, out = symmetry.random(derive_seed(seed, "verify", 0)), dict[str, Tensor]()
    for group in symmetry.groups:
        sigma = torch.zeros(1, dtype=torch.int64, device="cpu") if group.parent is None else out[group.parent]
        index = drawn[group.name].unflatten(0, (len(sigma), -1))
        size = index.shape[1]
        inside = index % size
        if bool((inside == torch.arange(size, device="cpu")).all()):
            inside = inside.flip(1)
        out[group.name] = (sigma[:, None] * size + inside).flatten()
    return Permutations(out)


def largest(values: Tensor) -> float:
    """The largest size of a value; infinite where any is no finite number."""
    found = float(values.abs().max())
    return found if math.isfinite(found) else math.inf
