"""Tables and pictures show what the results hold, and refuse what is no result."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastar.errors import FastarError
from fastar.experiments.epoch_times import speed
from fastar.report.figures import check_picture
from fastar.report.results import (
    STYLES,
    barrier_picture,
    barriers_table,
    check_results,
    results_table,
    shown,
    speed_lines,
)


def spread(mean: float | None, n: int) -> dict[str, Any]:
    return {"mean": mean, "std": None if mean is None else 0.0625, "min": mean, "max": mean, "n": n}


def split(shift: float, heldouts: int) -> dict[str, Any]:
    return {
        "regular_loss": {"mean": 0.011 + shift, "std": 0.002, "n": 2 + heldouts},
        "star_loss": 0.123456 + shift,
        "regular_regular": spread(0.5 + shift, 3),
        "star_heldout": spread(0.25 + shift if heldouts else None, heldouts),
        "star_source": spread(0.125 + shift, 2),
        "regular_regular_unmatched": spread(1.5 + shift, 3),
    }


def results(heldouts: int = 1) -> dict[str, Any]:
    t = [0.0, 0.5, 1.0]
    kinds = ["star_heldout"] * heldouts + ["star_source"] * 2
    kinds += ["regular_regular"] * 3 + ["regular_regular_unmatched"] * 3
    accuracy = {"regular": {"mean": 0.987, "std": 0.004, "n": 3}, "star": 0.956}
    return {
        "dataset": "digits",
        "arch": "mlp",
        "sources": 2,
        "heldout": heldouts,
        "t": t,
        "train": split(0.0, heldouts),
        "test": split(0.25, heldouts),
        "accuracy": {"train": accuracy, "test": accuracy},
        "paths": [
            {
                "kind": kind,
                "first": "star",
                "second": f"source {i}",
                "t": t,
                "train_loss": [0.1, 0.4 + 0.1 * i, 0.2],
                "test_loss": [0.2, 0.5, 0.3],
                "train_accuracy": [0.99, 0.9 - 0.01 * i, 0.98],
                "test_accuracy": [0.9, 0.8, 0.9],
            }
            for i, kind in enumerate(kinds)
        ],
    }


def text(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def row(table: Table, name: str) -> list[str]:
    for line in text(table).splitlines():
        cells = [cell.strip() for cell in line.strip("│┃|").split("│")]
        if cells[0] == name:
            return cells[1:]
    raise AssertionError(f"no row {name!r}")


def test_table_shows_every_figure() -> None:
    table = results_table(results())
    assert row(table, "loss, regular") == ["3", "0.011 ± 0.002", "0.261 ± 0.002"]
    assert row(table, "loss, star") == ["1", "0.123", "0.373"]
    assert row(table, "accuracy, regular") == ["3", "0.987 ± 0.004", "0.987 ± 0.004"]
    assert row(table, "barrier, star to heldouts") == ["1", "0.250 ± 0.062", "0.500 ± 0.062"]
    assert row(table, "barrier, star to sources") == ["2", "0.125 ± 0.062", "0.375 ± 0.062"]
    assert row(table, "barrier, regular to regular") == ["3", "0.500 ± 0.062", "0.750 ± 0.062"]
    assert row(table, "barrier, regular, unmatched") == ["3", "1.500 ± 0.062", "1.750 ± 0.062"]


def test_table_has_the_largest_loss_and_the_accuracy_barrier_beside_barriers() -> None:
    found = results()
    for split_name in ("train", "test"):
        kinds = ("star_heldout", "star_source", "regular_regular", "regular_regular_unmatched")
        found[split_name] |= {
            "largest_loss": {kind: spread(2.5 + n, 1 + n) for n, kind in enumerate(kinds)},
            "accuracy_barrier": {kind: spread(-0.25 * n, 1 + n) for n, kind in enumerate(kinds)},
        }
    table = results_table(found)
    assert row(table, "largest loss, star to heldouts") == ["1", "2.500 ± 0.062", "2.500 ± 0.062"]
    assert row(table, "largest loss, regular to regular") == ["3", "4.500 ± 0.062", "4.500 ± 0.062"]
    assert row(table, "accuracy barrier, regular to regular") == ["3", "-0.500 ± 0.062", "-0.500 ± 0.062"]
    assert len(text(table).splitlines()) == len(text(results_table(results())).splitlines()) + 4, "no line is folded"
    found["train"]["star_heldout"] = spread(None, 0)
    assert row(results_table(found), "largest loss, star to sources")[0] == "2"


def test_results_of_older_versions_are_shown_without_what_they_lack() -> None:
    shown_text = text(results_table(results()))
    assert "largest loss" not in shown_text
    assert "accuracy barrier" not in shown_text


def test_table_leaves_out_what_was_not_measured() -> None:
    assert "heldouts" not in text(results_table(results(heldouts=0)))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_tables_fit_narrow_terminals_and_lose_no_figure(width: int) -> None:
    shown_text = text(results_table(results()), width)
    assert max(len(line) for line in shown_text.splitlines()) <= width
    assert "…" not in shown_text
    for figure in ("0.011", "0.123", "0.987", "0.250", "1.750"):
        assert figure in shown_text


def test_barriers_table_has_a_row_per_path_with_the_whole_name() -> None:
    paths = [
        {
            "first": "a.pt",
            "second": name,
            "train_barrier": barrier,
            "test_barrier": 2 * barrier,
            "train_loss": [0.1, 0.9, 0.3],
        }
        for name, barrier in (("b.pt", 0.7), ("some/long/folder/" * 6 + "c.pt", 0.0))
    ]
    assert row(barriers_table(paths), "b.pt") == ["0.7000", "1.4000", "0.1000", "0.3000", "0.9000"]
    folded = text(barriers_table(paths), 60)
    assert "…" not in folded
    names = "".join(line.split("│")[1].strip() for line in folded.splitlines() if line.startswith("│"))
    assert names == "".join(path["second"] for path in paths)
    siblings = [{**paths[0], "second": f"runs/heldout/{name}.pt"} for name in "bc"]
    shown_text = text(barriers_table(siblings), 60)
    assert "to runs/heldout/*.pt" in shown_text
    assert shown_text.count("runs/heldout/") == 1, "a folder that all share is said once"
    assert row(barriers_table(siblings), "c") == ["0.7000", "1.4000", "0.1000", "0.3000", "0.9000"]


def test_shown_rounds_and_marks_what_is_missing() -> None:
    assert shown(0.12345) == "0.123"
    assert shown(0.12345, 4) == "0.1235"
    assert shown({"mean": 1.0, "std": 0.25}) == "1.000 ± 0.250"
    assert shown(None) == "-"
    assert shown({"mean": None, "std": None}) == "-"


def pixels(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert("RGB")).astype(int)


def coloured(image: np.ndarray, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(image - wanted).max(axis=-1) < 12).sum())


@pytest.mark.parametrize("heldouts", [0, 1, 2])
def test_picture_draws_each_kind_that_was_measured(tmp_path: Path, heldouts: int) -> None:
    path = tmp_path / "barrier.png"
    barrier_picture(results(heldouts), path)
    image = pixels(path)
    height, width = image.shape[:2]
    assert 1200 <= width <= 2400  # 10 x 4 inches at print resolution
    assert 500 <= height <= 1200
    for kind in ("star_heldout", "star_source", "regular_regular"):
        drawn = coloured(image, STYLES[kind][1])
        assert (drawn > 300) if kind != "star_heldout" or heldouts else (drawn == 0), kind
    edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edges == 255).all()  # nothing is cut off at the rim
    assert [p.name for p in tmp_path.iterdir()] == ["barrier.png"]


def test_picture_has_two_panels_and_both_are_drawn_in(tmp_path: Path) -> None:
    path = tmp_path / "barrier.png"
    barrier_picture(results(), path)
    image = pixels(path)
    middle = image.shape[1] // 2
    for half in (image[:, :middle], image[:, middle:]):
        assert coloured(half, STYLES["regular_regular"][1]) > 300


def test_numbers_beside_the_curves_get_no_panel(tmp_path: Path) -> None:
    given = results()
    for path in given["paths"]:
        del path["train_accuracy"]
        path |= {"train_barrier": 0.1, "train_largest_loss": 0.5}
    barrier_picture(given, tmp_path / "one.png")
    image = pixels(tmp_path / "one.png")
    assert coloured(image[:, image.shape[1] // 2 - 100 : image.shape[1] // 2 + 100], STYLES["regular_regular"][1]) > 100


def test_band_follows_the_spread(tmp_path: Path) -> None:
    """The same curves without spread leave no band: the tinted area goes."""
    wide, flat = tmp_path / "wide.png", tmp_path / "flat.png"
    given = results()
    barrier_picture(given, wide)
    for path in given["paths"]:
        path["train_loss"], path["train_accuracy"] = [0.1, 0.5, 0.2], [0.99, 0.9, 0.98]
    barrier_picture(given, flat)
    grey = (pixels(wide).min(axis=-1) < 250).sum(), (pixels(flat).min(axis=-1) < 250).sum()
    assert grey[0] > 1.5 * grey[1]


def test_band_is_one_standard_deviation_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = []
    draw = Axes.fill_between

    def record(self: Axes, x: Any, low: Any, high: Any, **style: Any) -> Any:
        bands.append((list(low), list(high)))
        return draw(self, x, low, high, **style)

    monkeypatch.setattr(Axes, "fill_between", record)
    given = {**results(), "paths": results()["paths"][:1] + results()["paths"][:1]}
    given["paths"][1] = {**given["paths"][0], "train_loss": [0.1, 0.8, 0.0], "train_accuracy": [1.0, 0.7, 1.0]}
    barrier_picture(given, tmp_path / "p.png")
    half = 0.5**0.5  # the sample standard deviation of two numbers is their distance times this
    (loss_low, loss_high), (accuracy_low, accuracy_high) = bands
    assert loss_low == pytest.approx([0.1, 0.6 - 0.4 * half, 0.0])  # a loss is not below 0
    assert loss_high == pytest.approx([0.1, 0.6 + 0.4 * half, 0.1 + 0.2 * half])
    assert accuracy_low == pytest.approx([0.995 - 0.01 * half, 0.8 - 0.2 * half, 0.99 - 0.02 * half])
    assert accuracy_high == pytest.approx([1.0, 0.8 + 0.2 * half, 1.0])  # nor an accuracy above 1


def test_curves_differ_without_colour() -> None:
    assert len({dashes + marker for _, _, dashes, marker in list(STYLES.values())[:3]}) == 3


def test_pair_picture(tmp_path: Path) -> None:
    given = {**results(), "paths": [{**results()["paths"][0], "kind": "path"}]}
    del given["sources"], given["train"]
    barrier_picture(given, tmp_path / "p.PNG")
    assert coloured(pixels(tmp_path / "p.PNG"), STYLES["path"][1]) > 300


@pytest.mark.parametrize("name", ["p.pdf", "p", "p.png.txt"])
def test_pictures_are_called_what_they_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(FastarError, match=r"\.png"):
        check_picture(tmp_path / name)
    with pytest.raises(FastarError, match=r"\.png"):
        barrier_picture(results(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_whole_results_pass(tmp_path: Path) -> None:
    check_results(results(), tmp_path)
    check_results(results(heldouts=0), tmp_path)


def without(*keys: str | int) -> dict[str, Any]:
    broken = copy.deepcopy(results())
    place: Any = broken
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return broken


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"paths": []},
        without("dataset"),
        without("arch"),
        without("t"),
        without("train"),
        without("test", "star_loss"),
        without("test", "star_source", "n"),
        without("accuracy", "test", "star"),
        without("paths", 0, "train_loss"),
        without("paths", 0, "kind"),
        {**results(), "paths": []},
        {**results(), "paths": 3},
        {**results(), "t": [0.0, 1.0]},
    ],
)
def test_damaged_results_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(FastarError, match=r"x/results\.json.*run `fastar train-star` again"):
        check_results(broken, Path("x/results.json"))


def test_speed_is_told_largest_part_first() -> None:
    found = results()
    assert speed_lines(found) == []  # results of before it was measured
    found["speed"] = {
        "regular": {"images_per_second": 1234.5, "shares": {"load": 0.2, "forward": 0.798, "other": 0.002}},
        "star": None,
    }
    found |= {"peak_bytes": 2_500_000_000, "device": "cpu"}
    assert speed_lines(found) == [
        "regular training: 1,234 samples/s (forward 80%, load 20%)",
        "peak memory:      2.5 GB (cpu)",
    ]
    found["speed"]["regular"]["limited"] = "loader-limited"
    assert speed_lines(found)[0] == "regular training: 1,234 samples/s, loader-limited (forward 80%, load 20%)"


def test_what_limits_the_steps_of_a_star_is_told_without_its_matching() -> None:
    entry = {"kind": "star", "epoch": 0, "images": 100, "begin_seconds": 9.0, "parts": {"load": 0.2, "forward": 0.8}}
    assert speed([entry])["star"]["limited"] == "loader-limited"  # 2 % of the whole, 20 % of the steps
    assert speed([{**entry, "parts": {"load": 0.05, "forward": 0.95}}])["star"]["limited"] == "compute-limited"
    assert speed([entry])["regular"] is None
