"""Our figures beside the paper's: differences in standard deviations, and whether the expected order holds."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]
"""Spreads (mean, std, n) by the names of figures."""
KINDS = {"RR": "regular_regular", "SR": "star_heldout", "SS": "star_source"}
# Longer operators first: `<` is the start of `<=`.
ORDERS = {" <= ": operator.le, " < ": operator.lt}
# A grid that contains another is measured in other batches: equal up to rounding.
ROUNDING = 1e-6


def figures_of(results: Mapping[str, Any], split: str = "train") -> dict[str, Any]:
    """The figures of a run's results, or of a point of a sweep: losses, barriers, and accuracies in percent."""
    of = results[split]
    found = {"regular": of["regular_loss"], "star": as_spread(of["star_loss"])}
    for name, kind in KINDS.items():
        if of.get(kind, {"n": 0})["n"]:
            found[name] = of[kind]
    if "RR" not in found and of.get("regular_regular_unmatched", {"n": 0})["n"]:  # a run that does not match
        found["RR"] = of["regular_regular_unmatched"]
    if "SR" in found:
        found["largest"] = of["largest_loss"]["star_heldout"]
    accuracy = results["accuracy"][split] if "accuracy" in results else of.get("metrics", {}).get("accuracy")
    if accuracy is not None:
        found |= {f"{kind}_accuracy": percent(as_spread(accuracy[kind])) for kind in ("regular", "star")}
    return found


def percent(value: Mapping[str, Any]) -> dict[str, Any]:
    """A spread of shares, in percent."""
    return {key: one if key == "n" or one is None else 100 * one for key, one in value.items() if key != "interval"}


def as_spread(value: Mapping[str, Any] | float) -> Mapping[str, Any]:
    """A spread, or a single value as one."""
    return value if isinstance(value, Mapping) else {"mean": value, "std": None, "n": 1}


def as_paper(number: float | Sequence[float | None]) -> dict[str, Any]:
    """A number of the paper's as mean and standard deviation."""
    mean, std = number if isinstance(number, Sequence) else (number, None)
    return {"mean": mean, "std": std}


def z_of(ours: Mapping[str, Any], paper: Mapping[str, Any]) -> float | None:
    """(ours - paper) / sqrt(s1^2 + s2^2); None where neither has a spread."""
    variance = sum(float(one["std"]) ** 2 for one in (ours, paper) if one["std"] is not None)
    if ours["mean"] is None or not variance:
        return None
    return float((ours["mean"] - paper["mean"]) / math.sqrt(variance))


def order_held(rules: Sequence[str], rows: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """Whether each rule holds, such as `SR < RR`, of every row that has both, or `SR@50 < SR@2`, of two rows.

    Returns:
        for each rule and row: rule, row (None where the rule names rows), left, right, holds (None: not measured).
    """
    found = []
    for rule in rules:
        sign = next(sign for sign in ORDERS if sign in rule)
        sides = [re.fullmatch(r"([^@]+)(?:@(.+))?", side.strip()) for side in rule.split(sign)]
        (left, left_row), (right, right_row) = (side.groups() for side in sides if side is not None)
        named = left_row is not None
        for row in [None] if named else rows:
            values = [
                rows.get(str(at if named else row), {}).get(str(figure), {}).get("mean")
                for figure, at in ((left, left_row), (right, right_row))
            ]
            if None in values and not named:
                continue
            found.append(
                {"rule": rule, "row": row, "left": values[0], "right": values[1], "holds": _holds(sign, values)}
            )
    return found


def _holds(sign: str, values: Sequence[float | None]) -> bool | None:
    left, right = values
    if left is None or right is None:
        return None
    return bool(ORDERS[sign](left, right + (ROUNDING if "=" in sign else 0)))
