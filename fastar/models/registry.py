"""Registry of architectures. To add one: a module here with a table `MODELS` of its own, and its name below."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Literal, get_args, get_origin

import torch
from torch import nn

from fastar.errors import FastarError, did_you_mean
from fastar.runtime.seeds import derive_seed

_MODULES = (
    "densenet",
    "imagenet",
    "mlp",
    "resnet",
    "vgg",
    "vit",
    "wrn",
)
MODELS: dict[str, Callable[..., nn.Module]] = {}
"""Name of an architecture -> what builds it from `input_shape`, `classes` and its settings."""
for _name in _MODULES:
    MODELS |= import_module(f"fastar.models.{_name}").MODELS

# Anything larger is a size that torch does not take, or never ends.
LARGEST = 10**6


def require_arch(arch: str) -> None:
    """Raise FastarError, with the nearest valid name, unless `arch` is registered."""
    if arch not in MODELS:
        raise FastarError(
            f"unknown architecture {arch!r}: {did_you_mean(arch, MODELS)}choose one of {', '.join(sorted(MODELS))}"
        )


def model_options(arch: str) -> dict[str, object]:
    """The settings that `arch` takes and their defaults, beyond the input shape and the number of classes."""
    return {name: parameter.default for name, parameter in _parameters(arch).items()}


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
            hint = did_you_mean(name, valid)
            raise FastarError(f"model.{name} is not a setting of {arch}: {hint}it takes {', '.join(valid) or 'none'}")
        _check_value(arch, name, options[name], valid[name])
    try:
        with seeded(seed):
            model = MODELS[arch](input_shape=input_shape, classes=classes, **options)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        given = ", ".join(f"model.{name}={value}" for name, value in options.items())
        raise FastarError(f"{arch} with {given} does not fit into memory; make it smaller") from error
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def option_choices(arch: str) -> dict[str, tuple[str, ...]]:
    """The values that those options of `arch` take which are words, such as `activation`."""
    parameters = _parameters(arch)
    return {name: get_args(p.annotation) for name, p in parameters.items() if get_origin(p.annotation) is Literal}


def _parameters(arch: str) -> dict[str, inspect.Parameter]:
    """The parameters that are settings: those that the entry in `MODELS` leaves open."""
    require_arch(arch)
    make = MODELS[arch]
    given = ("input_shape", "classes", *(make.keywords if isinstance(make, partial) else ()))
    parameters = inspect.signature(make, eval_str=True).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in given}


def _check_value(arch: str, name: str, value: object, default: object) -> None:
    """A FastarError unless `value` is of the kind of the option's default, and one of its choices where it has some."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise FastarError(f"model.{name}={value!r} of {arch} must be true or false")
        return
    if isinstance(default, str):
        choices = option_choices(arch).get(name)
        if choices is None and not isinstance(value, str):
            raise FastarError(f"model.{name}={value!r} of {arch} must be a word")
        if choices is not None and value not in choices:
            hint = did_you_mean(str(value).lower(), choices)
            raise FastarError(f"model.{name}={value!r} of {arch}: {hint}choose one of {', '.join(choices)}")
        return
    whole = isinstance(default, int)
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise FastarError(f"model.{name}={value!r} of {arch} must be a {'whole ' if whole else ''}number")
    if abs(value) > LARGEST:
        raise FastarError(f"model.{name}={value:.3g} of {arch} must be at most {LARGEST:,}")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Inside, torch's CPU generator runs from `seed`, afterwards it is where it was (None: left alone); and layers are
    made in float32, whatever torch's default is: in others they would draw other values."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:  # the CPU's alone: torch.manual_seed would move those of GPUs too
                torch.default_generator.manual_seed(derive_seed(seed, "initialisation"))
            yield
    finally:
        torch.set_default_dtype(default)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable numbers in `model`."""
    return sum(p.numel() for p in model.parameters())
