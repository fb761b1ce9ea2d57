"""A run as one HTML page: what is in it, that nothing else is needed, and how it behaves in a browser."""

from __future__ import annotations

import doctest
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import pytest
from browser import Browser, browser, installed
from cli_cases import contents, fastar, refused
from run_cases import small

import fastar as library
from fastar.experiments import train_star
from fastar.experiments.averages import uncertainty
from fastar.experiments.distances import distances
from fastar.experiments.finished_run import finished_run
from fastar.experiments.fusion import fuse
from fastar.experiments.perturbed import perturbed_stars
from fastar.report import average_panels
from fastar.report.page import charts, elements, write_page
from fastar.report.page.charts import ACROSS, LEFT, TOP, colour_of, ticks
from fastar.report.results import results_table, shown
from fastar.runs import RunFolder, stored_digest, write_json
from fastar.runtime.json_files import sealed

ROOT = Path(__file__).resolve().parent.parent
OLD = ROOT / "tests" / "old_run"
NAMED = 'run <script>alert("1")</script> & co'
"""The name of a folder, as no run has it."""
EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Elements(HTMLParser):
    """The elements of a page, each with its attributes and the text in it; they are closed in their order."""

    def __init__(self, page: Path):
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attributes), []))
        if tag not in EMPTY:
            self._open.append(self.all[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(texts) for name, _, texts in self.all if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of an older version, in a folder that is called as none should be."""
    return Path(shutil.copytree(OLD, tmp_path / NAMED.replace("/", "∕")))


def written(folder: Path, name: str = "report.html") -> Elements:
    return Elements(write_page(folder, folder / name))


def results_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def studied(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with all that commands on finished runs write; not to be changed."""
    folder = tmp_path_factory.mktemp("studied") / "run"
    train_star(
        small(data, "sources.heldout=1", "star.epochs=3", "checkpoint.seconds=10", "checkpoint.minutes=10"), folder
    )
    opened = finished_run(RunFolder(folder))
    write_json(folder / "uncertainty.json", uncertainty(opened, most=2, repetitions=2))
    write_json(folder / "perturb.json", perturbed_stars(opened, radii=(0.1,), draws=1))
    write_json(folder / "fusion.json", fuse(opened))
    distances(opened)
    return folder


def test_it_shows_all_that_the_folder_holds(studied: Path, tmp_path: Path) -> None:
    before, page = contents(studied), tmp_path / "page.html"
    write_page(studied, page)
    assert contents(studied) == before
    found, results = Elements(page), results_of(studied)
    assert found.texts("h1") == ["run"]
    assert found.texts("h2") == [
        *("results", "paths", "distances", "fusion", "perturb", "uncertainty", "training", "recipe", "provenance")
    ]
    captions = found.texts("caption")
    for split in ("train", "test"):
        assert {f"{split} loss", f"{split} accuracy"} <= set(captions)
    assert {name for _, name in average_panels.PANELS} <= {name.split(" (outside")[0] for name in captions}
    assert captions.count("training loss") == 1
    text = " ".join(found.texts("body"))
    assert f"Train barrier from the star to its heldouts: {shown(results['train']['star_heldout'])};" in text
    assert "peak memory" in text
    assert results["versions"]["torch"] in text
    for path in (studied / "star.safetensors", studied / "sources" / "seed-0001.safetensors"):
        assert stored_digest(path)[:16] in text
    # Each figure has a title, and all its values in a table too.
    titles = ["".join(texts) for tag, _, texts in found.all if tag == "title"][1:]
    assert titles == found.texts("figcaption")
    assert len(titles) == captions.count("mean cosine of each parameter tensor, matched") + 13


def rows(text: str, caption: str) -> list[list[str]]:
    """The rows of the table with this caption."""
    (table,) = re.findall(rf"<table[^>]*><caption>{re.escape(html.escape(caption))}</caption>(.*?)</table>", text)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", table)]


def test_tables_are_those_of_the_terminal(run: Path) -> None:
    text = write_page(run).read_text()
    wanted = results_table(results_of(run))
    found = rows(text, str(wanted.title))
    assert [row[0] for row in found[1:]] == list(wanted.columns[0].cells)
    assert [row[-1] for row in found[1:]] == list(wanted.columns[-1].cells)
    assert len(rows(text, "models of the run")) == 1 + 5
    settings = dict(row[:2] for row in rows(text, "config.yaml"))
    assert settings["train.epochs"] == "3"
    differ = {row[0]: row[1:] for row in rows(text, "settings that differ from their defaults")}
    assert differ["train.epochs"] == ["3", "20"]
    assert set(differ) < set(settings)
    values = rows(text, "train loss")
    paths = [path["train_loss"] for path in results_of(run)["paths"] if path["kind"] == "star_heldout"]
    assert [row[0] for row in values] == ["t", "0", "0.5", "1"]
    assert values[2][1].startswith(f"{fmean(path[1] for path in paths):.4g} ± ")


def test_names_of_users_stay_text_and_nothing_is_loaded(run: Path) -> None:
    name = '</script><img src="http://example.com/x.png" onerror="alert(1)">'
    RunFolder(run).log.append(kind="source", model=name, epoch=0, loss=0.5)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("arch: mlp", f"arch: {json.dumps(name)}"))
    results = {**results_of(run), "arch": name, "device": name}
    del results["digest"]
    results["paths"][0]["second"] = name
    write_json(run / "results.json", sealed(results))
    write_json(run / "<b>.json", {"<i>": "<u>"})
    page = write_page(run)
    found = Elements(page)
    assert {tag for tag, _, _ in found.all} & {"img", "b", "i", "u", "link", "iframe", "object"} == set()
    scripts = [(given, "".join(texts)) for tag, given, texts in found.all if tag == "script"]
    assert [text for given, text in scripts if given.get("type") != "application/json"] == [
        (ROOT / "fastar" / "report" / "page" / "page.js").read_text()
    ]
    data = [json.loads(text) for given, text in scripts if given]
    assert any(one["name"].endswith(name) for plot in data for one in plot.get("each", ()))
    for _, given, _ in found.all:
        assert not any(key.startswith("on") for key in given)
        for key in ("src", "href"):
            assert given.get(key, "#").startswith("#")
    assert found.texts("title")[0] == found.texts("h1")[0] == run.name
    assert "<script>" in run.name


def test_without_torch_and_matplotlib(run: Path, tmp_path: Path) -> None:
    code = "import sys; from fastar.cli.main import main; main(sys.argv[1:])"
    check = "import sys, atexit; atexit.register(lambda: print(sys.modules.keys() & {'torch', 'numpy', 'matplotlib'}))"
    command = [sys.executable, "-c", f"{check}; {code}", "report", str(run), "--html", str(tmp_path / "page.html")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.splitlines() == [f"page: {tmp_path / 'page.html'}", "set()"]
    assert found.returncode == 0


def test_an_unfinished_run_says_where_it_stands(run: Path) -> None:
    for name in ("results.json", "star.safetensors", "permutations.safetensors"):
        (run / name).unlink()
    outcome = fastar("report", run, "--html")
    assert (outcome.code, outcome.out) == (0, f"page: {run / 'report.html'}\n")
    assert re.search(r"stopped at star \(\d{4}-.* UTC\): nothing is measured yet", outcome.err)
    found = Elements(run / "report.html")
    assert found.texts("h2") == ["training", "recipe", "provenance"]
    assert "training loss" in found.texts("figcaption")
    assert any("nothing is measured yet" in text for text in found.texts("p"))
    shutil.rmtree(run / "sources")
    shutil.rmtree(run / "heldout")
    (run / "log.jsonl").unlink()
    assert "No epoch is in the log yet." in written(run).texts("p")


def test_what_is_damaged_is_named_and_the_rest_is_shown(run: Path) -> None:
    (run / "results.json").write_text('{"format": 2}')
    (run / "uncertainty.json").write_text("{}")
    (run / "fusion.json").write_text("{")
    write_json(run / "mine.json", {"values": 5})
    (run / "mine.json").write_text((run / "mine.json").read_text().replace("5", "6", 1))
    (run / "sources" / "seed-0000.safetensors").write_bytes(b"x" * 100)
    outcome = fastar("report", run, "--html")
    assert outcome.code == 0
    assert "results.json: holds no results" in outcome.err
    said = Elements(run / "report.html").texts("p")
    assert any("results.json: holds no results" in text for text in said)
    assert any("uncertainty.json: damaged" in text for text in said)
    assert any("fusion.json: damaged" in text for text in said)
    assert any("mine.json: damaged" in text for text in said)
    assert "damaged: see `fastar verify`" in Elements(run / "report.html").texts("td")


def test_refusals_are_one_line_and_write_nothing(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    assert "give --html page.html" in refused("report", run, "page.html")
    assert "written as .html" in refused("report", run, "--html", run / "results.json")
    (tmp_path / "taken.html").mkdir()
    assert "taken.html: cannot be written" in refused("report", run, "--html", tmp_path / "taken.html")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("report", run, "--html", tmp_path / "file" / "page.html")
    assert "no run folder" in refused("report", tmp_path / "taken.html", "--html")
    assert "no such folder" in refused("report", tmp_path / "nothing", "--html")
    assert contents(run) == before
    (run / "config.yaml").write_text("a: [")
    assert "not valid YAML" in refused("report", run, "--html")


def test_other_files_are_shown_with_their_pictures(run: Path) -> None:
    write_json(run / "new.json", {"versions": {"torch": "2"}, "values": [1, 2], "radius": 0.25})
    (run / "new.png").write_bytes(b"\x89PNG picture")
    found = written(run)
    (picture,) = [given for tag, given, _ in found.all if tag == "img"]
    assert picture == {"src": "data:image/png;base64,iVBORyBwaWN0dXJl", "alt": "the picture of new.json"}
    assert "new" in found.texts("h2")
    assert "0.25" in found.texts("td")


SPREAD = {"mean": 0.25, "std": 0.125, "min": 0.125, "max": 0.375, "n": 2}
HUB = {"loss": 0.5, **{kind: {"barrier": SPREAD, "largest_loss": SPREAD} for kind in ("heldouts", "sources")}}
BEND = {"largest_loss": 0.75, "barrier": 0.5, "mean_loss": 0.25, "loss": [0.5, 0.75, 0.5], "accuracy": [1.0, 0.5, 1.0]}
KINDS = ("star_heldout", "star_source", "regular_regular")
TASK = {"dataset": "digits", "arch": "mlp"}
NO_LINE = {"slope": None, "intercept": None, "r2": None, "slope_interval": None, "reason": "needs 3 points"}
LANDSCAPES: dict[str, dict[str, Any]] = {
    "plane": {
        **TASK,
        "networks": [
            {"name": name, "x": x, "y": y, "train": {"loss": 0.5}} for name, x, y in (("star", 0, 0), ("b", 2, 1))
        ],
        "x": [-1.0, -1e-16, 1.0, 2.0],
        "y": [0.0, 1.0],
        "splits": {"train": {"loss": [[0.01, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 700.0]]}},
    },
    "curve": {
        **TASK,
        "first": "heldout:0",
        "second": "heldout:1",
        "t": [0.0, 0.5, 1.0],
        "curves": {name: {"train": BEND} for name in ("straight", "star", "chain", "bezier")},
    },
    "graph": {
        **TASK,
        "sources": 1,
        "heldout": 0,
        "below": {"train": {key: [0.5] for key in ("eps", "regular", "star", "mean", "stars")}},
        "names": ["source:0", "star"],
        "splits": {"train": {"barrier": [[None, 0.5], [0.5, None]], "largest_loss": [[None, 1.5], [1.5, None]]}},
        "hubs": {name: {"network": name, "train": HUB} for name in ("star", "mean")},
    },
    "sweep": {
        **TASK,
        "kind": "sources",
        "fits": {"train": {"line": NO_LINE}},
        "points": [
            {
                "value": n,
                "seeds": [0],
                "train": {
                    **{key: SPREAD for key in (*KINDS, "regular_loss", "star_loss")},
                    "largest_loss": {"star_heldout": SPREAD},
                },
            }
            for n in (2, 5)
        ],
    },
}
"""The parts that the page shows of what the commands of these names write."""


def test_planes_curves_graphs_and_sweeps(run: Path) -> None:
    for name, content in LANDSCAPES.items():
        write_json(run / f"{name}.json", content)
    found, text = written(run), (run / "report.html").read_text()
    assert not any("damaged" in line for line in found.texts("p"))
    captions = found.texts("figcaption")
    assert set(captions) >= {
        "train loss",
        "train accuracy",
        "train barrier",
        "train largest loss",
        "train loss barrier",
    }
    assert rows(text, "train barrier")[1:] == [["source:0", "", "0.5"], ["star", "0.5", ""]]
    assert ["through the star", "0.750", "0.500", "0.250"] in rows(
        text, "digits, mlp: curves from heldout:0 to heldout:1"
    )
    assert rows(text, "digits, mlp: sweep of sources, train set")[1][:3] == ["2", "1", "0.250 ± 0.125"]
    assert rows(text, "hubs: paths to all others here, train")[1][:2] == ["star", "0.500"]
    # Up is up: the row of the largest y comes first, and each network is written in its cell.
    grid = re.findall(r"<tr><th scope=\"row\">(\S+)</th><td>([\d.]+)</td><td>([\d.]+)</td><td>", text)
    assert ("1", "4", "5") in grid
    assert ("0", "0.01", "1") in grid
    cells = next(
        d
        for d in map(json.loads, re.findall(r"json\">(.*?)</script>", text))
        if d.get("columns") == ["-1", "0", "1", "2"]
    )
    left, top, wide, tall = cells["cells"]
    marks = {
        name: (float(x), float(y)) for x, y, name in re.findall(r'x="([\d.]+)" y="([\d.]+)" class="mark">× (\w+)', text)
    }
    for name, i, j in (("star", 1, 1), ("b", 0, 3)):
        assert marks[name][0] == pytest.approx(left + (j + 0.5) * wide, abs=5)
        assert marks[name][1] == pytest.approx(top + (i + 0.5) * tall, abs=5)
    assert "by logarithm" in text


def test_a_folder_of_runs_lists_them(run: Path, tmp_path: Path) -> None:
    write_page(run)
    found = written(tmp_path, "all.htm")
    assert found.texts("h2") == ["runs"]
    assert found.texts("th")[:3] == ["run", "state", "models"]
    assert run.name in found.texts("th")
    (link,) = [given["href"] for tag, given, _ in found.all if tag == "a" and given["href"] != "#s0"]
    assert link == f"{quote(run.name)}/report.html"


def test_other_losses_need_neither_accuracy_nor_a_sign(run: Path) -> None:
    results = results_of(run)
    del results["digest"], results["accuracy"]
    results |= {"paths": results["paths"][:1], "metrics": {}}
    results["paths"][0] = {
        **{key: value for key, value in results["paths"][0].items() if "accuracy" not in key},
        **{f"{split}_loss": [-1.0, -1.0, -1.0] for split in ("train", "test")},
    }
    write_json(run / "results.json", sealed(results))
    (run / "log.jsonl").unlink()
    for epoch in range(2):
        RunFolder(run).log.append(kind="star", model="star", epoch=epoch, loss=-0.5 * epoch)
    found = written(run)
    assert found.texts("figcaption") == ["train loss", "test loss", "training loss"]
    assert found.texts("caption").count("train loss") == 1


def test_a_large_run_makes_a_page_of_less_than_a_megabyte(run: Path) -> None:
    results = results_of(run)
    del results["digest"]
    t = [i / 50 for i in range(51)]
    long = {key: [0.123456789 + 0.01 * i for i in range(51)] for key in ("train_loss", "test_loss")}
    long |= {key: [0.987654321 - 0.01 * i for i in range(51)] for key in ("train_accuracy", "test_accuracy")}
    kinds = ["star_heldout"] * 10 + ["star_source"] * 50 + ["regular_regular"] * 40
    paths = [{"kind": kind, "first": "star", "second": f"source {i}", "t": t, **long} for i, kind in enumerate(kinds)]
    write_json(run / "results.json", sealed({**results, "t": t, "paths": paths}))
    entries = [
        {"kind": "source", "model": f"source {i}", "epoch": e, "loss": 1.23456789}
        for i in range(50)
        for e in range(100)
    ]
    (run / "log.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    assert write_page(run).stat().st_size < 1_000_000


def test_from_python(run: Path, tmp_path: Path) -> None:
    loaded = library.load_run(run)
    assert loaded.report_html() == run / "report.html"
    assert loaded.report_html(str(tmp_path / "p.html")).read_bytes() == (run / "report.html").read_bytes()


def test_examples_of_docstrings() -> None:
    for module in (charts, elements):
        assert doctest.testmod(module).attempted
        assert doctest.testmod(module).failed == 0


def test_numbers_on_axes_are_round() -> None:
    assert ticks(-0.03, 0.04) == [-0.02, 0.0, 0.02, 0.04]
    assert ticks(-3.0, 0.4, whole=True) == [-3.0, -2.0, -1.0, 0.0]


def test_colours_of_heat_maps_are_ordered_by_lightness() -> None:
    colours = [colour_of(value, 0.0, 10.0) for value in range(11)]
    light = [sum(w * int(c[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5))) for c in colours]
    assert light == sorted(light)
    assert (colours[0], colours[-1]) == ("#00204d", "#ffea46")
    assert colour_of(3.0, 3.0, 3.0) == "#7c7b78"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = installed()
    if program is None:
        pytest.skip("no Chromium on this machine (tools/install_browser.sh)")
    with browser(program, tmp_path_factory.mktemp("browser")) as found:
        yield found


PLACE = """
((number, x, y) => {
  const svg = document.querySelectorAll("figure > svg")[number];
  svg.scrollIntoView({block: "center"});
  const point = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  return [point.x, point.y];
})
"""
"""The place in the window of a point in a figure."""


def test_in_a_browser(chromium: Browser, studied: Path, tmp_path: Path) -> None:
    page = write_page(studied, tmp_path / NAMED.replace("/", "") / "page.html")
    chromium.open(page)
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]
    results = results_of(studied)
    assert chromium.value("document.querySelectorAll('#s0 tbody tr').length") == results_table(results).row_count
    drawn = "[...document.querySelectorAll('#s1 figure .line')].map(one => one.getBoundingClientRect().width)"
    widths = chromium.value(drawn)
    assert len(widths) == 4 * 3  # star to heldouts, star to sources, regular to regular
    assert min(widths) > 300

    def under(number: int) -> str:
        return str(chromium.value(f"document.querySelectorAll('figure output')[{number}].innerText"))

    place = LEFT + ACROSS / 2, TOP + 5
    chromium.point(*chromium.value(f"{PLACE}(0, {place[0]}, {place[1]})"))
    wanted = [path["train_loss"] for path in results["paths"] if path["kind"] == "star_heldout"]
    said = dict(line.split(": ") for line in under(0).splitlines())
    assert said["t"] == "0.5"
    assert float(said["star to heldouts (n=1)"]) == pytest.approx(wanted[0][1], rel=1e-5)
    assert float(said["star to sources (n=2)"].split(" ± ")[0]) == pytest.approx(
        fmean(path["train_loss"][1] for path in results["paths"] if path["kind"] == "star_source"), rel=1e-5
    )
    chromium.value("document.querySelectorAll('figure > svg')[0].focus()")
    chromium.press("ArrowRight")
    assert under(0).startswith("t: 1\n")
    chromium.press("Escape")
    assert under(0) == ""

    figures = chromium.value("[...document.querySelectorAll('figcaption')].map(one => one.innerText)")
    heat = figures.index("mean cosine of each parameter tensor, matched")
    cells = chromium.value(f"JSON.parse(document.querySelectorAll('figure script')[{heat}].textContent)")
    left, top, wide, tall = cells["cells"]
    chromium.point(*chromium.value(f"{PLACE}({heat}, {left + 1.5 * wide}, {top + 0.5 * tall})"))
    assert under(heat) == f"{cells['rows'][0]}, {cells['columns'][1]}: {cells['values'][0][1]:g}"
    pairs = json.loads((studied / "distances.json").read_text())["pairs"]
    (cosine,) = [one["layers"][cells["rows"][0]]["matched"]["cosine"] for one in pairs if one["kind"] == "star_heldout"]
    assert cells["columns"][1] == "star to heldouts"
    assert cells["values"][0][1] == pytest.approx(cosine, rel=1e-5)

    chromium.value("dispatchEvent(new Event('beforeprint'))")
    assert chromium.value("document.querySelectorAll('details.print:not([open])').length") == 0
    light = chromium.value("getComputedStyle(document.body).backgroundColor")
    chromium.open(page, 390, dark=True)
    assert chromium.value("document.documentElement.scrollWidth") <= 390
    assert chromium.value("getComputedStyle(document.body).backgroundColor") != light
    assert chromium.complaints() == []
