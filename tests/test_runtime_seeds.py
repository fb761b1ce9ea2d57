"""Seeds derived from names."""

from __future__ import annotations

import subprocess
import sys

from scipy import stats

from fastar.runtime.seeds import derive_seed


def test_values_never_change() -> None:
    """Runs on disk depend on these numbers: the first 63 bits of a SHA-256 over seed and names."""
    assert derive_seed(0) == 0x5FECEB66FFC86F38 >> 1  # sha256("0")
    assert derive_seed(0, "source", 3, "order") == 3313809302327342365


def test_nothing_depends_on_the_process() -> None:
    """Python's own hashes are salted; this must not be."""
    code = "from fastar.runtime.seeds import derive_seed; print(derive_seed(5, 'star', 'draws', 12))"
    found = {
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout)
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    assert found == {derive_seed(5, "star", "draws", 12)}


def test_different_names_have_different_seeds() -> None:
    names = [
        (),
        ("a",),
        ("b",),
        ("a", "b"),
        ("ab",),
        ("b", "a"),
        ("a", 1),
        ("a", "1"),
        (1, "a"),
        ("a", 11),
        ("a", 1, 1),
    ]
    assert len({derive_seed(seed, *name) for seed in range(50) for name in names}) == 50 * len(names)
    assert derive_seed(1, 2) != derive_seed(12) != derive_seed(2, 1)


def test_seeds_fit_every_generator_and_use_all_bits() -> None:
    seeds = [derive_seed(0, "x", i) for i in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stats.kstest([seed / 2**63 for seed in seeds], "uniform").pvalue > 0.01
    assert stats.kstest([seed % 2**20 / 2**20 for seed in seeds], "uniform").pvalue > 0.01
