"""Files of settings: what they hold, what they build on, and what the paper found with them. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastar.config.renamed import renewed
from fastar.errors import FastarError
from fastar.runtime.json_files import LARGEST

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
if not CONFIGS.is_dir():  # installed, not a checkout: setup.py maps the folder into the package
    CONFIGS = Path(__file__).resolve().parents[1] / "configs"

FIGURES = ("regular_loss", "star_loss", "regular_regular", "star_regular")
Figure = tuple[float, float | None]
"""A mean and, where the paper has one, a standard deviation."""


@dataclass(frozen=True)
class Paper:
    """What the paper has of a recipe: `where`, and train losses and barriers (eq. 10) as far as it prints them."""

    where: str
    regular_loss: Figure | None = None
    star_loss: Figure | None = None
    regular_regular: Figure | None = None
    star_regular: Figure | None = None

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


DEEPEST = 50
MOST = 100_000
TEXT = 10_000_000
"""Limits of settings: levels, values (each alias counts as what it stands for), and characters of a file."""

_PLAIN = {f"tag:yaml.org,2002:{name}": name for name in ("null", "bool", "int", "float", "str")}


class _StrictLoader(yaml.SafeLoader):
    """Plain values alone, no key twice, and an end to depth and number."""

    deep, many = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.deep += 1
        self._bounded(self.peek_event(), self.deep)
        node = super().compose_node(parent, index)
        self.deep -= 1
        return node

    def plain(self, node: yaml.Node, deep: int = 1) -> Any:
        """The value of `node`. An alias is a value of its own, so that none of them is met again inside itself."""
        self.many += 1
        self._bounded(node, deep)
        if node.tag == "tag:yaml.org,2002:seq" and isinstance(node, yaml.SequenceNode):
            return [self.plain(one, deep + 1) for one in node.value]
        if node.tag == "tag:yaml.org,2002:map" and isinstance(node, yaml.MappingNode):
            return self._mapping(node, deep)
        if node.tag == "tag:yaml.org,2002:timestamp":  # to no setting a date, and a run may be called by one
            return node.value
        if node.tag not in _PLAIN or not isinstance(node, yaml.ScalarNode):
            raise _refused(node, f"{node.tag.replace('tag:yaml.org,2002:', '!!')} is no type that settings have")
        try:
            value = self.construct_object(node)
        except (ValueError, LookupError, OverflowError) as error:  # 0x_, !!bool x, more digits than Python reads
            raise _refused(node, f"{shortened(node.value)!r} is no {_PLAIN[node.tag]}") from error
        if isinstance(value, int) and abs(value) > LARGEST:
            raise _refused(node, f"{shortened(node.value)} is too large a number")
        if isinstance(value, str) and "\0" in value:  # no name has it
            raise _refused(node, "a NUL character")
        return value

    def _mapping(self, node: yaml.MappingNode, deep: int) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        under: dict[Any, Any] = {}
        for place, content in node.value:
            if place.tag == "tag:yaml.org,2002:merge":
                merged = self.plain(content, deep + 1)
                for one in merged if isinstance(merged, list) else [merged]:
                    if not isinstance(one, dict):
                        raise _refused(place, "<< needs a mapping")
                    under = {**one, **under}
                continue
            key = self.plain(place, deep + 1)
            if not isinstance(key, Hashable):
                raise _refused(place, "a key must be a plain value")
            if key in own:
                raise _refused(place, f"{shortened(str(key))} is given twice; leave one out")
            own[key] = self.plain(content, deep + 1)
        return {**under, **own}

    def _bounded(self, place: yaml.Node | yaml.Event, deep: int) -> None:
        if deep > DEEPEST:
            raise _refused(place, f"nested more than {DEEPEST} levels deep")
        if self.many > MOST:
            raise _refused(place, f"more than {MOST:,} values")


def _refused(place: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def read_yaml(text: str) -> Any:
    """The settings in `text`: null, booleans, numbers and strings (a date is one), in lists and
    mappings that have no key twice.

    Raises:
        FastarError: anything else; the message says the line and what is wrong there, not where `text` is from.
    """
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        return None if node is None else loader.plain(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise FastarError(f"{line}{' '.join(filter(None, (error.context, error.problem)))}") from error
    except yaml.YAMLError as error:
        raise FastarError(" ".join(str(error).split())) from error


def shortened(text: str) -> str:
    """The part of a text that a line has room for."""
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `over` where both have a key."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML file over those of its `base`; what it says of the paper left out.

    Raises:
        FastarError: unreadable, not a mapping of settings, or a base that leads back to itself.
    """
    return _read(path, ())


def read_paper(path: Path) -> Paper | None:
    """What the file itself (not its base) says of the paper under `paper`, or None."""
    found = _load(path).get("paper")
    if found is None:
        return None
    valid = ("where", *FIGURES)
    if not isinstance(found, dict) or not isinstance(found.get("where"), str) or not set(found) <= set(valid):
        raise FastarError(f"{path}: paper must be a mapping of {', '.join(valid)}, where is needed")
    return Paper(found["where"], **{key: _figure(path, key, found[key]) for key in FIGURES if key in found})


def shipped(name: str | Path) -> Path | None:
    """The file of the shipped configuration called `name`, with or without its suffix, or None."""
    path = CONFIGS / f"{str(name).removesuffix('.yaml')}.yaml"
    return path if Path(name).name == str(name) and path.is_file() else None


def recipe_path(given: Path) -> Path:
    """The file that `--config GIVEN` means: a file that is there, or the shipped configuration of this name.

    Raises:
        FastarError: neither is there; names the shipped configurations that are called similarly.
    """
    if given.is_file():
        return given
    found = shipped(given)
    if found is not None:
        return found
    if given.exists():
        raise FastarError(f"{given}: is not a file; give a YAML file, or the name of a shipped configuration")
    near = difflib.get_close_matches(given.name.removesuffix(".yaml"), names(), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise FastarError(
        f"{given}: no such file, nor a shipped configuration of this name: {hint}`fastar configs` lists them"
    )


def names() -> list[str]:
    """The shipped configurations' names."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config_path(dataset: str, arch: str) -> Path | None:
    """The configuration that ships for this dataset and architecture, or None."""
    return shipped(arch if arch.startswith(f"{dataset}-") else f"{dataset}-{arch}")


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise FastarError(f"{path}: its base refers back to itself; remove the circle")
    content = _load(path)
    content.pop("paper", None)
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise FastarError(f"{path}: base={base!r}: give the file name of another configuration")
    return merge(_read(path.parent / base, (*seen, path)), content)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(TEXT + 1)  # of a pipe too: the shell's <(...)
        if len(text) > TEXT:
            raise FastarError(f"longer than {TEXT:,} characters")
        content = read_yaml(text)
    except OSError as error:
        raise FastarError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (FastarError, UnicodeDecodeError) as error:
        raise FastarError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise FastarError(f"{path}: expected a mapping of settings, such as `train: {{epochs: 5}}`, found {found}")
    try:
        return renewed(content)
    except FastarError as error:
        raise FastarError(f"{path}: {error}") from error


def _figure(path: Path, key: str, value: object) -> Figure:
    numbers = value if isinstance(value, list) else [value, None]
    mean, deviation = numbers if len(numbers) == 2 else (None, None)
    if not isinstance(mean, int | float) or not isinstance(deviation, int | float | None):
        raise FastarError(f"{path}: paper.{key}={value!r}: give a mean, or [mean, standard deviation]")
    return float(mean), None if deviation is None else float(deviation)
