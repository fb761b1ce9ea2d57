"""Speed of trainings, from the epochs that a run's log knows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastar.runtime.timing import shares
from fastar.training import limited


def epoch_seconds(log: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Median seconds of a regular epoch, and mean seconds of a star epoch (matching included) and of matching alone.

    Means, since not every epoch need match. Of the star's last attempt, where earlier ones were interrupted.
    """
    regular = [entry["seconds"] for entry in _epochs(log, "regular", {"seconds"})]
    star = _epochs(log, "star", {"seconds", "begin_seconds"})
    return {
        "regular_epoch": statistics.median(regular) if regular else None,
        "star_epoch": _mean([e["seconds"] + e["begin_seconds"] for e in star]),
        "matching_per_epoch": _mean([e["begin_seconds"] for e in star]),
    }


def _epochs(log: Sequence[Mapping[str, Any]], kind: str, needed: set[str]) -> list[Mapping[str, Any]]:
    """The epochs of regular models, or of the star's last attempt, of which the log knows what is needed."""
    kinds = ("star",) if kind == "star" else ("source", "heldout")
    found = [entry for entry in log if entry.get("kind") in kinds and needed <= entry.keys()]
    if kind == "star":
        found = [entry for entry in found if "epoch" in entry]
        found = found[max((i for i, entry in enumerate(found) if entry["epoch"] == 0), default=0) :]
    return found


def speed(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The speed of training regular models and the star: images per second, the share of time that each span took
    (matching, load, augment, interpolate, forward, backward, update, other), and what limits the steps. Null where the
    log does not know."""
    found: dict[str, Any] = {}
    for kind in ("regular", "star"):
        known = [entry for entry in _epochs(log, kind, {"images", "begin_seconds"}) if entry.get("parts")]
        took: dict[str, float] = {"matching": sum(e["begin_seconds"] for e in known)} if kind == "star" else {}
        for entry in known:
            for name, seconds in entry["parts"].items():
                took[name] = took.get(name, 0.0) + seconds
        whole = sum(took.values())
        images = sum(entry["images"] for entry in known)
        if whole <= 0:
            found[kind] = None
            continue
        steps = shares({name: seconds for name, seconds in took.items() if name != "matching"})
        found[kind] = {
            "images_per_second": images / whole,
            "shares": shares(took),
            "limited": limited(steps.get("load", 0.0)),
        }
    return found


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
