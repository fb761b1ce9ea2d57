"""fastar as people install it who have no compiler: the wheel, what it asks for, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from run_cases import SMALL, assert_same_models, small

from fastar.experiments import train_star

ROOT = Path(__file__).resolve().parent.parent
MISSING = {"lapjv", "triton"}
"""Of what the wheel asks for: packages without a wheel on some systems."""

PROGRAM = """
import fastar
import torch
from torch import nn

a, b = (nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)) for _ in "ab")
data = [(torch.randn(64, 8), torch.randint(4, (64,))) for _ in range(2)]
matched = fastar.match(a, b, example_inputs=torch.zeros(1, 8))
many = fastar.match_many([a, b], example_inputs=torch.zeros(1, 8))
before, after = fastar.barrier(a, b, data), fastar.barrier(a, fastar.apply(matched, b), data)
print(fastar.__file__, before.value, after.value)
"""
NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
"""
DATA = """
import torch

train, test = ((torch.randn(n, 8), torch.randint(4, (n,))) for n in (256, 64))
"""
# Another system, as far as modules can tell when they are imported: no Unix modules, signals and calls.
ELSEWHERE = """
import importlib, json, os, pkgutil, signal, sys
import filelock, matplotlib.figure, numpy, psutil, scipy.optimize, sklearn.datasets, tensorboardX, torch, typer
import fastar

sys.modules |= dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios"))
for name in ("SIGHUP", "SIGQUIT", "SIGTSTP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
for name in ("fork", "getuid", "posix_fadvise", "pread", "preadv", "sched_getaffinity", "sysconf"):
    delattr(os, name)
failed = {}
for module in pkgutil.walk_packages(fastar.__path__, "fastar.", onerror=lambda name: None):
    if module.name != "fastar.__main__":
        try:
            importlib.import_module(module.name)
        except Exception as error:
            failed[module.name] = str(error)
from fastar.runtime.signals import signals_stop
with signals_stop():
    print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("fastar", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    alone = ("--no-deps", "--no-build-isolation", "--no-index")
    pip("wheel", "-q", *alone, "-w", str(source / "wheels"), str(source))
    (found,) = (source / "wheels").iterdir()
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and links to what it asks for but lapjv and Triton."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", symlinks=True)
    links = folder / "links"
    links.mkdir()
    for distribution in needed(wheel):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(distribution.locate_file(top))
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    found = folder / "venv" / "bin" / "python"
    pip("--python", str(found), "install", "-q", "--no-deps", "--no-index", str(wheel))
    return found


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(archive.read(name).decode())
    assert found["Requires-Python"] == ">=3.10"
    said = " ".join(found.get_all("Classifier", []))
    assert all(word in said for word in ("3.10", "3.11", "3.12", "3.13", "Linux", "MacOS", "Windows"))
    return [Requirement(line) for line in found.get_all("Requires-Dist", [])]


def asked(found: list[Requirement], **environment: str) -> set[str]:
    """Names of those that hold on a system, without extras."""
    here = {**default_environment(), **environment, "extra": ""}
    return {canonicalize_name(one.name) for one in found if one.marker is None or one.marker.evaluate(here)}


def needed(wheel: Path) -> Iterator[metadata.Distribution]:
    """What is installed here of what the wheel asks for, and of what that asks for."""
    waiting, seen = sorted(asked(requirements(wheel))), set(MISSING)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            distribution = metadata.distribution(name)
            waiting += asked([Requirement(line) for line in distribution.requires or ()])
            yield distribution


def run(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_asks_for_packages_with_wheels_alone(wheel: Path) -> None:
    found = requirements(wheel)
    linux = {"platform_system": "Linux", "platform_machine": "x86_64", "sys_platform": "linux"}
    mac = {"platform_system": "Darwin", "platform_machine": "arm64", "sys_platform": "darwin"}
    windows = {"platform_system": "Windows", "platform_machine": "AMD64", "sys_platform": "win32"}
    for system in (linux, mac, windows):
        for version in ("3.10", "3.11", "3.12", "3.13"):
            names = asked(found, python_version=version, **system)
            assert not names & {"ffcv", "opencv-python", "setuptools"}
            assert {
                "filelock",
                "numpy",
                "psutil",
                "pydantic",
                "pyyaml",
                "rich",
                "safetensors",
                "scipy",
                "torch",
            } <= names
            assert ("triton" in names) == (system is linux)
            assert ("lapjv" in names) == (system is not mac and version < "3.12")
    assert any(one.name == "ffcv" and "ffcv" in str(one.marker) for one in found)


def test_the_wheel_has_the_files_that_are_no_modules(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"fastar/py.typed", "fastar/report/page/page.css", "fastar/report/page/page.js"} <= names
    assert "fastar/configs/digits-mlp.yaml" in names


@pytest.mark.slow
def test_it_runs_without_ffcv(python: Path, tmp_path: Path) -> None:
    found = run(python, "-c", PROGRAM, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    place = Path(found.stdout.split()[0]).parent
    assert place.is_relative_to(python.parent.parent)
    assert (place / "py.typed").is_file()
    command = str(python.parent / "fastar")
    assert "train-star" in run(Path(command), "--help", folder=tmp_path).stdout
    found = run(Path(command), "doctor", "--json", folder=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    checks = {check["name"]: check for check in json.loads(found.stdout)}
    for name in ("lapjv", "triton"):
        assert "stands in" in checks[name]["text"]
    assert "pip install 'fastar[ffcv]'" in checks["ffcv"]["text"]
    assert not checks["ffcv"]["ok"]
    assert checks["assignment"]["text"].startswith("scipy")


def test_the_ten_lines_of_the_readme_run_without_ffcv(python: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = [block for block in blocks if "fastar.train_star(" in block]
    for name, fewer in (("epochs=50", "epochs=1"), ("number=20", "number=2"), ("number=3", "number=1")):
        assert name in lines
        lines = lines.replace(name, fewer)
    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "mydata.py").write_text(DATA)
    found = run(python, "-c", f"{lines}print(run, run.star.path)", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    barrier, said = found.stdout.splitlines()
    assert float(barrier) >= 0
    assert "2 sources, 1 heldouts, a star" in said


@pytest.mark.slow
def test_digits_without_ffcv_are_the_same_to_the_bit(python: Path, data: Path, tmp_path: Path) -> None:
    train_star(small(data, "matching.solver=scipy"), tmp_path / "with")
    options = ("train-star", "--dataset", "digits", "--out", "without", *SMALL, "matching.solver=scipy")
    found = run(python.parent / "fastar", *options, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "since FFCV is not installed" in found.stderr
    assert_same_models(tmp_path / "without", tmp_path / "with")
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("without", "with"))
    assert one["measured"] == other["measured"]
    # Models of one go with those of the other.
    star, source = "with/star.safetensors", "without/sources/seed-0000.safetensors"
    found = run(python.parent / "fastar", "barrier", star, source, "device=cpu", folder=tmp_path)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_what_needs_ffcv_says_how_to_get_it(python: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    options = ("--dataset", "imagenet", "--data-root", "images", "--out", "run")
    found = run(python.parent / "fastar", "train-star", *options, folder=tmp_path)
    assert found.returncode == 2
    line = found.stderr.splitlines()[-1]  # torch's builds for CUDA warn before that Triton is missing
    assert "need FFCV" in line
    assert "pip install 'fastar[ffcv]'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_modules_are_imported_on_other_systems(python: Path, tmp_path: Path) -> None:
    """All but those that need FFCV or Triton, which say so."""
    found = run(python, "-c", ELSEWHERE, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    failed = json.loads(found.stdout)
    assert {name for name, text in failed.items() if "FFCV" not in text and "triton" not in text} == set()
    assert "pip install 'fastar[ffcv]'" in failed["fastar.data.ffcv"]
    assert {name for name in failed if not name.startswith("fastar.kernels.")} == {
        "fastar.data.convert",
        "fastar.data.ffcv",
        "fastar.data.streaming",
    }
