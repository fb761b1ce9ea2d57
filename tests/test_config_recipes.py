"""Shipped configurations: one for each row of the paper, with its figures; and their smaller versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastar.config import Settings, flatten, load_settings
from fastar.config.recipes import CONFIGS, names, read_paper, read_recipe, recipe_path
from fastar.config.scales import MOST, SCALES, WIDTHS, scaled
from fastar.errors import FastarError
from fastar.models import model_options
from fastar.report.recipe_list import catalogue

TABLES = Path(__file__).resolve().parents[2] / "shared" / "paper" / "tables.json"

# Rows of the paper: (where, dataset, arch, what differs) -> the configuration.
ROWS = {
    "table 1": {
        ("cifar10", "resnet18", "sgd"): "cifar10-resnet18",
        ("cifar10", "resnet18", "adam"): "cifar10-resnet18-adam",
        ("cifar10", "vgg11", "sgd"): "cifar10-vgg11",
        ("cifar10", "vgg19", "sgd"): "cifar10-vgg19",
        ("cifar10", "densenet40_12", "sgd"): "cifar10-densenet40",
        ("cifar100", "resnet18", "sgd"): "cifar100-resnet18",
        ("cifar100", "densenet40_12", "sgd"): "cifar100-densenet40",
        ("imagenet", "resnet18", "sgd"): "imagenet-resnet18",
    },
}
FIGURE_1 = [f"{dataset}-resnet18-sources{n}" for dataset in ("cifar10", "cifar100") for n in (2, 5, 10, 20, 30, 40)]
FIGURE_3 = {("wrn22", 1), ("wrn22", 2), ("wrn22", 4), ("wrn22", 8), ("wrn28", 1), ("wrn34", 1), ("wrn40", 1)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {entry.name: entry for entry in catalogue()}


def pair(value: Any) -> tuple[float, float | None]:
    return (value[0], value[1]) if isinstance(value, list) else (value, None)


@pytest.mark.data
def test_figures_of_the_paper_are_its_tables(found: dict[str, Any]) -> None:
    if not TABLES.is_file():
        pytest.skip("needs the paper's tables beside the checkout (../shared/paper/tables.json)")
    tables = json.loads(TABLES.read_text())
    rows = {
        ROWS["table 1"][row["dataset"], row["arch"], row["optimizer"]]: row for row in tables["table1_train_barriers"]
    }
    rows["mnist-vit"] = tables["table5_vit_mnist"]
    for row in tables["table9_t_sampling"]:
        rows[f"cifar10-resnet18-{row['scheme'].split('(')[0].split()[0]}"] = row
    for row in tables["table12_activations"]:
        rows[f"cifar10-resnet18-{row['activation']}"] = row
    assert len(rows) == 8 + 1 + 3 + 3
    for name, row in rows.items():
        paper, settings = found[name].paper.model_dump(), found[name].settings
        for key in ("regular_loss", "star_loss", "regular_regular", "star_regular"):
            assert paper[key] == (pair(row[key]) if key in row else None), (name, key)
        assert settings.sources.number == row.get("sources", settings.sources.number), name
        assert settings.sources.heldout == row.get("heldout", settings.sources.heldout), name


def test_every_row_of_the_paper_has_a_configuration(found: dict[str, Any]) -> None:
    where = {name: entry.paper.where for name, entry in found.items() if entry.paper is not None}
    assert {name for name, place in where.items() if place == "table 1"} == set(ROWS["table 1"].values())
    for (dataset, arch, optimizer), name in ROWS["table 1"].items():
        settings = found[name].settings
        assert (settings.dataset.name, settings.train.optimizer) == (dataset, optimizer)
        assert settings.model.arch.removeprefix("imagenet-") == arch.removesuffix("_12")
    assert sorted(name for name, place in where.items() if place == "figure 1") == sorted(FIGURE_1)
    for name in FIGURE_1:
        settings = found[name].settings
        assert f"sources{settings.sources.number}" == name.rpartition("-")[2]
        assert settings.train == found[f"{settings.dataset.name}-resnet18"].settings.train
    three = [found[name].settings for name, place in where.items() if place == "figure 3"]
    assert {(s.model.arch, s.model.options["width"]) for s in three} == FIGURE_3
    drawn = {s.star.t: s for s in (found[n].settings for n, place in where.items() if place == "table 9")}
    assert set(drawn) == {"uniform", "beta", "constant"}
    assert (drawn["beta"].star.alpha, drawn["beta"].star.beta, drawn["constant"].star.value) == (2, 2, 0.5)
    assert found["mnist-vit"].settings.matching.method == "none"


@pytest.mark.quick
def test_a_recipe_says_only_how_it_differs_from_its_base() -> None:
    for name in names():
        own = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        if "base" not in own:
            continue
        base = read_recipe(CONFIGS / own["base"])
        for section, content in own.items():
            if section in ("base", "paper", "star", "model"):  # of which some say what the base leaves to defaults
                continue
            repeated = {key for key, value in content.items() if base.get(section, {}).get(key) == value}
            assert not repeated, f"{name}: {section} repeats {', '.join(repeated)}"


def test_fast_stars_take_a_tenth_of_their_recipes_epochs() -> None:
    """From the mean of its sources, whose own recipe stays the paper's; the rate ends at 0."""
    fast = [f"cifar10-{arch}-fast" for arch in ("vgg11", "vgg19", "densenet40")]
    for name in (*fast, "cifar100-resnet18-fast", "cifar100-densenet40-fast"):
        settings, paper = (load_settings(file=Path(one)) for one in (name, name.removesuffix("-fast")))
        assert settings == paper.model_copy(update={"star": settings.star})
        assert settings.star.start == "mean"
        assert settings.star_epochs * 10 == paper.train.epochs
        assert settings.star_lr * 2 == paper.train.lr
        assert settings.star_train.schedule == "cosine"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", names())
