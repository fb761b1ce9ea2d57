"""Old names of settings. They still load: from files, as `key=value`, from Python, and from old runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from fastar.errors import FastarError, OldName

# Old key: new key. A section may be one.
KEYS = {
    "dataset.called": "dataset.own_name",
    "figures": "logging",
    "matching.kicks": "matching.perturbations",
    "matching.orders": "matching.restarts",
}
# Key, old value: new value.
VALUES = {("matching.start", "guess"): "backward"}


def renewed(settings: Mapping[str, Any], *, told: bool = True) -> dict[str, Any]:
    """Nested settings under their new names.

    Args:
        told: warn (`OldName`) of each old name.

    Raises:
        FastarError: the old and the new name of one setting are both there.
    """
    found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
    for old, new in KEYS.items():
        holder, key, name = _place(found, old, new)
        if key not in holder:
            continue
        if name in holder:
            raise FastarError(f"{old} is now called {new}, and both are given; leave {old} out")
        holder[name] = holder.pop(key)
        _tell(old, new, told)
    for (key, value), new in VALUES.items():
        holder, name, _ = _place(found, key, key)
        if isinstance(holder.get(name), str) and holder[name] == value:
            holder[name] = new
            _tell(f"{key}={value}", f"{key}={new}", told)
    return found


def with_old_names(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `renewed` for the values of one section: what is recorded with models, and compared with it or
    with digests of it, keeps its names."""
    names = {new: old.rpartition(".")[2] for old, new in KEYS.items()}
    old_values = {(key, new): old for (key, old), new in VALUES.items()}
    found = {}
    for name, value in values.items():
        key = f"{section}.{name}"
        found[names.get(key, name)] = old_values.get((key, value), value) if isinstance(value, str) else value
    return found


def _place(settings: dict[str, Any], old: str, new: str) -> tuple[dict[str, Any], str, str]:
    """The mapping that holds the key `old`, and the last parts of both keys."""
    section, _, key = old.rpartition(".")
    holder = settings.get(section) if section else settings
    return holder if isinstance(holder, dict) else {}, key, new.rpartition(".")[2]


def _tell(old: str, new: str, told: bool) -> None:
    if told:
        warnings.warn(f"{old} is now called {new}; the next version will not know the old name", OldName, stacklevel=4)
