"""Compiled loops are kept between processes, apart by source and settings, and damage to what is kept stops nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastar.data.compiled import compiled

TYPES = "void(int64[::1], int64)"


def add(values: np.ndarray, what: int) -> None:
    for k in range(len(values)):
        values[k] += what


def multiply(values: np.ndarray, what: int) -> None:
    for k in range(len(values)):
        values[k] *= what


def hits(function: object) -> int:
    """Times that `function` came from the disk; it is checked to work."""
    values = np.arange(3)
    function(values, 2)  # type: ignore[operator]
    assert values.tolist() == [2, 3, 4]
    return sum(function.stats.cache_hits.values())  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path))
    return tmp_path / "numba"


def test_the_second_process_compiles_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [hits(compiled(add, TYPES)) for _ in range(2)] == [0, 1]
    compiled(multiply, TYPES)
    monkeypatch.setenv("NUMBA_DEVELOPER_MODE", "0")
    assert hits(compiled(add, TYPES)) == 0
    assert len(list(kept.iterdir())) == 3  # of two sources, one with two settings


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_damage_is_said_and_mended(kept: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    compiled(add, TYPES)
    (file,) = kept.rglob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:9])
    assert hits(compiled(add, TYPES)) == 0
    assert "compiled again" in caplog.text
    assert [hits(compiled(add, TYPES)) for _ in range(2)] == [0, 1]


def test_where_nothing_can_be_kept_it_is_compiled(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.write_text("a file where the folder would be")
    assert hits(compiled(add, TYPES)) == 0
    monkeypatch.setenv("FASTAR_CACHE", "off")
    assert hits(compiled(add, TYPES)) == 0
    assert kept.read_text() == "a file where the folder would be"
