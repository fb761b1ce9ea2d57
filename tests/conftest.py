"""What every test can count on, however the suite was started."""

import importlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# Modules that the scripts in tools/ share are imported as they import them.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

# A shell without job control starts background commands with SIGINT ignored, and children inherit that: tests of Ctrl-C
# would wait for ever. With Python's own handler set, children get the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Symmetries that were proven are kept for the tests of one run and the commands that they start, not beyond. Workers of
# pytest-xdist have the folder of the process that started them, so that what one of them proved none proves again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="fastar-tests-")
    os.environ["FASTAR_CACHE"] = _cache.name

# Triton reads this when a kernel is defined: without a GPU they are defined here, so that tests which interpret them do
# so whatever ran before them.
if not torch.cuda.is_available():
    asked = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("interpolation", "star_update", "adam"):
        importlib.import_module(f"fastar.kernels.{name}")
    del os.environ["TRITON_INTERPRET"]
    if asked is not None:
        os.environ["TRITON_INTERPRET"] = asked


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the data sets that a module's small runs write."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def options(data: Path) -> list[str]:
    """Command-line options of a small run."""
    from run_cases import SMALL

    return ["--dataset", "digits", "--quiet", f"dataset.directory={data}", *SMALL]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run; not to be changed."""
    from run_cases import small

    from fastar.experiments import train_star

    folder = tmp_path_factory.mktemp("whole") / "run"
    train_star(small(data), folder)
    return folder
