"""Run folders: resolved settings, what produced them, one writer at a time, a log, results."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fastar import __version__
from fastar.checkpoints import write_atomically
from fastar.config import Settings, differences
from fastar.errors import FastarError

# Settings that say how or where work is done, or what is measured afterwards: a run may go on with others.
FREE_KEYS = ("dataset.root", "dataset.directory", "device", "workers", "evaluation.")


class RunFolder:
    """A folder that holds one run: `config.yaml`, `sources/`, `heldout/`, `star.safetensors`, `log.jsonl`, results."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def star(self) -> Path:
        return self.path / "star.safetensors"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def picture(self) -> Path:
        return self.path / "barrier.png"

    @property
    def log_file(self) -> Path:
        return self.path / "log.jsonl"

    def model(self, kind: str, index: int) -> Path:
        """File of source or heldout number `index`."""
        folder = {"source": "sources", "heldout": "heldout"}[kind]
        return self.path / folder / f"seed-{index:04d}.safetensors"

    @contextmanager
    def open(self, settings: Settings) -> Iterator[RunFolder]:
        """Create the folder or go on with it, and keep other processes out until the block ends.

        Raises:
            FastarError: the folder belongs to another run (the differing settings are named), holds something
                else, cannot be written, or is in use.
        """
        self.check(settings)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise FastarError(f"{self.path}: cannot be used as run folder ({error.strerror})") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process dies
            except OSError as error:
                raise FastarError(f"{self.path}: in use by another fastar; wait for it or choose --out") from error
            write_atomically(self.config, settings.to_yaml().encode())
            yield self
        finally:
            os.close(handle)

    def check(self, settings: Settings) -> None:
        """Raise FastarError unless the folder is empty, missing, or a run with these settings; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise FastarError(f"{self.path}: is a file; choose a folder for --out")
        if not self.config.is_file():
            foreign = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
            if foreign:
                raise FastarError(f"{self.path}: holds {foreign[0]} but is no run folder; choose another --out")
            return
        old = self.saved_settings()
        changed = differences(old, settings.model_dump(mode="json"))
        fixed = {k: v for k, v in changed.items() if not k.startswith(FREE_KEYS) and not self._may_grow(k, v)}
        if fixed:
            shown = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in list(fixed.items())[:4])
            raise FastarError(f"{self.path}: holds another run ({shown}); choose another --out or the same settings")

    def _may_grow(self, key: str, change: tuple[Any, Any]) -> bool:
        """More heldouts can always be added; sources and star settings may change while there is no star yet."""
        was, now = change
        if key == "sources.heldout":
            return bool(now >= was)
        return key.startswith(("sources.", "star.", "matching.")) and not self.star.exists()

    def saved_settings(self) -> dict[str, Any]:
        """The settings the folder was made with, nested.

        Raises:
            FastarError: no readable `config.yaml`.
        """
        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except OSError as error:
            raise FastarError(f"{self.path}: is no run folder (config.yaml: {error.strerror})") from error
        except yaml.YAMLError as error:
            raise FastarError(f"{self.config}: not valid YAML; restore it or choose another --out") from error
        return dict(content)

    def log(self, **entry: Any) -> None:
        """Append one line to `log.jsonl`."""
        line = json.dumps(entry) + "\n"
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(line)

    def read_log(self) -> list[dict[str, Any]]:
        """All complete lines of `log.jsonl` (a line cut by a kill is left out)."""
        entries = []
        if self.log_file.is_file():
            for line in self.log_file.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):
                    entries.append(json.loads(line))
        return entries

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write `results.json`, atomically and unrounded."""
        write_atomically(self.results, (json.dumps(results, indent=1) + "\n").encode())

    def read_results(self) -> dict[str, Any]:
        """What `results.json` holds.

        Raises:
            FastarError: missing or damaged.
        """
        try:
            return dict(json.loads(self.results.read_text(encoding="utf-8")))
        except OSError as error:
            what = f"{self.results}: no results ({error.strerror}); run `fastar train-star` first"
            raise FastarError(what) from error
        except ValueError as error:
            raise FastarError(f"{self.results}: not valid JSON ({error}); run the same command again") from error


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of fastar (with its commit, where known) and of the packages that results depend on."""
    found = {"fastar": __version__, "commit": commit(), "python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "ffcv", "lapjv", "triton", "numba"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@lru_cache(maxsize=1)
def commit() -> str:
    """The checkout's commit, with `+changes` if it is not clean; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode != 0 or tracked.returncode != 0:  # a checkout of something else around an installed fastar
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def command_line() -> str:
    """The command that is running, for the log."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
