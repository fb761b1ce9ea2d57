"""Settings: strict, typed, and errors that name the key to change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_cases import fastar

from fastar.config import (
    Settings,
    as_override,
    changes,
    flatten,
    load_settings,
    matching_settings,
    nested,
    parse_overrides,
    validate,
)
from fastar.config.recipes import CONFIGS, config_path
from fastar.config.renamed import with_old_names
from fastar.errors import FastarError, OldName
from fastar.models import build_model

pytestmark = pytest.mark.quick


def digits(*overrides: str) -> Settings:
    return load_settings(dataset="digits", overrides=overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_named_for_what_they_hold(path: Path) -> None:
    settings = load_settings(file=path)
    shipped = config_path(settings.dataset.name, settings.model.arch)
    assert shipped is not None
    assert path.stem.startswith(shipped.stem)  # others are variants of it: imagenet-resnet18-fast
    assert load_settings(file=Path(path.stem)) == settings  # the name alone will do
    shape = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28)}.get(settings.dataset.name, (3, 32, 32))
    build_model(settings.model.arch, input_shape=shape, classes=10, seed=0, **settings.model.options)
    if path == shipped:
        assert load_settings(dataset=settings.dataset.name, arch=settings.model.arch) == settings


def test_digits_defaults_meet_what_the_first_command_promises() -> None:
    settings = digits()
    assert settings.sources.number >= 10
    assert settings.sources.heldout >= 3
    assert settings.evaluation.points == 11


def test_yaml_round_trip(tmp_path: Path) -> None:
    settings = digits("train.schedule=step", "train.milestones=[3, 5]", "star.lr=0.01", "dataset.root=/a b/ü#:[x]")
    path = tmp_path / "config.yaml"
    path.write_text(settings.to_yaml(), encoding="utf-8")
    assert load_settings(file=path) == settings


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.lrr=1"], ["unknown key train.lrr", "did you mean train.lr?"]),
        (["lr=1"], ["unknown key lr", "did you mean train.lr?"]),
        (["evaluaton.points=3"], ["unknown key evaluaton", "evaluation"]),
        (["train.epochs=0"], ["train.epochs=0"]),
        (["train.epochs=1.5"], ["train.epochs=1.5"]),
        (["train.lr=-0.1"], ["train.lr=-0.1"]),
        (["train.lr=nan"], ["train.lr"]),
        (["train.lr=.inf"], ["train.lr"]),
        (["train.lr="], ["train.lr"]),
        (["train.momentum=1"], ["train.momentum=1"]),
        (["train.weight_decay=-1"], ["train.weight_decay=-1"]),
        (["train.schedule=cosin"], ["train.schedule='cosin'", "'cosine'"]),
        (["train.schedule=step"], ["milestones"]),
        (["train.milestones=[3]"], ["schedule=step"]),
        (["train.warmup_epochs=1000"], ["warmup_epochs", "epochs"]),
        (["train.momentum=0"], ["nesterov", "momentum"]),
        (["train=3"], ["train=3", "train.epochs"]),
        (["model=3"], ["model=3", "model.arch"]),
        (["sources.number=0"], ["sources.number=0"]),
        (["sources.heldout=-1"], ["sources.heldout=-1"]),
        (["star.value=1.5"], ["star.value=1.5"]),
        (["evaluation.points=1"], ["evaluation.points=1"]),
        (["seed=-1"], ["seed=-1"]),
        (["workers=0"], ["workers=0"]),
        (["dataset.limit=0"], ["dataset.limit=0"]),
        (["dataset.flip=alternate"], ["flip=alternate", "digits's are not"]),
        (["train.lr"], ["'train.lr'", "key=value"]),
        (["=3"], ["key=value"]),
        (["train.lr=["], ["'train.lr=['", "YAML"]),
        (["seed=1", "seed.x=2"], ["seed.x=2", "seed"]),
    ],
)
def test_wrong_settings_are_refused_in_one_line_that_names_them(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(FastarError) as caught:
        digits(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_unknown_key_lists_all_valid_ones() -> None:
    with pytest.raises(FastarError, match="solver, start, restarts, perturbations, max_sweeps"):
        digits("matching.zzz=1")


def test_overrides_win_in_order_over_the_file() -> None:
    settings = digits("train.epochs=3", "train.epochs=4", "model.width=5")
    assert settings.train.epochs == 4
    assert settings.model.options["width"] == 5


@pytest.mark.parametrize(
    "value", ["/plain", "/a #b", "/a: [x]", "123", "null", "~", "ü 日本", "a\\b", "'quoted\"", "1e-5", "- x", "x=y"]
)
def test_a_path_keeps_every_character(value: str) -> None:
    assert parse_overrides([as_override("dataset.root", Path(value))]) == {"dataset": {"root": value}}
    assert load_settings(dataset="digits", values={"dataset.root": Path(value)}).dataset.root == Path(value)


@pytest.mark.parametrize("value", [3, 0.25, 1e-05, True, None, [1, 2], "x", ""])
def test_values_survive_as_overrides(value: Any) -> None:
    assert parse_overrides([as_override("a.b", value)]) == nested({"a.b": value}) == {"a": {"b": value}}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "found nothing"),
        (b"- a\n", "found list"),
        (b"a: [\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"base: [1]\n", "base"),
        (b"base: nowhere.yaml\n", "nowhere.yaml"),
        (b"base: file.yaml\n", "circle"),
        (b"dataset: digits\nmodel: {arch: mlp}\n", "dataset='digits'"),
        (b"model: {arch: mlp}\n", "dataset"),
        (b"dataset: {name: digits}\n", "model"),
        (b"1: 2\n", "1"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(FastarError) as caught:
        load_settings(file=path)
    assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["model: 3\n", "model:\n"])
def test_a_model_that_is_no_section_does_not_confuse_arch(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(content + "dataset: {name: digits}\n")
    assert load_settings(file=path, arch="mlp").model.arch == "mlp"  # the option replaces it


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FastarError, match=r"none\.yaml: no such file"):
        load_settings(file=tmp_path / "none.yaml")


def test_no_dataset_says_which_options_give_one() -> None:
    with pytest.raises(FastarError, match="--dataset NAME, --data MODULE:FUNCTION or --config FILE"):
        load_settings()


def test_base_is_merged_below_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("dataset: {name: digits}\nmodel: {arch: mlp}\ntrain: {epochs: 9, lr: 0.5}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain: {lr: 0.25}\n")
    settings = load_settings(file=tmp_path / "top.yaml")
    assert (settings.train.epochs, settings.train.lr) == (9, 0.25)


def test_another_architecture_does_not_inherit_the_shipped_one_s_options(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("dataset: {name: digits}\nmodel: {arch: mlp, width: 16, depth: 2}\n")
    assert load_settings(file=path, arch="resnet8").model.options == {}
    assert load_settings(file=path, arch="mlp").model.options == {"width": 16, "depth": 2}


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError):
        digits().train.lr = 3  # type: ignore[misc]


def test_flatten_and_changes() -> None:
    a = {"train": {"lr": 0.1, "epochs": 3}, "seed": 0}
    b = {"train": {"lr": 0.2, "epochs": 3}, "seed": 0, "device": "cpu"}
    assert flatten(a) == {"train.lr": 0.1, "train.epochs": 3, "seed": 0}
    assert changes(a, b) == {"train.lr": (0.1, 0.2), "device": ("auto", "cpu")}
    assert changes(a, a) == {}


def test_every_shipped_key_is_read_strictly() -> None:
    content = yaml.safe_load((CONFIGS / "digits-mlp.yaml").read_text())
    content["train"]["epoch"] = 3
    with pytest.raises(FastarError, match=r"train\.epoch: did you mean train\.epochs\?"):
        validate(content)


@pytest.mark.parametrize("value", ["abc", None, [1, 2], True, 2.5, 0, -1])
@pytest.mark.parametrize("option", ["width", "depth"])
def test_architectures_refuse_values_that_are_no_sizes(option: str, value: Any) -> None:
    with pytest.raises(FastarError, match=rf"model\.{option}="):
        build_model("mlp", input_shape=(1, 8, 8), classes=10, seed=0, **{option: value})


def test_what_older_versions_wrote_is_completed_by_defaults() -> None:
    new = load_settings(dataset="digits", overrides=["train.label_smoothing=0.1", "star.t=beta"])
    new = new.model_dump(mode="json")
    old = copy.deepcopy(new)
    for section, key in (("train", "label_smoothing"), ("star", "t"), ("dataset", "crop"), ("dataset", "validation")):
        del old[section][key]
    del old["checkpoint"], old["workers"]
    before = copy.deepcopy(old)
    assert changes(old, new) == {"train.label_smoothing": (0.0, 0.1), "star.t": ("uniform", "beta")}
    assert old == before
    assert changes(new, new) == {}
    recipe = {"train": {"lr": 0.1}, "limit": None, "seed": 3}  # of a model: parts of settings, and other things
    wanted = {"train": {"lr": 0.1, "decay_1d": True}, "limit": None, "seed": 4}
    assert changes(recipe, wanted) == {"seed": (3, 4)}


OLD = {
    "dataset.called=cats": "dataset.own_name=cats",
    "figures.tensorboard=false": "logging.tensorboard=false",
    "matching.kicks=2": "matching.perturbations=2",
    "matching.orders=3": "matching.restarts=3",
    "matching.start=guess": "matching.start=backward",
}


def test_old_names_load_with_a_line_that_says_the_new_one(tmp_path: Path) -> None:
    now = load_settings(dataset="imagefolder", overrides=OLD.values())
    with pytest.warns(OldName) as said:
        assert load_settings(dataset="imagefolder", overrides=OLD) == now
    assert sorted(str(one.message).partition(";")[0] for one in said) == [
        "dataset.called is now called dataset.own_name",
        "figures is now called logging",
        "matching.kicks is now called matching.perturbations",
        "matching.orders is now called matching.restarts",
        "matching.start=guess is now called matching.start=backward",
    ]
    file = tmp_path / "old.yaml"
    (tmp_path / "base.yaml").write_text("dataset: {called: cats}\nmatching: {kicks: 2, orders: 9, start: guess}")
    file.write_text("base: base.yaml\nmatching: {restarts: 3}\nfigures: {tensorboard: false}")
    with pytest.warns(OldName):
        assert load_settings(dataset="imagefolder", arch="imagenet-resnet18", file=file).matching == now.matching
    with pytest.warns(OldName):
        assert matching_settings({"kicks": 2}).perturbations == 2
    with pytest.raises(FastarError, match="perturbations, and both are given"):
        parse_overrides(["matching.kicks=1", "matching.perturbations=1"])


def test_what_is_recorded_keeps_its_names() -> None:
    section = matching_settings({"start": "backward", "restarts": 2}).model_dump(mode="json")
    recorded = with_old_names("matching", section)
    assert (recorded["start"], recorded["orders"], recorded["kicks"]) == ("guess", 2, 0)
    assert changes({"matching": recorded}, {"matching": section}) == {}
    assert changes({"matching": recorded}, {"matching": {**section, "restarts": 3}}) == {"matching.restarts": (2, 3)}


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    said = fastar("train-star", "--dataset", "digits", "matching.kicks=1", "train.lr=0", "--out", tmp_path / "run").err
    assert said.splitlines()[0].startswith("fastar: matching.kicks is now called matching.perturbations; ")
    assert len(said.splitlines()) == 2
