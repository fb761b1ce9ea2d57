"""Matching by gradient: doubly stochastic matrices from the Sinkhorn operator (Guerrero Pena et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastar.config import SinkhornSettings
from fastar.errors import FastarError
from fastar.flat.forward import forward, without_statistics
from fastar.losses import find_loss
from fastar.matching.assignment import Solver
from fastar.matching.blocks import solve_tree
from fastar.matching.request import Request
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Member, Permutations, Symmetry

# Logarithm of what a column's largest entry may be below that of its row in `_Scaling`: scales stay within float64.
_RANGE = 100.0

Loss = Callable[[Mapping[str, Tensor], int], Tensor]
"""(parameters, step) -> mean loss of that network on a batch."""


def match_sinkhorn(request: Request) -> Permutations:
    """Permutations [N, size] found by Adam on soft ones, of all groups at once, made hard by exact assignment.

    Each group has a matrix of logits, [size, size]; the Sinkhorn operator makes it doubly stochastic: rows and columns
    of logits / temperature are normalised in turn, in logarithms. A parent has such a matrix for its blocks and each
    child one for every pair of blocks, [a, a, b, b]; their product is the child's. A source's parameters are multiplied
    by these on every axis that a group permutes, which is a permutation once they are hard. Residual streams need
    nothing more, since all of their layers share one group.

    The objective (`matching.sinkhorn.objective`) is one of:

    - l2: |theta - pi(theta_n)|^2, for permutations |theta|^2 + |theta_n|^2 - 2 <theta, pi(theta_n)>. It is this inner
      product that is followed: taken literally, the square rewards matrices that average units away.
    - mid, random: the loss half way between theta and the soft pi(theta_n), or at a uniformly random t of each step.

    Each source starts from the same small random logits, a function of the seed alone: nothing is kept from earlier
    matchings, so a star run matches anew each epoch. float32, on theta's device.

    Raises:
        FastarError: mid or random without labels, or a search that ended in numbers that are not finite.
    """
    settings, symmetry, seed = request.settings.sinkhorn, request.symmetry, request.seed
    names = symmetry.counted(request.theta, request.sources)
    loss = None if settings.objective == "l2" else _loss(request)
    steps = request.count * settings.steps
    found = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        request.progress.task("sinkhorn", steps, "steps") as advance,
    ):
        theta = {name: _recordable(request.theta[name].detach().float()) for name in names}
        for n in range(request.count):
            source = {name: _recordable(request.sources[name][n].detach().float()) for name in names}
            soft = SoftPermutations(symmetry, settings, request.device, derive_seed(seed, "sinkhorn"))
            optimizer = torch.optim.Adam(soft.logits.values(), lr=settings.lr)
            draw = torch.Generator().manual_seed(derive_seed(seed, "sinkhorn", "t"))
            for step in range(settings.steps):
                optimizer.zero_grad(set_to_none=True)
                moved = soft.apply(source)
                if loss is None:  # of minus the inner product the gradient is known
                    pairs = [(one, -theta[name]) for name, one in moved.items() if one.requires_grad]
                    torch.autograd.backward([one for one, _ in pairs], [gradient for _, gradient in pairs])
                else:
                    t = 0.5
                    if settings.objective == "random":
                        t = float(torch.rand((), generator=draw, dtype=torch.float32, device="cpu"))
                    loss({name: torch.lerp(one, moved[name], t) for name, one in theta.items()}, step).backward()
                optimizer.step()
                advance()
            found.append(soft.hard(request.settings.solver))
    return Permutations.stack(found)


def _loss(request: Request) -> Loss:
    """The loss on the batches in turn; batch-norm normalises with the batch."""
    assert request.examples is not None
    examples = request.examples()
    taken = find_loss() if examples.loss is None else examples.loss
    with torch.inference_mode(False):
        model = without_statistics(examples.model, request.device)

    def loss(parameters: Mapping[str, Tensor], step: int) -> Tensor:
        inputs, labels = tree_map_only(Tensor, _recordable, examples.batches[step % len(examples.batches)])
        if labels is None:
            raise FastarError(
                "matching.sinkhorn.objective=mid and random need labels, and these data have none; set l2"
            )
        return taken.mean(forward(model, parameters, inputs), labels)

    return loss


def _recordable(tensor: Tensor) -> Tensor:
    """The same for autograd, which keeps no tensors that were made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


