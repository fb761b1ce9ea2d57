"""Rooms import one way: each only rooms before it, wherever in a file the import stands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
ROOMS = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
LEVEL = {room: level for level, room in enumerate(ROOMS)}
FORBIDDEN = {("data", "models"), ("report", "experiments"), ("report", "evaluation"), ("runs", "models")}


def modules() -> dict[Path, str]:
    """Every module and its room."""
    found = {path: "kernels" for path in (ROOT / "kernels").rglob("*.py")}
    for path in (ROOT / "fastar").rglob("*.py"):
        room = path.relative_to(ROOT / "fastar").parts[0].removesuffix(".py")
        if room != "__init__":
            found[path] = room
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that `path` imports, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent == ROOT / "kernels":  # its own folder, whatever it is called
                continue
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports(path)]
    return {p[1] for p in parts if p[0] == "fastar" and len(p) > 1 and p[1] != "__version__"}


def test_every_module_is_in_a_known_room() -> None:
    assert set(modules().values()) == set(LEVEL)


def test_rooms_import_only_rooms_before_them() -> None:
    wrong = []
    for path, room in modules().items():
        for other in rooms_imported(path) - {room}:
            if LEVEL[other] >= LEVEL[room] or (room, other) in FORBIDDEN:
                wrong.append(f"{path.relative_to(ROOT)} imports fastar.{other}")
    assert wrong == []


def test_kernels_know_no_other_room() -> None:
    assert {other for path, room in modules().items() if room == "kernels" for other in rooms_imported(path)} <= {
        "kernels"
    }


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        *(("ffcv", {"data"}), ("matplotlib", {"report"}), ("ray", {"launch"}), ("submitit", {"launch"})),
        *(("typer", {"cli"}), ("tools", set())),
    ],
)
def test_only_these_rooms_import(package: str, rooms: set[str]) -> None:
    assert {room for path, room in modules().items() if package in {n.split(".")[0] for n in imports(path)}} == rooms


@pytest.mark.parametrize(
    "code",
    [
        "import fastar.config; fastar.config.load_settings(dataset='digits')",
        "import fastar.cli.main; fastar.cli.main.main(['--help'])",
        "import fastar.cli.main; fastar.cli.main.main(['train-star', '--help'])",
        "import fastar.cli.main; fastar.cli.main.main(['train-star', '--dataset', 'digits', 'train.lrr=1'])",
        "import fastar.runs, fastar.experiments.reuse, fastar.report.results, fastar.report.page",
        "import fastar.cli.main; fastar.cli.main.main(['configs'])",
        "import fastar.cli.main; fastar.cli.main.main(['verify', '--help'])",
        "import fastar.cli.main; fastar.cli.main.main(['reproduce', '--list'])",
    ],
)
def test_settings_and_help_do_not_wait_for_torch(code: str) -> None:
    heavy = (
        "torch",
        "numba",
        "numpy",
        "matplotlib",
        "scipy",
        *(["pydantic", "yaml"] if "(['--help'])" in code else []),
    )
    check = f"import sys, atexit; atexit.register(lambda: print([one for one in {heavy} if one in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", f"{check}; {code}"], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in result.stderr
    assert result.returncode == (2 if "lrr" in code else 0)
    assert result.stdout.splitlines()[-1] == "[]"


# File names of two rooms, where both are the same part of theirs.
SAME_PART = {
    "adam.py": "the kernel, and the optimizer over it",
    "certificate.py": "of networks that are near, and of a symmetry that is complete",
    "checks.py": "checks before kernels, and before matching",
    "folder.py": "of a run, and of a data set's .beton files",
    "layers.py": "of networks, and of their rules",
    "match.py": "matching, and its commands",
    "theory.py": "the paper's theory: its experiments, its tables, its command",
    "star.py": "the star's training, and its part of a run",
}
# Lines of statements that are read at once.
LONG = 60


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}


def test_folders_of_more_than_a_dozen_modules_have_folders() -> None:
    found = Counter(path.parent for path in modules() if path.name != "__init__.py")
    flat = {folder for folder in found if not any(other.parent == folder for other in found)}
    assert {str(folder.relative_to(ROOT)): found[folder] for folder in flat if found[folder] > 12} == {}


def test_no_file_name_stands_twice_but_of_the_same_part() -> None:
    names = Counter(path.name for path in modules() if path.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} <= set(SAME_PART)


def test_long_functions_say_why() -> None:
    """The statements of a function take no more than 60 lines, or its docstring says that it is long, and why."""
    silent = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                text = ast.get_docstring(node)
                first = node.body[0 if text is None else min(1, len(node.body) - 1)].lineno
                if (node.end_lineno or 0) - first >= LONG and "long" not in (text or "").lower():
                    silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert silent == []
