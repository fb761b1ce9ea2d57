"""Checks of an installation, for `fastar doctor`: each part that fastar needs, ok or what to do."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil


@dataclass(frozen=True)
class Check:
    """One line of the report. `needed`: fastar cannot do its main job without it."""

    name: str
    ok: bool
    text: str
    needed: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL' if self.needed else 'note'} {self.name}: {self.text}"


Part = tuple[str, Callable[[], str], bool]
"""A part's name, its check (which says what is there, or raises what is wrong), and whether fastar needs it."""


def examine(parts: Iterable[Part] | None = None) -> list[Check]:
    """Try every part for real (a tiny kernel, a tiny assignment, a tiny .beton file) and say how it went."""
    checks = []
    for name, part, needed in PARTS if parts is None else parts:
        try:
            checks.append(Check(name, True, part(), needed))
        except Exception as error:  # noqa: BLE001 (a broken installation fails in any way; each is reported)
            reason = " ".join(str(error).split()) or type(error).__name__
            checks.append(Check(name, False, reason, needed))
    return checks


def _python() -> str:
    return f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"


def _torch() -> str:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise RuntimeError(
                "none used: torch is a CPU build; with an NVIDIA driver, `make clean install` gets CUDA's"
            )
        raise RuntimeError("none found: check `nvidia-smi`")
    free, total = torch.cuda.mem_get_info()
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: set train.precision=fp16"
    return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {bf16}"


def _bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """bf16 on the CPU, by the instructions of x86 or ARM; a GPU's is said with the GPU."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    found = [name for name in ("avx512_bf16", "amx_bf16", "bf16", "svebf16") if name in flags]
    if found:
        return (
            f"this CPU computes in it ({', '.join(found)}): train.precision=bf16 can halve a convolutional step on it"
        )
    return "this CPU has none of its own: train.precision=bf16 is emulated on it, and slower than fp32"


def _kernels() -> str:
    import torch

    from fastar.kernels import backend, interpolate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theta = torch.tensor([1.0, 2.0], device=device, dtype=torch.float32)
    source = torch.tensor([3.0, -2.0], device=device, dtype=torch.float32)
    out = interpolate(theta, source, torch.tensor(0.25, device=device, dtype=torch.float32), torch.empty_like(theta))
    if out.tolist() != [1.5, 1.0]:
        raise RuntimeError(
            f"the interpolation kernel gives {out.tolist()} for [1.5, 1.0]; set FASTAR_KERNELS=reference"
        )
    path = backend(device)
    why = {"triton": "fused Triton kernels", "reference": "plain torch"}[path]
    return f"{path} ({why}) on {device.type}"


def _assignment() -> str:
    from fastar.matching import solve_assignment, solver_name

    found = solve_assignment(np.array([[1.0, 5.0], [5.0, 2.0]])).tolist()
    if found != [1, 0]:
        raise RuntimeError(f"the assignment solver gives {found} for [1, 0]; set matching.solver=scipy")
    return solver_name()


def _lapjv() -> str:
    try:
        return metadata.version("lapjv")
    except metadata.PackageNotFoundError as error:
        raise RuntimeError("not installed: SciPy's slower solver stands in; pip install lapjv (needs g++)") from error


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError as error:
        text = "not installed: plain torch stands in, slower on a GPU; pip install triton (for Linux alone)"
        raise RuntimeError(text) from error


def _data() -> str:
    from fastar.config import DATASETS
    from fastar.data.raw.digits import read_digits

    raw = read_digits(DATASETS["digits"])
    return f"{len(raw.train) + len(raw.test)} digits read; {len(DATASETS)} datasets known"


def _ffcv() -> str:
    if find_spec("ffcv") is None:
        raise RuntimeError(
            "not installed: images of one size are read from their raw files, with the same results; images of any "
            "size (ImageNet, folders) need it: `make install` in a checkout, or `pip install 'fastar[ffcv]'` where it "
            "can be compiled (docs/install.md)"
        )
    from fastar.data.convert import prepare
    from fastar.data.in_memory import load

    version = metadata.version("ffcv")
    with tempfile.TemporaryDirectory() as folder:
        files = prepare("digits", directory=Path(folder), workers=1)
        images = sum(len(load(files, split, "cpu")) for split in ("train", "test"))
        return f"{version}, wrote and read {images} images"


def _torchvision() -> str:
    """fastar does not need it; networks of users' own do."""
    try:
        import torchvision
    except ModuleNotFoundError:
        return "not installed, and not needed"
    except Exception as error:  # of another build, it fails in any way
        raise RuntimeError(
            f"is of another build than torch {metadata.version('torch')} ({error}): networks of yours that use it will "
            "not load; install the one that goes with it, of the same ending (such as +cpu), from where torch came"
        ) from error
    return str(torchvision.__version__)


def _memory() -> str:
    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB"


PARTS: tuple[Part, ...] = (
    ("python", _python, True),
    ("torch", _torch, True),
    ("gpu", _gpu, False),
    ("bf16", _bf16, False),
    ("kernels", _kernels, True),
    ("assignment", _assignment, True),
    ("lapjv", _lapjv, False),
    ("triton", _triton, False),
    ("data", _data, True),
    ("ffcv", _ffcv, find_spec("ffcv") is not None),
    ("torchvision", _torchvision, False),
    ("memory", _memory, False),
)
