"""Networks named as module:function: found, called, and every way in which that can be wrong, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from network_cases import own_model
from torch import nn

from fastar.errors import FastarError

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

def build():
    return Net()
def with_example():
    return Net(), torch.zeros(2, 6)
def with_keywords():
    return Net(), {"x": torch.zeros(2, 6)}
def with_text():
    return Net(), "inputs"
def number():
    return 3
def broken():
    raise ValueError("no weights\\nhere")
constant = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder; its name."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"{name}_wrong.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return name


def test_networks_and_their_example_inputs(here: str) -> None:
    model, example = own_model(f"{here}:build", "2x6")
    assert isinstance(model, nn.Module)
    assert torch.equal(example, torch.zeros(2, 6))
    assert own_model(f"{here}:with_example")[1].shape == (2, 6)
    assert own_model(f"{here}:with_example", "3,6")[1].shape == (3, 6)
    assert set(own_model(f"{here}:with_keywords")[1]) == {"x"}


@pytest.mark.parametrize(
    ("reference", "shape", "says"),
    [
        ("build", None, "write module:function"),
        (":build", None, "write module:function"),
        ("{}:bild", None, "did you mean build"),
        ("{}:build", None, "give --input-shape"),
        ("{}:build", "2xsix", "lengths joined by x"),
        ("{}:build", "0x6", "lengths joined by x"),
        ("{}:with_text", None, "must be a tensor"),
        ("{}:number", "2x6", "returned int"),
        ("{}:broken", "2x6", "ValueError: no weights here"),
        ("{}:constant", "2x6", "not a function"),
        ("{}_missing:build", "2x6", "cannot import"),
        ("{}_wrong:build", "2x6", "SyntaxError"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here: str, reference: str, shape: str | None, says: str) -> None:
    with pytest.raises(FastarError) as refused:
        own_model(reference.format(here), shape)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert reference.format(here) in str(refused.value) or "--input-shape" in str(refused.value)