def test_scales_make_every_recipe_smaller_and_leave_what_it_is(name: str, scale: str) -> None:
    full, small = (load_settings(file=Path(name), scale=s) for s in ("full", scale))
    was, found = (flatten(one.model_dump(mode="json")) for one in (full, small))
    for key in ("train.epochs", "sources.number", "sources.heldout", "evaluation.points"):
        assert found[key] <= min(was[key], MOST[key][SCALES.index(scale)])
    assert small.dataset.limit is not None or small.dataset.name == "digits"
    assert small.model.arch == full.model.arch
    for key in ("optimizer", "schedule", "momentum", "weight_decay", "label_smoothing"):
        assert getattr(small.train, key) == getattr(full.train, key)
    assert bool(small.train.milestones) == bool(full.train.milestones)
    assert bool(small.train.resolutions) == bool(full.train.resolutions)
    assert small.star.t == full.star.t
    assert small.matching == full.matching
    assert small.seed == full.seed


def test_epochs_and_learning_rate_shrink_in_proportion() -> None:
    content = {
        "dataset": {"name": "imagenet"},
        "model": {"arch": "imagenet-resnet18"},
        "train": {
            "epochs": 120,
            "batch_size": 256,
            "lr": 0.4,
            "schedule": "step",
            "milestones": [30, 60, 61, 90],
            "warmup_epochs": 10,
            "resolutions": [[60, 160], [65, 192], [90, 224]],
        },
        "star": {"epochs": 40, "lr": 0.2},
    }
    out = scaled(content, "small", defaults={"train.optimizer": "sgd"})
    assert out["train"] == {
        "epochs": 12,
        "batch_size": 64,
        "lr": pytest.approx(0.1),
        "schedule": "step",
        "milestones": [3, 6, 9],
        "warmup_epochs": pytest.approx(1.0),
        "resolutions": [[6, 96], [9, 96]],
    }
    assert out["star"] == {"epochs": 4, "lr": pytest.approx(0.05)}
    assert out["dataset"]["resolution"] == 96
    assert content["train"]["epochs"] == 120  # the settings given are not changed
    adam = scaled(content, "small", defaults={"train.optimizer": "adam"})
    assert adam["train"]["lr"] == 0.4


def test_widths_are_those_of_the_architectures() -> None:
    """Default widths of scales are those of the architectures."""
    for arch, pattern in (
        ("mlp", "mlp"),
        ("vit", "vit"),
        ("densenet40", "densenet*"),
        ("wrn22", "wrn*"),
        ("vgg11", "*"),
    ):
        width = WIDTHS[pattern]
        assert model_options(arch)[width.key] == width.default
    assert load_settings(file=Path("cifar10-wrn22-width8"), scale="smoke").model.options["width"] == 1.0
    assert load_settings(file=Path("cifar10-densenet40"), scale="smoke").model.options["growth"] == 4
    assert load_settings(dataset="digits", scale="small").model.options["width"] == 8  # already narrower


def test_a_limit_leaves_an_image_of_each_class() -> None:
    for name, classes in (("imagenet-resnet18", 1000), ("cifar100-resnet18", 100)):
        for scale in SCALES:
            settings = load_settings(file=Path(name), scale=scale)
            limits = (settings.dataset.limit, settings.evaluation.limit, settings.evaluation.test_limit)
            assert min(limit or 0 for limit in limits) >= classes


def test_overrides_are_taken_as_they_are() -> None:
    settings = load_settings(file=Path("cifar10-vgg11"), scale="smoke", overrides=["train.epochs=3", "model.width=1"])
    assert (settings.train.epochs, settings.model.options["width"]) == (3, 1)


@pytest.mark.parametrize(
    ("paper", "says"),
    [
        ("paper: 3", "where is needed"),
        ("paper: {table: 1}", "where is needed"),
        ("paper: {where: table 1, star_loss: x}", "paper.star_loss is wrong"),
        ("paper: {where: table 1, star_loss: [1, 2, 3]}", "paper.star_loss"),
    ],
)
def test_wrong_figures_are_refused(paper: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(paper)
    with pytest.raises(FastarError, match=r"own\.yaml") as refused:
        read_paper(path)
    assert says in str(refused.value)


def test_unknown_names_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FastarError, match="did you mean cifar10-vgg1"):
        recipe_path(Path("cifar10-vgg"))
    with pytest.raises(FastarError, match="is not a file"):
        recipe_path(tmp_path)
    with pytest.raises(FastarError, match="choose smoke, small or full"):
        load_settings(dataset="digits", scale="tiny")
    assert isinstance(load_settings(file=Path("cifar10-vgg11.yaml")), Settings)
