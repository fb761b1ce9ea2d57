"""Settings by dotted keys, and their comparison, with those of older versions too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastar.config.renamed import renewed
from fastar.config.settings import DatasetSettings, ModelSettings, Settings
from fastar.errors import FastarError


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots.

    >>> flatten({"train": {"lr": 0.1}, "seed": 0})
    {'train.lr': 0.1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nested(values: Mapping[str, object]) -> dict[str, Any]:
    """Values by their dotted keys, nested: the inverse of `flatten`.

    >>> nested({"train.lr": 0.1, "seed": 0})
    {'train': {'lr': 0.1}, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        put(found, key, str(value) if isinstance(value, Path) else value)
    return found


def put(settings: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key of nested settings."""
    *sections, name = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise FastarError(f"{key}={value}: {section} is set to a value before; leave one out")
    settings[name] = value


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ between two nested settings, or parts of them, each with its old and new value.

    A key that one of them lacks has its default: an older version did what that does, and some are recorded only where
    they differ from it.

    >>> changes({"train": {"lr": 0.5}}, {"train": {"lr": 0.1, "label_smoothing": 0.0}})
    {'train.lr': (0.5, 0.1)}
    """
    a, b = (flatten(renewed(one, told=False)) for one in (old, new))
    known = default_values()
    a, b = ({**{key: known[key] for key in other if key in known}, **own} for own, other in ((a, b), (b, a)))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


@lru_cache(maxsize=1)
def default_values() -> dict[str, Any]:
    """The settings that have a default, by their dotted keys."""
    required = DatasetSettings.model_construct(name=""), ModelSettings.model_construct(arch="")
    whole = Settings.model_construct(dataset=required[0], model=required[1]).model_dump(mode="json")
    return {key: value for key, value in flatten(whole).items() if key not in ("dataset.name", "model.arch")}
