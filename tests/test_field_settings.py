"""Settings as people mistype them, and as files that were damaged or made to harm have them: one line, exit code 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import refused

from fastar.config import as_override, load_settings, parse_overrides, strict_yaml
from fastar.config.recipes import CONFIGS, read_recipe
from fastar.config.strict_yaml import read_yaml
from fastar.errors import FastarError
from fastar.models import build_model
from fastar.report.run_list import runs_below
from fastar.runs import RunFolder

SETTINGS = "dataset: {name: digits}\nmodel: {arch: mlp}\n"
# Nine times nine times ...: 10^9 strings from 300 bytes, and a list that holds itself.
LAUGHS = "- &a0 [x, x]\n" + "".join(f"- &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9))
NO_PLAIN_VALUES = [
    pytest.param("!!python/object/apply:os.system [x]", "!!python/object/apply:os.system is no type", id="tag"),
    pytest.param("!own x", "!own is no type", id="own tag"),
    pytest.param("!!set {a, b}", "!!set is no type", id="set"),
    pytest.param("!!binary aGk=", "!!binary is no type", id="binary"),
    pytest.param("!!bool maybe", "'maybe' is no bool", id="no bool"),
    pytest.param("!!int ''", "'' is no int", id="no int"),
    pytest.param("0x_", "'0x_' is no int", id="no digits"),
    pytest.param("1" + ":01" * 200 + ".5", "is no float", id="sexagesimal"),
    pytest.param("[" * 3000, "nested more than 50 levels", id="deep list"),
    pytest.param("{a: " * 3000, "nested more than 50 levels", id="deep mapping"),
    pytest.param("9" * 5000, "(5,000 characters)", id="5000 digits"),
    pytest.param("9" * 4000, "(4,000 characters) is too large", id="4000 digits"),
    pytest.param("0x" + "f" * 5000, "is too large", id="5000 hexadecimal digits"),
    pytest.param("{a: 1, b: 2, a: 3}", "a is given twice", id="twice"),
    pytest.param("[{1: 2, 0x1: 3}]", "1 is given twice", id="twice by value"),
    pytest.param("{[1]: 2}", "a key must be a plain value", id="key"),
    pytest.param("{<<: 3}", "<< needs a mapping", id="merge"),
    pytest.param("&a [*a]", "nested more than 50 levels", id="in itself"),
    pytest.param("*a", "undefined alias", id="alias"),
    pytest.param("[1, 2", "expected ',' or ']'", id="open"),
    pytest.param('"a\\0b"', "a NUL character", id="nul"),
    pytest.param("a\x07", "unacceptable character", id="bell"),
]


def message_of(text: str) -> str:
    with pytest.raises(FastarError) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize(("text", "said"), NO_PLAIN_VALUES)
def test_what_is_no_plain_value_is_refused_with_its_line(text: str, said: str) -> None:
    assert said in message_of(text)


def test_aliases_count_as_what_they_stand_for() -> None:
    assert "more than 100,000 values" in message_of(LAUGHS)
    assert read_yaml("[&a [1, 2], *a, {b: *a}]") == [[1, 2], [1, 2], {"b": [1, 2]}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("0.1", 0.1),
        ("1e-5", "1e-5"),  # as YAML 1.1 has it; pydantic makes a number of it
        ("[100, 150]", [100, 150]),
        ("2020-01-02", "2020-01-02"),
        ("2020-13-45", "2020-13-45"),
        ("'\\xe9 \\uDCFF'", "\\xe9 \\uDCFF"),
        ('"\\xe9 \\uDCFF"', "\xe9 \udcff"),
        ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
        ("{a: 3, <<: [{a: 1}, {b: 2}, {b: 4}]}", {"a": 3, "b": 2}),
        ("!!str 12", "12"),
        ("{on: 1}", {True: 1}),
        (str(2**64), 2**64),
    ],
)
def test_plain_values_are_read_as_they_were(text: str, value: Any) -> None:
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


# The last four are read differently by libyaml, or not by PyYAML's own parser.
ALIKE = [*("a:b", "[a:1, {b}]", "- 'it''s'\n- [1,2,]\n", "a: b: c", "[1, 2"), *("? a", "a: !", "a\t-", "k: |#\n  b")]


def test_libyaml_reads_what_pyyaml_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(text: str) -> Any:
        try:
            return read_yaml(text)
        except FastarError as error:
            return str(error)

    texts = [*(path.read_text() for path in CONFIGS.glob("*.yaml")), *ALIKE]
    both = [found(text) for text in texts]
    assert strict_yaml._C_PARSER is not None or pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(strict_yaml, "_C_PARSER", None)
    assert [found(text) for text in texts] == both


def test_a_recipe_with_a_key_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"{SETTINGS}train:\n  lr: 0.1\n  epochs: 5\n  lr: 0.5\n")
    with pytest.raises(FastarError, match=r"own\.yaml: not valid YAML: line 6: lr is given twice"):
        read_recipe(tmp_path / "own.yaml")
    (tmp_path / "top.yaml").write_text("base: own.yaml\n")
    with pytest.raises(FastarError, match=r"own\.yaml: not valid YAML: line 6"):
        read_recipe(tmp_path / "top.yaml")
    (tmp_path / "own.yaml").write_text(f"{SETTINGS}{SETTINGS}")
    with pytest.raises(FastarError, match="line 3: dataset is given twice"):
        read_recipe(tmp_path / "own.yaml")


def test_overrides_are_as_strict_within_their_value() -> None:
    assert parse_overrides(["seed=1", "seed=2"]) == {"seed": 2}  # of two arguments the last one wins, as it always did
    with pytest.raises(FastarError, match=r"'train={lr: 1, lr: 2}': .* lr is given twice"):
        parse_overrides(["train={lr: 1, lr: 2}"])


@pytest.mark.parametrize(
    "damage", ["seed: 1\nseed: 2\n", "seed: " + "9" * 5000, "a: " + "[" * 3000, "a: !x 1\n"], ids=range(4)
)
def test_a_damaged_config_of_a_run_is_refused_and_told_of_in_the_list(tmp_path: Path, damage: str) -> None:
    run = RunFolder(tmp_path / "run")
    settings = load_settings(dataset="digits")
    with run.open(settings):
        run.log.append(model="source 0")
    assert [found.run for found in runs_below(tmp_path)] == [str(run.path)]
    run.config.write_text(run.config.read_text() + damage)
    with pytest.raises(FastarError, match=r"config\.yaml: not valid YAML \(line \d+: .*\); restore it"):
        run.check(settings)
    (found,) = runs_below(tmp_path)
    assert (found.run, found.state) == (str(run.path), "damaged")
    assert "not valid YAML (line" in found.where
    run.log.path.unlink()  # nothing but its name says that it is a run: other programs call their files so too
    assert runs_below(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2020-13-45", "seed='2020-13-45': input should be a valid integer"),
        ("!x 1", "line 1: !x is no type"),
        ("[" * 3000, "line 1: nested more than"),
        ("9" * 5000, "(5,000 characters)"),
    ],
    ids=["date", "tag", "deep", "digits"],
)
def test_the_command_refuses_them_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused("train-star", "--dataset", "digits", f"seed={value}")
    assert said in message
    assert len(message) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("train.epochs", 10**6),
        ("train.batch_size", 10**6),
        ("star.epochs", 10**6),
        ("matching.restarts", 10**9),
        ("matching.perturbations", 10**9),
        ("evaluation.batch_size", 10**6),
        ("evaluation.points", 10**9),
        ("dataset.limit", 10**9),
    ],
)
def test_counts_have_an_end(key: str, most: int) -> None:
    """10^30 was no size that torch takes, or a plan that did not end."""
    load_settings(dataset="digits", overrides=[f"{key}={most}"])
    for value in (most + 1, 10**30):
        with pytest.raises(FastarError, match=rf"{key}={value}: input should be less than or equal to {most}"):
            load_settings(dataset="digits", overrides=[f"{key}={value}"])
    assert load_settings(dataset="digits", overrides=[f"seed={10**30}"]).seed == 10**30  # any number is one


@pytest.mark.parametrize(
    ("arch", "options", "said"),
    [
        ("mlp", {"width": 10**30}, r"model\.width=1e\+30 of mlp must be at most 1,000,000"),
        ("mlp", {"depth": 2**31}, r"model\.depth=2.15e\+09 of mlp must be at most 1,000,000"),
        ("resnet8", {"width": 1e300}, r"model\.width=1e\+300 of resnet8 must be at most"),
        ("mlp", {"width": 10**6, "depth": 2}, "mlp with model.width=1000000, model.depth=2 does not fit into memory"),
    ],
)
def test_networks_have_an_end(arch: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes")

    if "fit" in said:  # some systems promise it all the same
        monkeypatch.setattr(torch.nn.Linear, "__init__", full)
    with pytest.raises(FastarError, match=said):
        build_model(arch, input_shape=(1, 8, 8), classes=10, seed=0, **options)


def test_a_path_of_any_bytes_is_taken_as_it_is() -> None:
    name = os.fsdecode(b"/a b\xff: #[x]")
    assert parse_overrides([f"dataset.root={name}"]) == {"dataset": {"root": name}}
    assert parse_overrides([as_override("dataset.root", Path(name))]) == {"dataset": {"root": name}}
    settings = load_settings(dataset="digits", overrides=[f"dataset.root={name}"])
    assert read_yaml(settings.to_yaml())["dataset"]["root"] == name
    assert settings.to_yaml().isascii()


@pytest.mark.parametrize("key", ["dataset.root", "dataset.directory", "sources.folder"])
def test_nobody_s_home_is_refused(key: str) -> None:
    with pytest.raises(FastarError, match=rf"{key}=.*: there is no such home folder"):
        load_settings(dataset="digits", overrides=[f"{key}=~nobody-is-called-so/x"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-star", "--config"],
        ["train-star", "--dataset", "digits", "--arch"],
        ["configs"],
        ["runs"],
        ["report"],
        ["match", "a.pt"],
    ],
    ids=lambda arguments: arguments[0] + arguments[-1],
)
def test_a_name_longer_than_the_system_takes_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(refused(*arguments, "a" * 5000)) < 6000
    assert list(tmp_path.iterdir()) == []
