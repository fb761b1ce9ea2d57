"""The paper's tables and figures by name: what each needs is there, figures are compared rightly, all of it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_cases import fastar, refused

from fastar.config.paper import SCALES, paper, parts_of
from fastar.config.recipes import shipped
from fastar.experiments.reproduce.beside import as_paper, figures_of, order_held, z_of
from fastar.experiments.reproduce.kinds import KINDS

PROMISED = [
    *(f"table{number}" for number in range(1, 13)),
    *(f"figure{number}" for number in range(1, 12)),
    *("v1-table1", "toy", "extras"),
]


@pytest.mark.quick
def test_all_tables_and_figures_are_there() -> None:
    assert list(paper()) == PROMISED


@pytest.mark.quick
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", PROMISED)
def test_each_has_parts_whose_kinds_and_configurations_there_are(name: str, scale: str) -> None:
    parts = parts_of(name, scale)
    assert parts
    for part in parts:
        assert part["kind"] in KINDS
        configs = [part[key] for key in ("config", "other") if key in part]
        configs += [row["config"] for row in part["rows"].values() if "config" in row]
        assert all(shipped(config) for config in configs)
        assert configs or part["kind"] == "theory"
        assert part["order"]  # what is expected to be seen


def test_figures_of_configurations_are_not_repeated() -> None:
    """What a configuration says of the train set stands there alone."""
    for name, of in paper().items():
        for part in of["parts"]:
            for row, given in part.get("rows", {}).items():
                if "config" in given and part.get("split", "train") == "train":
                    own = parts_of(name, "full")[0]["rows"][str(row)]["figures"].keys() - given.keys()
                    assert own, (name, row)
    assert parts_of("table1", "full")[0]["rows"]["cifar10 resnet18"]["figures"]["RR"] == [0.383, 0.056]


def spread(mean: float | None, std: float | None = None, n: int = 1) -> dict[str, Any]:
    return {"mean": mean, "std": std, "n": n}


@pytest.mark.quick
def test_z_is_the_difference_in_standard_deviations() -> None:
    assert z_of(spread(0.5, 0.3, 5), as_paper([1.0, 0.4])) == pytest.approx(-1.0)
    assert z_of(spread(0.5), as_paper([1.0, 0.25])) == pytest.approx(-2.0)
    assert z_of(spread(0.5), as_paper(1.0)) is None
    assert z_of(spread(None), as_paper([1.0, 0.1])) is None


@pytest.mark.quick
def test_orders_are_asked_of_each_row_or_of_two() -> None:
    rows = {
        "2": {"SR": spread(0.3), "RR": spread(0.4)},
        "50": {"SR": spread(0.5), "RR": spread(0.4)},
        "none": {"SR": spread(0.1)},
    }
    held = order_held(["SR < RR", "SR@50 < SR@2", "SR@7 < SR@2", "RR@2 <= RR@50"], rows)
    assert [(one["rule"], one["row"], one["holds"]) for one in held] == [
        ("SR < RR", "2", True),
        ("SR < RR", "50", False),
        ("SR@50 < SR@2", None, False),
        ("SR@7 < SR@2", None, None),
        ("RR@2 <= RR@50", None, True),
    ]


def test_of_runs_that_do_not_match_pairs_are_the_unmatched_ones() -> None:
    results = {
        "train": {
            "regular_loss": spread(0.1, 0.0, 2),
            "star_loss": 0.2,
            "regular_regular": spread(None, None, 0),
            "regular_regular_unmatched": spread(3.0, 0.5, 4),
            "star_heldout": spread(1.0, 0.1, 3),
            "star_source": spread(0.5, 0.1, 2),
            "largest_loss": {"star_heldout": spread(1.2, 0.1, 3)},
        },
        "accuracy": {"train": {"regular": spread(0.9, 0.01, 2), "star": 0.8}},
    }
    found = figures_of(results)
    assert found["RR"]["mean"] == 3.0
    assert found["star"] == spread(0.2)
    assert found["star_accuracy"] == spread(80.0)
    assert found["regular_accuracy"]["std"] == pytest.approx(1.0)


def test_what_is_there_is_listed(tmp_path: Path) -> None:
    listed = fastar("reproduce", "--list", "--scale", "small", "--json", "--out", tmp_path)
    entries = {one["id"]: one for one in json.loads(listed.out)}
    assert list(entries) == PROMISED
    assert not any(one["done"] for one in entries.values())
    assert (entries["table9"]["regular"], entries["table9"]["stars"]) == (35, 9)  # of digits: 30 sources, 5 heldouts
    assert (entries["table7"]["regular"], entries["table7"]["stars"]) == (33, 1)  # measured thrice, trained once


def test_unknown_ones_are_refused(tmp_path: Path) -> None:
    assert "did you mean table1" in refused("reproduce", "tabel1", "--out", tmp_path)
    assert "--list" in refused("reproduce", "--out", tmp_path)
    assert "smoke, small or full" in refused("reproduce", "toy", "--scale", "tiny", "--out", tmp_path)
    options = ["sources.heldout=0", "--scale", "smoke", "--quiet"]
    assert "give some" in refused("reproduce", "table2", *options, "--out", tmp_path / "x")
    file = tmp_path / "file"
    file.touch()
    assert "choose another (--out)" in refused("reproduce", "toy", "--scale", "smoke", "--out", file)


def test_one_is_run_and_kept_and_its_models_serve_others(tmp_path: Path) -> None:
    options = ["--scale", "smoke", "--quiet", "--out", tmp_path, f"dataset.directory={tmp_path / 'data'}"]
    first = fastar("reproduce", "figure7", *options)
    assert first.code == 0, first.err
    assert "star to adam" in first.out
    assert "compare orders, not numbers" in first.out
    found = json.loads((tmp_path / "figure7.json").read_text())
    assert found["parts"][0]["rows"]["star to adam"]["barrier"]["ours"]["n"] == 2
    assert {"figure7.md", "figure7.png"} <= {path.name for path in tmp_path.iterdir()}
    models = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/**/*.safetensors")}
    again = fastar("reproduce", "figure7", *options, "--json")
    assert json.loads(again.out)["parts"] == found["parts"]
    assert {path: path.stat().st_mtime_ns for path in models} == models
    # The table of distances needs sources of the same recipes.
    other = fastar("reproduce", "v1-table1", *options)
    assert other.code == 0, other.err
    inodes = {path.stat().st_ino for path in models}
    assert {path.stat().st_ino for path in tmp_path.glob("runs/digits-mlp/sources/*.safetensors")} <= inodes


@pytest.mark.slow
def test_every_one_runs_at_smoke_scale(tmp_path: Path, made_sets: Path) -> None:
    """All tables and figures, on made images."""
    options = ["--scale", "smoke", "--quiet", "--out", tmp_path, f"dataset.directory={made_sets}"]
    outcome = fastar("reproduce", "all", *options)
    assert outcome.code == 0, outcome.err
    for name in PROMISED:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        for part in found["parts"]:
            assert part["rows"], name
            assert any(one["holds"] is not None for one in part["order"]), name
        assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}: ")
        assert list(tmp_path.glob(f"{name}*.png")), name


@pytest.fixture
def made_sets(tmp_path: Path) -> Path:
    """FFCV files of made images of all sets."""
    from tools.smoke import made_data
    from tools.write_ffcv import main as write

    folder = tmp_path / "sets"
    for name in ("cifar10", "cifar100", "mnist", "imagenet"):
        root = made_data(name, tmp_path)[-1]
        write(["--dataset", name, "--source", root, "--out", str(folder)])
    return folder
