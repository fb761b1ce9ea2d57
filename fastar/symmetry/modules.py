"""The groups of a module, as far as a method of matching needs them."""

from __future__ import annotations

from torch import nn

from fastar.config import MatchingSettings
from fastar.symmetry.derive import derive_symmetry
from fastar.symmetry.symmetry import Symmetry, without_groups
from fastar.symmetry.verify import ExampleInputs


def symmetry_by_settings(
    settings: MatchingSettings,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    allow_partial: bool = False,
    name: object = None,
) -> Symmetry:
    """`derive_symmetry`, but no groups for `matching.method=none`, which needs none; nothing is traced then.

    Raises:
        FastarError: as `derive_symmetry`.
    """
    if settings.method == "none":
        return without_groups(model)
    return derive_symmetry(model, example_inputs, allow_partial=allow_partial, name=name)
