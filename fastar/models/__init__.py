"""Architectures and their registry. To add one: write a module, add one line to `MODELS`."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastar.errors import FastarError
from fastar.models.imagenet import imagenet_resnet18, imagenet_resnet50
from fastar.models.mlp import Mlp
from fastar.models.resnet import resnet8, resnet18, resnet20
from fastar.seeds import derive_seed

MODELS: dict[str, Callable[..., nn.Module]] = {
    "imagenet-resnet18": imagenet_resnet18,
    "imagenet-resnet50": imagenet_resnet50,
    "mlp": Mlp,
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet20": resnet20,
}


def require_arch(arch: str) -> None:
    """Raise FastarError, with the nearest valid name, unless `arch` is registered."""
    if arch not in MODELS:
        near = difflib.get_close_matches(arch, MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FastarError(f"unknown architecture {arch!r}: {hint}choose one of {', '.join(sorted(MODELS))}")


def model_options(arch: str) -> dict[str, object]:
    """The settings that `arch` takes and their defaults, beyond the input shape and the number of classes."""
    require_arch(arch)
    parameters = inspect.signature(MODELS[arch]).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("input_shape", "classes")}


def build_model(
    arch: str, *, input_shape: tuple[int, int, int], classes: int, seed: int | None = None, **options: object
) -> nn.Module:
    """A freshly initialised network in training mode, on the CPU, fp32, convolutions channels-last.

    Args:
        arch: a key of `MODELS`.
        input_shape: (channels, height, width) of one image.
        classes: number of logits.
        seed: determines the initialisation, and torch's global generator is left as it was; None draws from it.
        options: settings of the architecture (`model_options(arch)`), such as `width` and `depth`.

    Raises:
        FastarError: unknown architecture or option, or a value the architecture refuses.
    """
    valid = model_options(arch)
    for name in options:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise FastarError(f"model.{name} is not a setting of {arch}: {hint}it takes {', '.join(valid) or 'none'}")
        value, whole = options[name], isinstance(valid[name], int)
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise FastarError(f"model.{name}={value!r} of {arch} must be a {'whole ' if whole else ''}number")
    with _seeded(seed):
        model = MODELS[arch](input_shape=input_shape, classes=classes, **options)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Inside, torch's CPU generator runs from `seed`; afterwards it is where it was. None: left alone."""
    if seed is None:
        yield
        return
    generator = torch.default_generator  # the CPU's alone: torch.manual_seed would move those of GPUs too
    before = generator.get_state()
    try:
        generator.manual_seed(derive_seed(seed, "initialisation"))
        yield
    finally:
        generator.set_state(before)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable numbers in `model`."""
    return sum(p.numel() for p in model.parameters())
