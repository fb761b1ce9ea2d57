"""Files of settings: their content, the file that they build on, and the paper's figures for them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError

from fastar.config.renamed import renewed
from fastar.config.strict_yaml import TEXT, read_yaml
from fastar.config.types import Section
from fastar.errors import FastarError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
if not CONFIGS.is_dir():  # installed, not a checkout: setup.py maps the folder into the package
    CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def _pair(value: object) -> object:
    return value if isinstance(value, list) else (value, None)


Figure = Annotated[tuple[float, float | None], BeforeValidator(_pair)]
"""A mean and, where the paper has one, a standard deviation."""


class Paper(Section):
    """The paper's figures for a recipe: `where` they stand, train losses and barriers (eq. 10); None: it has none."""

    where: str
    regular_loss: Figure | None = None
    star_loss: Figure | None = None
    regular_regular: Figure | None = None
    star_regular: Figure | None = None


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
    """The figures under `paper` of the file itself, not of its base; None: it has none."""
    found = _load(path).get("paper")
    try:
        return None if found is None else Paper.model_validate(found)
    except ValidationError as error:
        key = ".".join(("paper", *map(str, error.errors()[0]["loc"][:1])))
        keys = ", ".join(Paper.model_fields)
        wanted = f"paper is a mapping of {keys}; where is needed, the others are a mean, or [mean, standard deviation]"
        raise FastarError(f"{path}: {key} is wrong: {wanted}") from error


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


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise FastarError(f"{path}: its base refers back to itself; remove the circle")
    content = _load(path)
    content.pop("paper", None)
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise FastarError(f"{path}: base={base!r}: give the file name of another configuration")
    return merge(_read(path.parent / base, (*above, path)), content)


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
