"""Networks whose units lie within axes of others: grouped convolutions, stacks of experts, heads that share keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.symmetry import Arrangement, Group, Member, Symmetry

STREAM = 6
GROUPS, READ, MADE = 3, 4, 5
EXPERTS, FIRST, SECOND = 3, 5, 4
SHARED, REPEATED, INSIDE = 3, 2, 4
ROWS, COLUMNS, HIDDEN = 5, 4, 6


class Grouped(nn.Module):
    """A grouped convolution, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, GROUPS * READ, 3), nn.BatchNorm2d(GROUPS * READ)
        self.conv = nn.Conv2d(GROUPS * READ, GROUPS * MADE, 3, groups=GROUPS)
        self.readout = nn.Linear(GROUPS * MADE, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.norm(self.stem(x)))))
        return self.readout(x.mean((2, 3)))


class DeepExperts(nn.Module):
    """Stacked experts of two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.readout = nn.Linear(5, STREAM), nn.Linear(STREAM, EXPERTS), nn.Linear(STREAM, 4)
        self.first = nn.Parameter(torch.zeros(EXPERTS, STREAM, FIRST))
        self.second = nn.Parameter(torch.zeros(EXPERTS, FIRST, SECOND))
        self.third = nn.Parameter(torch.zeros(EXPERTS, SECOND, STREAM))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        hidden = torch.tanh(torch.bmm(x.expand(EXPERTS, *x.shape), self.first))
        made = torch.bmm(torch.tanh(torch.bmm(hidden, self.second)), self.third)
        return self.readout(torch.einsum("be,ebd->bd", torch.sigmoid(self.gate(x)), made))


class SharedKeys(nn.Module):
    """Attention in which several queries share a key and a value, as in Llama; with positions turned or without."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.stem, self.query = nn.Linear(5, STREAM), nn.Linear(STREAM, SHARED * REPEATED * INSIDE)
        self.key, self.value = nn.Linear(STREAM, SHARED * INSIDE), nn.Linear(STREAM, SHARED * INSIDE)
        self.project, self.readout = nn.Linear(SHARED * REPEATED * INSIDE, STREAM), nn.Linear(STREAM, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        q, k, v = (one(x).unflatten(-1, (-1, INSIDE)).transpose(1, 2) for one in (self.query, self.key, self.value))
        if self.turned:
            q, k = _turned(q), _turned(k)
        k, v = (one.repeat_interleave(REPEATED, 1) for one in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.readout((x + self.project(y)).mean(1))


def _turned(x: Tensor) -> Tensor:
    """[..., positions, units] with pairs of units turned by angles of their positions."""
    positions, speeds = torch.arange(x.shape[-2]).to(x), torch.tensor([1.0, 0.3]).to(x)
    angles = torch.outer(positions, speeds)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Hyper(nn.Module):
    """A network that makes another's matrix, [rows, columns] on one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.about = nn.Linear(5, COLUMNS), nn.Linear(5, HIDDEN)
        self.make, self.readout = nn.Linear(HIDDEN, ROWS * COLUMNS), nn.Linear(ROWS, 4)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.make(torch.tanh(self.about(x))).unflatten(-1, (ROWS, COLUMNS))
        return self.readout(torch.tanh((matrix @ torch.tanh(self.stem(x))[:, :, None])[..., 0]))


def both(name: str) -> tuple[Member, Member]:
    return Member(f"{name}.weight", 0), Member(f"{name}.bias", 0)


def written(model: nn.Module, groups: tuple[Group, ...], arranged: dict[str, Arrangement]) -> Symmetry:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = {name: shapes.pop(name) for name, _ in model.named_parameters()}
    return Symmetry(groups, parameters, shapes, arranged=arranged)


def apart(axes: int, **split: tuple[int, ...]) -> Arrangement:
    """Finer axes that stay apart; `a0` splits axis 0."""
    return Arrangement(tuple((n,) for n in range(axes)), split={int(axis[1:]): one for axis, one in split.items()})


def grouped() -> tuple[nn.Module, Symmetry, Tensor]:
    model = Grouped()
    vectors = ("weight", "bias", "running_mean", "running_var")
    norm = tuple(Member(f"norm.{name}", 0) for name in vectors)
    groups = (
        Group("groups", GROUPS, (Member("conv.weight", 0),)),
        Group("read", GROUPS * READ, (*both("stem"), *norm, Member("conv.weight", 2, within=0)), "groups"),
        Group(
            "made",
            GROUPS * MADE,
            (Member("conv.weight", 1, within=0), Member("conv.bias", 0), Member("readout.weight", 1)),
            "groups",
        ),
    )
    return model, written(model, groups, {"conv.weight": apart(5, a0=(GROUPS, MADE))}), torch.zeros(2, 3, 6, 6)


def deep_experts() -> tuple[nn.Module, Symmetry, Tensor]:
    model = DeepExperts()
    groups = (
        Group("stream", STREAM, (*both("stem"), Member("first", 1), Member("gate.weight", 1))),
        Group("experts", EXPERTS, (*both("gate"), Member("second", 0))),
        Group("hidden", EXPERTS * FIRST, (Member("first", 0), Member("second", 1, within=0)), "experts"),
        Group("more", EXPERTS * SECOND, (Member("second", 2, within=0), Member("third", 0)), "experts"),
        Group("out", STREAM, (Member("third", 1), Member("readout.weight", 1))),
    )
    arranged = {"first": Arrangement(((0, 2), (1,))), "third": Arrangement(((0, 1), (2,)))}
    return model, written(model, groups, arranged), torch.zeros(2, 5)


def shared_keys(turned: bool = True) -> tuple[nn.Module, Symmetry, Tensor]:
    model = SharedKeys(turned)
    reads = (Member("query.weight", 3), Member("key.weight", 1), Member("value.weight", 1), Member("readout.weight", 1))
    repeated = (
        *(Member(f"query.{name}", 1, within=0) for name in ("weight", "bias")),
        Member("project.weight", 2, within=1),
    )
    value = (*both("value"), Member("project.weight", 3, within=1))
    inside = (*(Member(f"query.{name}", 2, within=0) for name in ("weight", "bias")), *both("key"))
    own = (
        *both("query"),
        *(Member(f"key.{name}", 0, inner=INSIDE) for name in (("weight", "bias") if turned else ())),
        Member("project.weight", 1),
    )
    groups = [
        Group("stream", STREAM, (*both("stem"), *reads, *both("project"))),
        Group("heads", SHARED, own),
        Group("repeated", SHARED * REPEATED, repeated, "heads"),
        Group("value", SHARED * INSIDE, value, "heads"),
    ]
    if not turned:
        groups.append(Group("inside", SHARED * INSIDE, inside, "heads"))
    arranged = {
        "query.weight": apart(4, a0=(SHARED, REPEATED, INSIDE)),
        "query.bias": apart(3, a0=(SHARED, REPEATED, INSIDE)),
        "project.weight": apart(4, a1=(SHARED, REPEATED, INSIDE)),
    }
    return model, written(model, tuple(groups), arranged), torch.zeros(2, 7, 5)


def hyper() -> tuple[nn.Module, Symmetry, Tensor]:
    model = Hyper()
    groups = (
        Group("columns", COLUMNS, (*both("stem"), Member("make.weight", 1), Member("make.bias", 1))),
        Group("about", HIDDEN, (*both("about"), Member("make.weight", 2))),
        Group("rows", ROWS, (*both("make"), Member("readout.weight", 1))),
    )
    arranged = {"make.weight": apart(3, a0=(ROWS, COLUMNS)), "make.bias": apart(2, a0=(ROWS, COLUMNS))}
    return model, written(model, groups, arranged), torch.zeros(2, 5)
