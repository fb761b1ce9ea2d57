"""float32 of evaluation and matching is float32 whatever the process allows, and what it allows is as it was after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from evaluation_cases import data, resnet

import fastar
from fastar.runtime.full_precision import full_precision

BACKENDS = torch.backends
PLACES = {
    "matmul on a GPU": BACKENDS.cuda.matmul,
    "convolution on a GPU": BACKENDS.cudnn.conv,
    "recurrence on a GPU": BACKENDS.cudnn.rnn,
    "matmul on a CPU": BACKENDS.mkldnn.matmul,
    "convolution on a CPU": BACKENDS.mkldnn.conv,
    "recurrence on a CPU": BACKENDS.mkldnn.rnn,
}


def allowed() -> dict[str, str]:
    return {name: place.fp32_precision for name, place in PLACES.items()}


@pytest.fixture(autouse=True)
def as_torch_begins() -> Iterator[None]:
    before = allowed()
    assert torch.get_float32_matmul_precision() == "highest"
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.fp32_precision = "none"  # type: ignore[attr-defined]
    for name, place in PLACES.items():
        place.fp32_precision = before[name]
    assert allowed() == before
    assert BACKENDS.cudnn.allow_tf32


SETTINGS = [
    *(("nothing", "tf32"), ("all", "tf32")),
    *(
        (name, precision)
        for name in PLACES
        for precision in ("tf32", "bf16")
        if (precision, name[-3:]) != ("bf16", "GPU")
    ),
]


@pytest.mark.parametrize(("name", "precision"), SETTINGS)
def test_newer_settings(name: str, precision: str) -> None:
    if name == "all":
        BACKENDS.fp32_precision = precision  # type: ignore[attr-defined]
    elif name != "nothing":
        PLACES[name].fp32_precision = precision
    before = allowed()
    assert (precision in before.values()) or name == "nothing"
    with full_precision():
        assert set(allowed().values()) == {"ieee"}
    assert allowed() == before
    BACKENDS.fp32_precision = "none"  # type: ignore[attr-defined]
    if name == "all":  # what was followed is followed still
        assert "tf32" not in {value for key, value in allowed().items() if key.startswith("matmul")}


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_older_settings(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = allowed()
    assert before["matmul on a GPU"] == "tf32"
    with full_precision():
        assert set(allowed().values()) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "highest"  # neither kind contradicts the other
        assert not BACKENDS.cudnn.allow_tf32
    assert allowed() == before
    assert torch.get_float32_matmul_precision() == precision
    assert BACKENDS.cudnn.allow_tf32


def test_an_error_leaves_all_as_it_was() -> None:
    before = allowed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with suppress(OSError), full_precision():
            assert not torch.is_autocast_enabled("cpu")
            raise OSError
        assert torch.is_autocast_enabled("cpu")
    assert allowed() == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_networks_are_matched_and_measured_whatever_is_allowed() -> None:
    """Torch makes an error of asking for older settings where newer ones say otherwise."""
    a, b = (resnet(seed) for seed in (1, 2))
    batches = list(data()())

    def found() -> tuple[list[list[int]], list[float]]:
        matched = fastar.match(a, b, example_inputs=torch.zeros(1, 3, 8, 8))
        return [index.tolist() for index in matched.values()], fastar.barrier(a, b, batches, points=3).loss

    wanted = found()
    PLACES["matmul on a GPU"].fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        torch.get_float32_matmul_precision()
    assert found() == wanted
