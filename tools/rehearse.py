"""Run a command with a simulated GPU, to rehearse what needs one on a machine without.

    python tools/rehearse.py [COMMAND...]        default: python -m pytest -m gpu

The device (tests/simulated_cuda/) is the host's memory under another name: it shows whether GPU code is right
(devices, streams, graphs, waits, memory), and nothing of its speed. All processes that COMMAND starts have it. The
plain-torch kernels are used unless FASTAR_KERNELS says otherwise; FASTAR_KERNELS=auto interprets the Triton ones,
outside of graphs. FASTAR_REHEARSAL_COUNTS=1 prints launches and waits. Needs a C++ compiler and a CPU build of torch;
the device is built once (half a minute).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "simulated_cuda"
SOURCE = HERE / "simulated_cuda.cpp"


def build() -> Path:
    """The simulated device as a shared library, made anew for another torch or source."""
    compiler = os.environ.get("CXX", "c++")
    if torch.version.cuda is not None:
        raise SystemExit("rehearse: this torch is a CUDA build: run on its GPU, or rehearse with a CPU build")
    if shutil.which(compiler) is None:
        raise SystemExit(f"rehearse: no C++ compiler ({compiler}); install one or set CXX=")
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    built = ROOT / "build" / f"simulated_cuda-{digest}.so"
    if built.exists():
        return built
    built.parent.mkdir(exist_ok=True)
    libraries = cpp_extension.library_paths()
    print("rehearse: building the simulated GPU", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=built.parent) as work:
        made = Path(work) / built.name
        options = ["-std=c++20", "-O1", "-fPIC", "-shared"]
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        link = [f"-L{path}" for path in libraries] + [f"-Wl,-rpath,{path}" for path in libraries]
        command = [compiler, *options, *include, str(SOURCE), "-o", str(made), *link, "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"rehearse: the simulated GPU could not be built:\n{done.stderr[-4000:]}")
        os.replace(made, built)
    return built


def main() -> None:
    command = sys.argv[1:]
    if command[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    environment = dict(os.environ, FASTAR_SIMULATED_CUDA=str(build()))
    environment.setdefault("FASTAR_KERNELS", "reference")
    environment.setdefault("TRITON_INTERPRET", "1")
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    # Commands of this Python's environment come first, as if it were activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = command or ["python", "-m", "pytest", "-m", "gpu"]
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise SystemExit(f"rehearse: {command[0]}: {error.strerror}") from error


if __name__ == "__main__":
    main()