class SoftPermutations:
    """Doubly stochastic matrices of all groups of a symmetry, differentiable in their logits."""

    def __init__(self, symmetry: Symmetry, settings: SinkhornSettings, device: torch.device, seed: int):
        self._symmetry, self._settings = symmetry, settings
        self.logits: dict[str, Tensor] = {}
        """A tensor per group, which is optimised."""
        for group in symmetry.groups:
            shape: tuple[int, ...] = (group.size, group.size)
            if group.parent is not None:
                blocks = symmetry.group(group.parent).size
                shape = (blocks, blocks, group.size // blocks, group.size // blocks)
            generator = torch.Generator().manual_seed(derive_seed(seed, group.name))
            noise = settings.noise * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            self.logits[group.name] = noise.to(device).requires_grad_()

    def matrices(self) -> dict[str, Tensor]:
        """Group -> doubly stochastic [size, size]: row i says which of the source's units become unit i."""
        return self._together(self._own())

    def _own(self) -> dict[str, Tensor]:
        """Group -> doubly stochastic [size, size]; of a child one for each pair of blocks, [blocks, blocks, b, b]."""
        own: dict[str, Tensor] = {}
        alike: dict[torch.Size, list[str]] = {}
        for name, logits in self.logits.items():
            alike.setdefault(logits.shape, []).append(name)
        for names in alike.values():  # those of one size together
            logits = torch.stack([self.logits[name] for name in names]) / self._settings.temperature
            own |= zip(names, sinkhorn(logits, self._settings.iterations), strict=True)
        return own

    def _together(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`matrices`, of those that each group has of its `own`."""
        out: dict[str, Tensor] = {}
        for group in self._symmetry.groups:
            out[group.name] = own[group.name]
            if group.parent is not None:
                of_blocks = out[group.parent][:, :, None, None]
                out[group.name] = (of_blocks * own[group.name]).transpose(1, 2).reshape(group.size, group.size)
        return out

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network's parameters, multiplied by the matrices along every axis that a group permutes."""
        out, own = dict(self._symmetry.read(state)), self._own()
        matrices = self._together(own)
        for name, pairs in self._symmetry.within.items():
            for within in sorted({within for within, _ in pairs}) if name in out else ():
                out[name] = self._within(out[name], name, within, own)
        for group in self._symmetry.groups:
            members = [m for m in group.members if m.tensor in out and not self._is_within(m)]
            vectors = [member.tensor for member in members if out[member.tensor].shape == (group.size,)]
            if vectors:  # together
                moved = matrices[group.name] @ torch.stack([out[name] for name in vectors], 1)
                out |= zip(vectors, moved.unbind(1), strict=True)
            for member in members:
                if member.tensor not in vectors:
                    out[member.tensor] = _multiplied(out[member.tensor], member, matrices[group.name])
        for name, arrangement in self._symmetry.arranged.items():
            if name in out:
                out[name] = arrangement.written(out[name], state[name].shape)
        return out

    def _is_within(self, member: Member) -> bool:
        """Tell whether `_within` moves this member: it lies within an axis, or is that axis."""
        pairs = self._symmetry.within.get(member.tensor, ())
        return member.within is not None or any(within == member.axis for within, _ in pairs)

    def _within(self, tensor: Tensor, name: str, within: int, own: Mapping[str, Tensor]) -> Tensor:
        """`tensor` with the blocks on an axis, and all that lies within these, multiplied by the groups' matrices.

        What is inside moves otherwise for each pair of blocks, so that for the while there is one of each.
        """
        sites = [(g, m) for g, m in self._symmetry.inside if (m.tensor, m.within) == (name, within)]
        blocks = tensor.shape[within]
        pairs = tensor.movedim(within, 0).expand(blocks, *tensor.movedim(within, 0).shape)  # [ours, theirs, ...]
        for group, member in sites:
            axis = member.axis + 1 + (member.axis < within)
            x = pairs.movedim(axis, 2)
            length = own[group.name].shape[-1] * member.inner * member.outer
            before, stretch, after = x.split([member.offset, length, x.shape[2] - length - member.offset], 2)
            stretch = stretch.unflatten(2, (member.outer, -1, member.inner))
            moved = torch.einsum("xyij,xyojn...->xyoin...", own[group.name], stretch).flatten(2, 4)
            pairs = torch.cat([before, moved, after], 2).movedim(2, axis)
        parent = sites[0][0].parent
        assert parent is not None
        return torch.einsum("xy,xy...->x...", own[parent], pairs).movedim(0, within)

    def hard(self, solver: Solver = "auto") -> Permutations:
        """The permutations nearest to the matrices, each tree's by one exact assignment."""
        with torch.no_grad():
            matrices = {name: matrix.cpu().numpy() for name, matrix in self.matrices().items()}
        found: dict[str, Tensor] = {}
        for tree in self._symmetry.trees:
            groups = [self._symmetry.groups[g] for g in tree]
            for group in groups:
                if not np.isfinite(matrices[group.name]).all():
                    raise FastarError(
                        f"matching by sinkhorn ended in numbers that are not finite in group {group.name!r}: lower "
                        "matching.sinkhorn.lr or raise matching.sinkhorn.temperature"
                    )
            answers = solve_tree([matrices[group.name] for group in groups], solver=solver)
            found |= {group.name: torch.from_numpy(index) for group, index in zip(groups, answers, strict=True)}
        return Permutations(found)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """exp(logits), rows and columns normalised in turn: doubly stochastic in its last two axes, the columns exactly.

    >>> sinkhorn(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), 1).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    with torch.no_grad():
        lowest = (logits - logits.amax(-1, keepdim=True)).amax(-2).amin()
    if bool(lowest > -_RANGE):
        scaled: Tensor = _Scaling.apply(logits, iterations)
        return scaled
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


class _Scaling(torch.autograd.Function):
    """The same as u K v' with K = exp(logits): u = 1 / (K v) and v = 1 / (K' u) in turn, in float64.

    An iteration is two products of a matrix and a vector, and so is its gradient; what all of them add to the gradient
    of K is one product in the end.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        wide = logits.double()
        kernel = (wide - wide.amax(-1, keepdim=True)).exp_()
        u, v = torch.ones_like(kernel[..., :1]), torch.ones_like(kernel[..., :1])
        us, vs = [], [v]
        for _ in range(iterations):
            u = (kernel @ v).reciprocal_()
            v = (kernel.mT @ u).reciprocal_()
            us.append(u)
            vs.append(v)
        ctx.save_for_backward(kernel, torch.cat(us, -1), torch.cat(vs, -1))
        return (u * kernel * v.mT).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        kernel, us, vs = ctx.saved_tensors
        wide, u, v = gradient.double(), us[..., -1:], vs[..., -1:]
        through = wide * kernel
        of_u, of_v = through @ v, through.mT @ u
        left, right = [], []
        for k in range(us.shape[-1] - 1, -1, -1):
            of_sums = -of_v * vs[..., k + 1 : k + 2].square()  # of K' u
            left.append(us[..., k : k + 1])
            right.append(of_sums)
            of_sums = -(of_u + kernel @ of_sums) * us[..., k : k + 1].square()  # of K v
            left.append(of_sums)
            right.append(vs[..., k : k + 1])
            of_u, of_v = torch.zeros_like(of_u), kernel.mT @ of_sums
        of_kernel = wide * (u * v.mT) + torch.cat(left, -1) @ torch.cat(right, -1).mT
        return of_kernel.mul_(kernel).to(gradient.dtype), None


def _multiplied(tensor: Tensor, member: Member, matrix: Tensor) -> Tensor:
    """`tensor` with the member's stretch of its axis multiplied by `matrix`."""
    x = tensor.movedim(member.axis, 0)
    end = member.offset + len(matrix) * member.inner * member.outer
    whole = end - member.offset == len(x)
    stretch = (x if whole else x[member.offset : end]).reshape(member.outer, len(matrix), -1)
    moved = (matrix @ stretch).reshape(-1, *x.shape[1:])
    return (moved if whole else torch.cat([x[: member.offset], moved, x[end:]])).movedim(0, member.axis)
