"""tools/gpu_suite.py and what a checkout that nobody has installed can do: it is how a GPU without network is used."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastar._version import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_suite", ROOT / "tools" / "gpu_suite.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_suite"] = module  # its dataclass looks for it
    path = list(sys.path)
    specification.loader.exec_module(module)
    sys.path[:] = path
    return module


def part(suite: ModuleType, code: str, limit: float = 60) -> dict[str, object]:
    """What the suite records of a part that runs `code`."""
    arguments = ("-c", code)
    result: dict[str, object] = suite.run_part(suite.Part("a part", 1, arguments, limit, arguments), arguments, limit)
    return result


@pytest.mark.parametrize("given", ["", f"{os.sep}elsewhere"])
def test_parts_import_the_suites_own_checkout_first(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", given)
    result = part(suite, 'import json, os; print(json.dumps({"path": os.environ["PYTHONPATH"]}))')
    assert result["lines"] == [{"path": os.pathsep.join([str(ROOT), *filter(None, [given])])}]
    assert result["exit_code"] == 0


def test_a_part_that_fails_is_recorded_with_what_it_said(suite: ModuleType) -> None:
    result = part(suite, "print('{\"ms\": 1}'); raise SystemExit('no memory left')")
    assert (result["exit_code"], result["lines"]) == (1, [{"ms": 1}])
    assert str(result["end_of_output"]).endswith("no memory left")


def test_a_part_out_of_time_keeps_its_lines(suite: ModuleType) -> None:
    """2 s: enough for Python to begin, and the part never ends by itself."""
    code = "import time; print('{\"ms\": 1}', flush=True); time.sleep(600)"
    result = part(suite, code, limit=2)
    assert (result["exit_code"], result["stopped_after_seconds"], result["lines"]) == (None, 2, [{"ms": 1}])


def test_the_kernels_of_a_bare_checkout_are_found() -> None:
    """Without site-packages (-S), so that no installed fastar can help; the room itself would import torch."""
    code = (
        "from importlib.util import find_spec as find; import fastar, json, pkgutil;"
        "inside = [one.name for one in pkgutil.iter_modules(fastar.__path__)];"
        "print(json.dumps([find('fastar.kernels').origin, find('fastar.setup'), 'setup' in inside]))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(ROOT / "kernels" / "__init__.py"), None, False]


def test_kernels_of_another_fastar_are_not_taken(tmp_path: Path) -> None:
    """An editable install of another checkout finds its own kernels for whoever asks."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.util import spec_from_file_location\n"
        "class Other:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        return spec_from_file_location(name, '/elsewhere.py') if name == 'fastar.kernels' else None\n"
        "sys.meta_path.append(Other)\n"
    )
    code = "from importlib.util import find_spec; import fastar; print(find_spec('fastar.kernels').origin)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{ROOT / 'kernels' / '__init__.py'}\n", done.stderr


def test_python_m_fastar_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastar", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastar {__version__}\n", "")


def test_results_are_shown_as_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantiles = {"median": 1.04, "q25": 1.02, "q75": 1.0512}
    lines = [
        {"bench": "step", "case": "star", "arch": "resnet18", "batch": 128, "n": 5, "of_regular": quantiles},
        {"bench": "step", "case": "graph", "error": "no luck"},
    ]
    record = {
        "device": "a GPU",
        "date": "2026-01-02",
        "versions": {"torch": "2.13.0", "commit": "abc"},
        "parts": [{"part": "steps", "exit_code": 1, "lines": lines}],
    }
    file = tmp_path / "results.json"
    file.write_text(json.dumps(record))
    tool = str(ROOT / "tools" / "show_results.py")
    monkeypatch.setattr(sys, "argv", [tool, str(file)])
    runpy.run_path(tool, run_name="__main__")
    shown = capsys.readouterr().out
    assert "| step | star | arch resnet18, batch 128 | 5 | of_regular 1.04 (1.02 to 1.05) |" in shown
    assert "| step | graph |  |  | no luck |" in shown
    assert "Failed or not finished: steps." in shown
    file.write_text('{"parts": []}')
    with pytest.raises(SystemExit, match=r"results\.json: not a file of"):
        runpy.run_path(tool, run_name="__main__")
