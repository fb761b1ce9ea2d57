"""Settings from files, from `key=value` and from values: resolved, checked, and what is wrong said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fastar.config.compare import default_values, nested, put
from fastar.config.datasets import dataset_spec
from fastar.config.recipes import config_path, merge, read_recipe, recipe_path
from fastar.config.renamed import renewed
from fastar.config.scales import scaled
from fastar.config.settings import MatchingSettings, Settings
from fastar.config.strict_yaml import read_yaml, shortened
from fastar.errors import FastarError


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["train.lr=0.1", "seed=3"]` as nested settings; values are YAML.

    >>> parse_overrides(["train.lr=0.1", "train.milestones=[100, 150]"])
    {'train': {'lr': 0.1, 'milestones': [100, 150]}}
    """
    found: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise FastarError(f"{override!r} is not a setting: write key=value, such as train.lr=0.05")
        try:
            # A path may be any bytes; given escaped, as YAML writes them, or as they are.
            value = text if any("\ud800" <= c <= "\udfff" for c in text) else read_yaml(text)
        except FastarError as error:
            raise FastarError(f"{shortened(override)!r}: the value is not valid YAML ({error})") from error
        put(found, key, value)
    return renewed(found)


def as_override(key: str, value: object) -> str:
    """`key=value` that `parse_overrides` reads back to just this value, whatever characters it has.

    >>> as_override("dataset.root", "a #b")
    "dataset.root='a #b'"
    """
    plain = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**9).strip()
    return f"{key}={text.removesuffix('...').strip()}"


def load_settings(
    *,
    dataset: str | None = None,
    arch: str | None = None,
    file: Path | None = None,
    scale: str = "full",
    values: Mapping[str, object] | None = None,
    overrides: Iterable[str] = (),
) -> Settings:
    """Resolve settings: a file (given, or the one shipped for dataset and architecture), its scale, then changes.

    Args:
        file: of settings, or the name of a shipped configuration.
        scale: `smoke`, `small` or `full` (`fastar.config.scales`); changes are taken as they are.
        values: changes by their dotted keys.
        overrides: changes as `key=value`, over those of `values`.

    Raises:
        FastarError: unreadable file, unknown key (the nearest valid one is named), or value out of range.
    """
    changes = merge(nested(values or {}), parse_overrides(overrides))
    if file is not None:
        content = read_recipe(recipe_path(file))
    else:
        if dataset is None:
            raise FastarError("no dataset: give --dataset NAME, --data MODULE:FUNCTION or --config FILE")
        arch = arch or dataset_spec(dataset).arch
        if not arch:
            raise FastarError("no network: give --model MODULE:FUNCTION or --arch NAME")
        path = config_path(dataset, arch)
        content = read_recipe(path) if path else {}
    model = content.get("model")
    if arch is not None and isinstance(model, Mapping) and model.get("arch", arch) != arch:
        content = {**content, "model": {}}  # its width would not fit
    named = {"dataset.name": dataset, "model.arch": arch}
    content = merge(content, nested({key: name for key, name in named.items() if name is not None}))
    source = str(file or "settings")
    if scale != "full":
        validate(merge(content, changes), source)  # what is wrong is said of the file, not of the scale
        content = scaled(content, scale, defaults=default_values())
    return validate(merge(content, changes), source)


def validate(content: Mapping[str, Any], source: str = "settings") -> Settings:
    """Typed settings from nested mappings.

    Raises:
        FastarError: one line naming the first wrong key, what was expected, and the nearest valid key.
    """
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise FastarError(f"{source}: {explained(error)}") from error


def matching_settings(values: Mapping[str, Any]) -> MatchingSettings:
    """The section `matching` alone, from its keys.

    Raises:
        FastarError: one line naming the first wrong key, as `validate`.
    """
    try:
        return MatchingSettings.model_validate(renewed({"matching": values})["matching"])
    except ValidationError as error:
        raise FastarError(explained(error, Settings, "matching")) from error


def explained(error: ValidationError, model: type[BaseModel] = Settings, *section: str) -> str:
    """The first error as one line; unknown keys come first, since a typo often also leaves a key missing."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    parts = [*section, *(str(part) for part in first["loc"])]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(parts[:-1], model)
        elsewhere = {name.rpartition(".")[2]: name for name in reversed(_all_keys(model))}  # train.lr before star.lr
        near = [".".join([*parts[:-1], name]) for name in difflib.get_close_matches(parts[-1], valid, n=1)]
        near = near or [elsewhere[name] for name in difflib.get_close_matches(parts[-1], elsewhere, n=1)]
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {key}: {hint}valid here: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "model_type":
        keys = ", ".join(f"{key}.{name}" for name in _valid_keys(parts, model))
        return f"{key}={shortened(repr(first['input']))}: {key} is a section of settings: {keys}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:  # of several sections together: the message names the key
        return message
    shown = "" if isinstance(first["input"], Mapping | BaseModel) else f"={shortened(repr(first['input']))}"
    return f"{key}{shown}: {message[0].lower()}{message[1:]}"


def _valid_keys(section: list[str], model: type[BaseModel]) -> list[str]:
    for name in section:
        field = model.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def _all_keys(model: type[BaseModel]) -> list[str]:
    return [*model.model_fields, *(f"{s}.{k}" for s in model.model_fields for k in _valid_keys([s], model))]
