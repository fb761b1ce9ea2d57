"""What is said of models that cannot be traced: one line, what and where, and nothing of torch's before it."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fastar.errors import FastarError
from fastar.symmetry import derive_symmetry
from fastar.symmetry.trace import trace

X = (torch.zeros(2, 6),)


class Net(nn.Module):
    """Two linear layers, and what is done between them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.between(self.hidden(x)))

    def between(self, x: Tensor) -> Tensor:
        return x.relu()


class Branches(Net):
    def between(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Sizes(Net):
    def between(self, x: Tensor) -> Tensor:
        return x[torch.nonzero(x[:, 0] > 0)[:, 0]]


class Numpy(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy())


class Loud(Net):
    def between(self, x: Tensor) -> Tensor:
        print("pages of it", file=sys.stderr)
        raise KeyError("what is missing\nand more")


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).abs()


class Parametrised(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.hidden, "weight", Spectrum())


class Old(Net):
    """Its weight is no leaf: torch refuses to copy it."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(self.hidden)


HERE = r"\(.*test_symmetry_tracing\.py:\d+, in between\)"
RUNS = r"^cannot trace {}: it does not run on the example inputs: .*{}.*; give what its forward takes$"
REFUSALS: list[tuple[nn.Module, Any, str]] = [
    (Net(), (torch.zeros(2, 5),), RUNS.format("Net", "2x5 and 6x7")),
    (Net(), (*X, 1), RUNS.format("Net", "takes 2 positional arguments but 3 were given")),
    (Net(), {"y": X[0]}, RUNS.format("Net", "unexpected keyword argument 'y'")),
    (Loud(), X, RUNS.format("Loud", r"what is missing.*" + HERE)),
    (Branches(), X, f"data-dependent.*{HERE}; its forward must not branch on values.*PermutationSpec$"),
    (Sizes(), (torch.ones(2, 6),), "the size of aten.nonzero.default .node nonzero. depends on values"),
    (Numpy(), X, f"cannot trace Numpy with torch.export.*numpy.*{HERE}; change that part"),
    (Parametrised(), X, "remove the parametrisation first .torch.nn.utils.parametrize.remove_parametrizations."),
    (
        Old(),
        X,
        "Old cannot be copied: module 'hidden' computes its 'weight' .*nn.utils.remove_weight_norm.module, 'weight'.$",
    ),
]


@pytest.mark.parametrize(("model", "inputs", "message"), REFUSALS)
def test_a_refusal_is_one_line_that_says_what_torch_or_the_model_said(
    model: nn.Module, inputs: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    with pytest.raises(FastarError, match=message) as why:
        derive_symmetry(model, inputs)
    assert "\n" not in str(why.value)
    if not isinstance(model, Branches):
        assert "branch on values" not in str(why.value)
    assert capsys.readouterr().err == ""
    assert torch.equal(before, torch.get_rng_state())


def test_a_failed_trace_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11's export does; hooks that were there before stay."""
    mine = hooks.register_module_buffer_registration_hook(lambda module, name, buffer: None)
    try:
        before = dict(hooks._global_buffer_registration_hooks)

        def export(*arguments: Any, **options: Any) -> None:
            hooks.register_module_buffer_registration_hook(lambda module, name, buffer: None)
            raise RuntimeError("no graph")

        with monkeypatch.context() as patch:
            patch.setattr(torch.export, "export", export)
            with pytest.raises(FastarError, match="no graph"):
                trace(Net(), X, "Net")
        assert hooks._global_buffer_registration_hooks == before
        with pytest.raises(FastarError):
            trace(Branches(), X, "Branches")
        assert hooks._global_buffer_registration_hooks == before
    finally:
        mine.remove()


def test_after_the_parametrisation_is_removed_the_groups_are_found() -> None:
    model = Parametrised()
    nn.utils.parametrize.remove_parametrizations(model.hidden, "weight")
    assert [g.size for g in derive_symmetry(model, X).groups] == [7]


def test_the_remedies_are_of_python_and_of_the_command_line() -> None:
    class Shown(Net):
        def between(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x).abs()

    with pytest.raises(FastarError, match=r"allow_partial=True, on the command line --allow-partial.*PermutationSpec"):
        derive_symmetry(Shown(), X)


class Listening(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def test_torch_logs_nothing_of_a_failure_and_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = Listening()
    loggers = [logging.getLogger(one) for one in ("torch", "torch._subclasses.fake_tensor")]
    for logger in loggers:
        logger.addHandler(listening)
    try:
        wrong = (torch.zeros(2, 5),)
        with pytest.raises(FastarError):
            trace(Net(), wrong, "Net")
        assert listening.heard == []
        for logger in loggers:
            logger.error("after")
        assert "after" in listening.heard
        listening.heard.clear()
        monkeypatch.setenv("TORCH_LOGS", "+all")  # asked for
        with pytest.raises(FastarError):
            trace(Net(), wrong, "Net")
        assert any("meta" in line for line in listening.heard), "torch says nothing: this test proves nothing"
    finally:
        for logger in loggers:
            logger.removeHandler(listening)
