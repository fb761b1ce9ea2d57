"""Checks that theta and sources can be matched at all: of one architecture, on one device, finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.symmetry.symmetry import Symmetry


def check_networks(
    symmetry: Symmetry, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor]
) -> tuple[int, torch.device]:
    """The number of sources, the same for every tensor, and the one device that everything is on.

    Args:
        theta: parameter name -> tensor; buffers may be among them and do not count.
        sources: parameter name -> [N, *shape].

    Raises:
        FastarError: another architecture, devices that differ, no sources, NaN or infinite values (named).
    """
    symmetry.check_state(theta, "theta")
    symmetry.check_state(sources, "sources", leading=1)
    count, device = _count_and_device(symmetry, theta, sources)
    for name in symmetry.counted(theta, sources):
        check_finite(theta[name], name, "theta")
        if not bool(torch.isfinite(sources[name].sum())):
            for n in range(count):
                check_finite(sources[name][n], name, f"source {n}")
    return count, device


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    """Raise FastarError if a tensor called `name` of the network `where` has NaN or infinite values."""
    # A sum is not finite if one of its terms is not; only then is each looked at.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise FastarError(f"{where} has NaN or infinite values in {name!r}: retrain or remove it")


def _count_and_device(
    symmetry: Symmetry, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor]
) -> tuple[int, torch.device]:
    names = [name for name in symmetry.parameters if name in theta and name in sources]
    if not names:
        raise FastarError("theta and the sources share no parameters of the model: there is nothing to match")
    first = names[0]
    count, device = sources[first].shape[0], theta[first].device
    for name in names:
        if sources[name].shape[0] != count:
            raise FastarError(
                f"sources hold {count} of {first!r} but {sources[name].shape[0]} of {name!r}: give all of each"
            )
        for where, tensor in (("theta", theta[name]), ("sources", sources[name])):
            if tensor.device != device:
                raise FastarError(
                    f"{name!r} of {where} is on {tensor.device}, {first!r} of theta on {device}: move one"
                )
    if count == 0:
        raise FastarError("there are no sources to match: give at least one")
    return count, device
