"""Which path runs and how it says so; and that the Triton kernels compile for CUDA, which needs no GPU to find out."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from fastar.kernels import backend, dispatch, interpolate
from triton.errors import TritonError

from fastar.runtime.device import simulated


@pytest.fixture(autouse=True)
def _forget_earlier_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTAR_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def test_a_cpu_takes_the_reference_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    theta, t = torch.zeros(3), torch.tensor(0.5)
    with caplog.at_level(logging.INFO, logger="fastar.kernels"):
        for _ in range(3):
            interpolate(theta, theta, t, theta)
    assert backend(torch.device("cpu")) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "kernels on cpu: reference (the Triton kernels are for CUDA)"
    ]


@pytest.mark.parametrize(
    ("setting", "interpret", "expected"),
    [
        ("reference", "1", "reference"),
        ("triton", "1", "triton"),
        ("auto", "1", "reference"),
        ("auto", "0", "reference"),
    ],
)
def test_the_environment_forces_a_path(
    monkeypatch: pytest.MonkeyPatch, setting: str, interpret: str, expected: str
) -> None:
    if torch.cuda.is_available() and setting == "triton":
        pytest.skip("the kernels are compiled in this process: run with CUDA_VISIBLE_DEVICES= to interpret them")
    monkeypatch.setenv("FASTAR_KERNELS", setting)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert backend("cpu") == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [("triton", "FASTAR_KERNELS=triton on cpu: .*TRITON_INTERPRET=1"), ("fast", "FASTAR_KERNELS=fast: no such")],
)
def test_a_path_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str, message: str) -> None:
    monkeypatch.setenv("FASTAR_KERNELS", setting)
    with pytest.raises(ValueError, match=message) as caught:
        backend("cpu")
    assert "\n" not in str(caught.value)


def test_cuda_without_triton_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fastar.kernels.interpolation", None)  # importing it raises ImportError
    with caplog.at_level(logging.INFO, logger="fastar.kernels"):
        assert [backend("cuda"), backend("cuda:1")] == ["reference", "reference"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Triton cannot be imported" in record.getMessage()
    monkeypatch.setenv("FASTAR_KERNELS", "triton")
    with pytest.raises(ValueError, match="install a working Triton"):
        backend("cuda")


class Driverless(TritonError):
    pass


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, OSError, Driverless])  # all seen of Triton
def test_a_launch_that_fails_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    def launch(*_: object) -> None:
        raise error("libcuda.so cannot found!\nrun ldconfig")

    monkeypatch.setattr("triton.runtime.jit.KernelInterface.__getitem__", launch)
    monkeypatch.setattr(torch, "ones", lambda size, device, dtype: torch.zeros(size))  # no GPU here to make it on
    with caplog.at_level(logging.INFO, logger="fastar.kernels"):
        assert backend("cuda") == "reference"
    (record,) = caplog.records
    assert "a trial Triton launch failed (libcuda.so cannot found! run ldconfig)" in record.getMessage()


@pytest.mark.gpu
def test_cuda_takes_triton() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if simulated():
        pytest.skip("no Triton kernel can be compiled for a simulated GPU")
    assert backend("cuda") == "triton"


def in_fresh_python(code: str) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTAR_KERNELS")
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=environment
    ).stdout


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import fastar.kernels as k; v = torch.zeros(2);"
        "k.interpolate(v, v, torch.tensor(0.), v); print(before, 'triton' in sys.modules)"
    )
    before, after = in_fresh_python(code).split()
    assert before == after


COMPILE = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastar.kernels.adam import _adam_update_kernel
from fastar.kernels.interpolation import _interpolate_kernel
from fastar.kernels.star_update import _sgd_update_kernel

def ptx(kernel, types, constants, capability, aligned=True):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    # As at launch: buffers start, and their lengths are, multiples of 16.
    wide = [i for i, name in enumerate(names) if aligned and signature[name] in ("i32", "*fp32", "*bf16")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in wide})
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

floats = ("weight_decay", "momentum", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "log_beta1",
          "log_beta2", "eps")
types = {"gradient_ptr": "*bf16", "out_ptr": "*bf16", "numel": "i32", **dict.fromkeys(floats, "fp32")}
found = {}
for capability in (80, 90):
    found[f"interpolate {capability}"] = ptx(_interpolate_kernel, types, {"BLOCK": 1024}, capability)
    for guarded in (False, True):
        also = {"GUARDED": guarded, "BLOCK": 1024}
        constants = {"MOMENTUM": True, "NESTEROV": True, **also}
        found[f"sgd_update {guarded} {capability}"] = ptx(_sgd_update_kernel, types, constants, capability)
        constants = {"DECOUPLED": guarded, **also}
        found[f"adam_update {guarded} {capability}"] = ptx(_adam_update_kernel, types, constants, capability)
# Triton turns an integer argument of 1 into a constant, and unaligned buffers get narrow accesses: both must compile.
types = {**types, "gradient_ptr": "*fp16", "source_ptr": "*bf16", "out_ptr": "*fp16"}
single = {"numel": 1, "BLOCK": 1024}
ptx(_interpolate_kernel, types, single, 80, aligned=False)
single = {**single, "GUARDED": True}
ptx(_sgd_update_kernel, types, {**single, "MOMENTUM": False, "NESTEROV": False}, 80, aligned=False)
ptx(_adam_update_kernel, types, {**single, "DECOUPLED": False}, 80, aligned=False)
print(json.dumps(found))
"""


def test_the_kernels_compile_for_cuda_with_wide_accesses() -> None:
    """Compiled for sm_80 and sm_90: every access to a buffer moves 16 bytes (8 of bf16 beside fp32 at the least)."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    compiled = json.loads(in_fresh_python(COMPILE))
    assert len(compiled) == 2 * (1 + 4)
    for name, ptx in compiled.items():
        accesses = [line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line]
        buffers = [line for line in accesses if line.lstrip().startswith("@")]  # masked: the 0-d tensors are not
        assert len(buffers) >= 4, name
        assert all(".v4.b32" in line or ".v2.b32" in line for line in buffers), name


def test_no_module_takes_the_name_of_an_operation() -> None:
    """Importing a module sets it as an attribute of its package: in place of the operation, once a kernel has run."""
    code = (
        "import pkgutil, importlib, fastar.kernels as k;"
        "[importlib.import_module(f'fastar.kernels.{m.name}') for m in pkgutil.iter_modules(k.__path__)];"
        "print([n for n in k.__all__ if type(getattr(k, n)).__name__ == 'module'])"
    )
    assert in_fresh_python(code).strip() == "[]"
