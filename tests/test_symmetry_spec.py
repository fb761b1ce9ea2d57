"""Groups written by hand: they equal the derived ones, are proven the same way, and mistakes are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matching_block_models import BLOCK_MODELS
from matching_models import CASES, IMAGES, derived
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.symmetry import Group, PermutationSpec, Span, Symmetry

FLATTEN: dict[str, Any] = {
    "conv.weight": ("conv", None, None, None),
    "conv.bias": ("conv",),
    **{f"norm.{leaf}": ("conv",) for leaf in ("weight", "bias", "running_mean", "running_var")},
    "hidden.weight": ("hidden", Span("conv", inner=4)),
    "hidden.bias": ("hidden",),
    "out.weight": (None, "hidden"),
    "out.bias": (None,),
}
CONCATENATED: dict[str, Any] = {
    "a.weight": ("a", None, None, None),
    "a.bias": ("a",),
    "b.weight": ("b", "a", None, None),
    "b.bias": ("b",),
    **{f"norm.{leaf}": (["a", "b"],) for leaf in ("weight", "bias", "running_mean", "running_var")},
    "out.weight": (None, ["a", "b"]),
    "out.bias": (None,),
    "side.weight": (None, "b"),
    "side.bias": (None,),
}


def groups_of(symmetry: Symmetry) -> set[tuple[object, ...]]:
    def of(group: Group | None) -> tuple[object, ...] | None:
        return None if group is None else (group.name, group.size, frozenset(group.members))

    return {(of(g), of(symmetry.group(g.parent)) if g.parent else None) for g in symmetry.groups}


@pytest.mark.parametrize(("name", "axes"), [("flatten", FLATTEN), ("concatenated", CONCATENATED)])
def test_a_spec_is_what_is_derived(name: str, axes: dict[str, Any]) -> None:
    model, inputs = CASES[name]
    written, found = PermutationSpec(axes).symmetry(model, inputs), derived()[name]
    assert groups_of(written) == groups_of(found)
    assert (written.parameters, written.buffers, written.tied) == (found.parameters, found.buffers, found.tied)


def test_tied_parameters_take_one_name_or_both() -> None:
    model, inputs = CASES["two_axes"]
    axes: dict[str, Any] = {
        "stem.weight": ("h", None),
        "stem.bias": ("h",),
        "mix.weight": ("h", "h"),
        "mix.bias": ("h",),
        "readout.weight": (None, "h"),
        "readout.bias": (None,),
    }
    one = PermutationSpec(axes).symmetry(model, inputs)
    both = {**axes, "again.weight": (None, "h"), "again.bias": (None,)}
    other = {k.replace("readout", "again"): v for k, v in axes.items()}
    (group,) = one.groups
    assert {"readout.weight", "again.weight"} <= {m.tensor for m in group.members}
    for written in (both, other):
        assert groups_of(PermutationSpec(written).symmetry(model, inputs)) == groups_of(one)
    with pytest.raises(FastarError, match=r"'again\.weight' and 'readout\.weight' are one tensor"):
        PermutationSpec({**both, "again.weight": (None, None)}).symmetry(model, inputs)


def test_blocks() -> None:
    """Attention of 3 heads with 4 units inside each, the heads scaled by a parameter of their own."""
    model, by_hand, example = BLOCK_MODELS["attention"]
    axes: dict[str, Any] = {"stem.weight": ("stem", None), "stem.bias": ("stem",), "scale": ("heads",)}
    for name, group in (("query", "query"), ("key", "query"), ("value", "value")):
        axes |= {f"{name}.weight": (group, "stem"), f"{name}.bias": (group,)}
    axes |= {"project.weight": ("stem", "value"), "project.bias": ("stem",)}
    axes |= {"readout.weight": (None, "stem"), "readout.bias": (None,)}
    blocks = {"query": "heads", "value": "heads"}
    assert groups_of(PermutationSpec(axes, blocks).symmetry(model, (example,))) == groups_of(by_hand)
    with pytest.raises(FastarError, match="changes its outputs"):
        PermutationSpec(axes).symmetry(model, (example,))
    with pytest.raises(FastarError, match="'heads', the parent of 'query', has a parent itself"):
        PermutationSpec(axes, {**blocks, "heads": "stem"}).symmetry(model, (example,))
    with pytest.raises(FastarError, match=r"group 'absent' has: give sizes="):
        PermutationSpec(axes, {"query": "absent"}).symmetry(model, (example,))
    with pytest.raises(FastarError, match="must divide"):
        PermutationSpec(axes, {"query": "absent"}, {"absent": 5}).symmetry(model, (example,))


def test_a_network_that_cannot_be_traced() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.readout = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.hidden(x).relu()
            return self.readout(x if float(x.sum()) > 0 else -x)

    axes: dict[str, Any] = {
        "hidden.weight": ("h", None),
        "hidden.bias": ("h",),
        "readout.weight": (None, [3, "late"]),
        "readout.bias": (None,),
    }
    model, inputs = Branch(), (torch.zeros(2, 6),)
    with pytest.raises(FastarError, match="changes its outputs"):  # 5 of 8 units move in one place only
        PermutationSpec(axes, sizes={"late": 5}).symmetry(model, inputs)
    axes["hidden.weight"], axes["hidden.bias"] = ([3, "late"], None), ([3, "late"],)
    (group,) = PermutationSpec(axes, sizes={"late": 5}).symmetry(model, inputs).groups
    assert (group.size, {m.offset for m in group.members}) == (5, {3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden.weight": ("hidden", None)}, "no parameter or buffer 'hiden.weight': did you mean 'hidden.weight'"),
        ({"out.bias": None}, "leaves out 'out.bias' of ConvFlatten: write None"),
        ({"norm.running_mean": None, "conv.bias": None}, "leaves out 'conv.bias', 'norm.running_mean'"),
        ({"conv.bias": ("conv", None)}, r"\['conv.bias'\] names 2 axes; it has 1: \[7\]"),
        ({"conv.bias": ("hidden",)}, "axis 0 of 'hidden.weight' has 9 positions.*group 'hidden' has 7 units"),
        ({"hidden.weight": ("hidden", "conv")}, "axis 1 of 'hidden.weight' has 28 positions, 1 to a unit"),
        ({"hidden.weight": ("hidden", Span("conv", inner=3))}, "needs whole units"),
        ({"hidden.weight": ("hidden", ["conv", 20])}, "has 27 positions; the axis has 28"),
        ({"hidden.weight": ("hidden", Span("conv", inner=0))}, "neither a group, a Span nor"),
        ({"out.bias": (["hidden", 2.5],)}, "2.5 is neither a group"),
        ({"norm.running_var": (None,)}, r"changes its outputs \(groups conv\)"),
        ({"hidden.weight": ("hidden", Span("conv", outer=4))}, r"changes its outputs \(groups conv\)"),
    ],
)
def test_a_mistake_in_a_spec_is_named_in_one_line(change: dict[str, Any], message: str) -> None:
    axes = {name: entry for name, entry in {**FLATTEN, **change}.items() if entry is not None}
    with pytest.raises(FastarError, match=message) as why:
        PermutationSpec(axes).symmetry(CASES["flatten"][0], IMAGES)
    assert "\n" not in str(why.value)
