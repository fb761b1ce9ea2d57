"""Curves through the barriers of several runs: a straight line, and a power law of the number of sources."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastar.evaluation.resampling import interval

# Points that a fit needs: more than it has parameters.
LINE_POINTS, POWER_POINTS = 3, 4
# Resamples that a power law is fitted to: each takes milliseconds.
POWER_RESAMPLES = 200
STEEPEST = 10.0
# Places that a band is given at.
BAND_POINTS = 33


def line(x: Sequence[float], y: Sequence[float], resampled: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The least-squares line y = slope x + intercept.

    Args:
        resampled: x and y of each point, resampled (`resampled_means`); the slope's interval is from them.

    Returns:
        slope, intercept, r2 (None: y is the same everywhere), slope_interval, band (`_band`); or what they lack, under
        reason.
    """
    if len(x) < LINE_POINTS:
        return no_line(f"needs {LINE_POINTS} points, there are {len(x)}")
    if np.ptp(x) <= 1e-9 * max(map(abs, x)):
        return no_line("x is the same at all points")
    slope, intercept = _line(np.asarray(x)[:, None], np.asarray(y)[:, None])
    slopes, heights = _line(np.stack([one for one, _ in resampled]), np.stack([one for _, one in resampled]))
    found = {"slope": float(slope[0]), "intercept": float(intercept[0])}
    r2 = _r2(y, slope[0] * np.asarray(x) + intercept[0])
    band = _band(np.linspace(min(x), max(x), BAND_POINTS), lambda at: slopes * at + heights)
    return {**found, "r2": r2, "slope_interval": interval(slopes), "band": band, "reason": None}


def power_law(n: Sequence[float], y: Sequence[float], resampled: Sequence[np.ndarray]) -> dict[str, Any]:
    """The curve y = a n^-b + c, a and c not negative, b from 0 to 10, by least squares.

    Args:
        resampled: y of each point, resampled (`resampled_means`); the intervals are from the first 200.

    Returns:
        a, b, c, r2, b_interval, c_interval, band (`_band`); or what they lack, under reason.
    """
    nothing = dict.fromkeys(("a", "b", "c", "r2", "b_interval", "c_interval", "band"))
    if len(n) < POWER_POINTS:
        return {**nothing, "reason": f"needs {POWER_POINTS} points, there are {len(n)}"}
    found = _power(n, y)
    if found is None or found[0] <= 1e-6 * max(y) or found[1] <= 1e-6:
        return {**nothing, "reason": "it does not fall with the number of sources"}
    if found[1] > 0.999 * STEEPEST:
        return {**nothing, "reason": "it falls between the first two points alone"}
    a, b, c = map(float, found)
    again = np.stack(resampled, 1)[:POWER_RESAMPLES]
    others = [other for row in again if np.isfinite(row).all() and (other := _power(n, row)) is not None]
    columns = np.array(others).reshape(-1, 3)
    r2 = _r2(y, a * np.asarray(n, float) ** -b + c)
    intervals = {"b_interval": interval(columns[:, 1]), "c_interval": interval(columns[:, 2])}
    factors, powers, floors = columns.T
    band = _band(np.geomspace(min(n), max(n), BAND_POINTS), lambda at: factors * at**-powers + floors)
    return {"a": a, "b": b, "c": c, "r2": r2, **intervals, "band": band, "reason": None}


def no_line(reason: str) -> dict[str, Any]:
    """The result of `line` where there is no line."""
    return {**dict.fromkeys(("slope", "intercept", "r2", "slope_interval", "band")), "reason": reason}


def _band(x: np.ndarray, curves: Callable[[float], np.ndarray]) -> list[list[float]] | None:
    """The 95 % band of a fit: [x, low, high] at each of `x`; None: nothing can be drawn.

    Args:
        curves: the heights [R] of the resampled fits at a place.
    """
    ends = [(float(at), interval(curves(at))) for at in x]
    return None if any(end is None for _, end in ends) else [[at, *end] for at, end in ends if end is not None]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts [R] of lines through points [P, R]; NaN where all x are the same."""
    off = x - x.mean(0)
    whole = (off**2).sum(0)
    slope = np.where(whole > 0, (off * y).sum(0) / np.where(whole > 0, whole, 1), np.nan)
    return slope, y.mean(0) - slope * x.mean(0)


def _r2(y: Sequence[float], fitted: np.ndarray) -> float | None:
    whole = float(((np.asarray(y) - np.mean(y)) ** 2).sum())
    return None if whole == 0 else 1 - float(((np.asarray(y) - fitted) ** 2).sum()) / whole


def _power(n: Sequence[float], y: Sequence[float] | np.ndarray) -> np.ndarray | None:
    """a, b and c; None: all is 0, or no fit was found."""
    from scipy.optimize import OptimizeWarning, curve_fit

    curve: Callable[..., np.ndarray] = lambda n, a, b, c: a * n**-b + c  # noqa: E731
    most = float(max(y))
    if most <= 0:
        return None
    whole = np.asarray(y) / most
    start = np.ptp(whole), 0.5, whole.min() / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
        try:
            found, _ = curve_fit(
                curve, np.asarray(n, float), whole, p0=start, bounds=([0, 0, 0], [np.inf, STEEPEST, np.inf])
            )
        except RuntimeError:  # it did not converge
            return None
    return np.asarray(found) * [most, 1, most]
