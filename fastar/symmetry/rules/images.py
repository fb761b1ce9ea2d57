"""Rules of operations on images: patches, pixels and resampling. See `fastar.symmetry.rules.table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from fastar.symmetry import labels, rearrange
from fastar.symmetry.labels import Labels, labelled
from fastar.symmetry.rules.call import Call
from fastar.symmetry.rules.shapes import hold_all


def kept(call: Call, x: Labels, gone: set[int], shape: Sequence[int]) -> Labels:
    """Labels of a result of `shape` whose dimensions `gone` are held in `x`, and have nothing to do with it then."""
    call.hold(x, gone)
    rest = labels.reduce(call.known, x, gone, keep=True)
    return Labels(tuple(shape), rest.cells, rest.alike)


def pool(spatial: int) -> Callable[[Call], Labels]:
    """The last `spatial` axes are pooled or resampled; the others pass."""

    def rule(call: Call) -> Labels:
        x = call.labels()
        return kept(call, x, set(range(len(x.shape) - spatial, len(x.shape))), call.shape)

    return rule


def pool_with_indices(spatial: int) -> Callable[[Call], list[Labels]]:
    """The same, and where each value was, which is a number of a position that stays."""
    rule = pool(spatial)

    def both(call: Call) -> list[Labels]:
        return [rule(call)] * 2

    return both


def pixel_shuffle(call: Call) -> Labels:
    """[C r r, H, W] becomes [C, H r, W r]: whole sets of r x r channels move."""
    x, r = call.labels(), call["upscale_factor"]
    *lead, channels, height, width = x.shape
    parts = rearrange.reshape(call.known, x, (*lead, channels // r**2, r * r, height, width))
    at = len(lead)
    call.hold(parts, [at + 1])
    return kept(call, labels.reduce(call.known, parts, {at + 1}), {at + 1, at + 2}, call.shape)


def pixel_unshuffle(call: Call) -> Labels:
    """[C, H r, W r] becomes [C r r, H, W]."""
    x, r = call.labels(), call["downscale_factor"]
    *lead, channels, _, _ = x.shape
    at = len(lead)
    narrow = kept(call, x, {at + 1, at + 2}, call.shape)
    wide = narrow.moved([*range(at + 1), at + 2, at + 3], (*lead, channels, r * r, *call.shape[-2:]))
    return rearrange.reshape(call.known, wide, call.shape)


def channel_shuffle(call: Call) -> Labels:
    """[g, C / g] read in columns."""
    x, groups = call.labels(), call["groups"]
    parts = rearrange.reshape(call.known, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    rest = range(3, len(parts.shape))
    turned = parts.moved([0, 2, 1, *rest], (x.shape[0], x.shape[1] // groups, groups, *x.shape[2:]))
    return rearrange.reshape(call.known, turned, x.shape)


def patches(call: Call) -> Labels:
    """im2col: [B, C, H, W] becomes [B, C kernel, places]."""
    x, size = call.labels(), prod(call["kernel_size"])
    *lead, channels, _, _ = x.shape
    at = len(lead)
    narrow = kept(call, x, {at + 1, at + 2}, (*lead, channels, 1, 1))
    wide = Labels((*lead, channels, size, call.shape[-1]), narrow.cells, narrow.alike)
    return rearrange.reshape(call.known, wide, call.shape)


def from_patches(call: Call) -> Labels:
    """col2im: [B, C kernel, places] becomes [B, C, H, W]."""
    x, size = call.labels(), prod(call["kernel_size"])
    *lead, channels, places = x.shape
    parts = rearrange.reshape(call.known, x, (*lead, channels // size, size, places))
    return kept(call, parts, {len(lead) + 1, len(lead) + 2}, call.shape)


def windows(call: Call) -> Labels:
    """Tensor.unfold: windows along a dimension, which stays, with what is in them as a new last dimension."""
    x = call.labels()
    return kept(call, x, {call.arguments.get("dimension", 0) % len(x.shape)}, call.shape)


def grid_sample(call: Call) -> Labels:
    """Values of images [B, C, ...] at places of a grid, which stays."""
    x = call.labels("input")
    hold_all(call, call.labels("grid"))
    return kept(call, x, set(range(2, len(x.shape))), call.shape)


def stays(call: Call) -> Labels:
    """All that is read stays, and so does the result (grids)."""
    for node in call.tensors():
        hold_all(call, call.labels(node))
    return Labels(call.shape)


def embedding_bag(call: Call) -> list[Labels]:
    """Sums of rows of a table [numbers, units]: only what is in the rows moves."""
    weight = call.labels("weight")
    for name in ("indices", "offsets", "per_sample_weights"):
        if call.arguments.get(name) is not None:
            hold_all(call, call.labels(name))
    call.hold(weight, [0])
    shape = call.shape
    out = labelled(shape, {1: labels.alone(call.known, weight, 1)})
    values = call.node.meta["val"]
    return [out, *(Labels(tuple(one.shape)) for one in values[1:])]
