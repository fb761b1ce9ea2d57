"""The scripts and the notebook of examples/, at small size: they run, and their results are whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastar

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
SMALL: dict[str, dict[str, int]] = {
    "regression": {"epochs": 2, "number": 2},
    "language_model": {"epochs": 1, "number": 2, "length": 4000},
    "given_checkpoints": {"epochs": 1, "samples": 150},
    "autoencoder": {"epochs": 1, "number": 2, "samples": 150},
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def imported(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where a class's source is looked for
        spec.loader.exec_module(module)
        return module

    return imported


def test_every_script_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALL, "star_from_scratch"}
    assert [path.name for path in FOLDER.glob("*.ipynb")] == ["first_star.ipynb"]


@pytest.mark.parametrize(
    "name",
    # The language model's takes 20 s, mostly of tracing: `make test-all` runs it.
    [pytest.param(name, marks=[pytest.mark.slow] if name == "language_model" else []) for name in SMALL],
)
def test_an_example_prints_its_table(
    name: str, example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    module = example(name)
    assert f"python examples/{name}.py" in (module.__doc__ or "")
    star: fastar.Star = module.main(**SMALL[name])
    assert star.table() in capsys.readouterr().out
    for kind in ("star_source", "star_heldout", "regular_regular"):
        assert star.results["train"][kind]["mean"] >= 0
        assert star.results["test"][kind]["n"] > 0
    if name == "language_model":
        assert star.permutations is not None
        assert {key: index.shape[1] for key, index in star.permutations.items() if "blocks.0" in key} == {
            "blocks.0.before_attention": 64,  # of the stream
            "blocks.0.hidden": 256,
            "blocks.0.query": 64,
            "blocks.0.query:blocks": 4,  # heads
            "blocks.0.value": 64,
        }


@pytest.mark.slow
def test_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot

    cells = json.loads((FOLDER / "first_star.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")
    results, printed = names["star"].results["train"], capsys.readouterr().out
    assert "star model of 10 sources" in printed
    means = [results[kind]["mean"] for kind in ("star_source", "star_heldout", "regular_regular")]
    assert means == sorted(means)
