"""Networks that are trained together: each has the bits, the log and the checkpoints that it has alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import Killed, around_calls, kill, poison
from task_cases import Dropping, Net, recipe, tensors, weighted
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import dataset

from fastar.api.recipe import Recipe
from fastar.config import TrainSettings, load_settings
from fastar.data.dataset import Taken
from fastar.data.user_data import TensorData, UserSplits
from fastar.errors import FastarError
from fastar.experiments.regular import finish_regular, planned, regular_models
from fastar.experiments.session import Session, new_session, opened
from fastar.experiments.together import train_together
from fastar.experiments.user_task import PYTHON, Given
from fastar.losses import find_loss
from fastar.models import build_model
from fastar.runs import RunFolder
from fastar.runs.live_metrics import event_files
from fastar.runs.model_files import load_checkpoint
from fastar.runs.run_log import RunLog
from fastar.runtime.signals import Stopped, signals_stop
from fastar.training import RegularStep, resume
from fastar.training.stacked import StackedStep

MANY = 7


def products_agree(batch: int, inputs: int, outputs: int) -> bool:
    """True where this machine's libraries round a batch of a layer's products, forward and backward, as each alone;
    elsewhere nothing is stacked."""
    x, w, b, g = (torch.randn(9, *size) for size in ((batch, inputs), (outputs, inputs), (outputs,), (batch, outputs)))
    batched = torch.bmm(x, w.transpose(1, 2)) + b[:, None], torch.bmm(g.transpose(1, 2), x), torch.bmm(g, w)
    alone = ((F.linear(x[k], w[k], b[k]), g[k].t() @ x[k], g[k] @ w[k]) for k in range(9))
    return all(
        torch.equal(one[k], other) for k, row in enumerate(alone) for one, other in zip(batched, row, strict=True)
    )


needs_equal_products = pytest.mark.skipif(not products_agree(64, 64, 8), reason="batched products round otherwise here")
# Of the users' networks here, batches of 24.
needs_equal_small_products = pytest.mark.skipif(
    not (products_agree(24, 4, 6) and products_agree(24, 6, 3)), reason="small batched products round otherwise here"
)


def mlp(seed: int, side: int = 8) -> nn.Module:
    return build_model("mlp", input_shape=(1, side, side), classes=10, seed=seed, width=8, depth=2)


@needs_equal_products
@pytest.mark.parametrize("count", [1, 2, MANY])
@pytest.mark.parametrize(
    ("way", "side", "settings"),
    [
        *[(way, 8, {}) for way in (0, 1, 2)],
        (0, 8, {"optimizer": "adamw", "decay_1d": False, "weight_decay": 0.1}),
        (2, 8, {"label_smoothing": 0.1}),
        (0, 28, {}),  # so many inputs are summed in parts
    ],
)
def test_steps_are_those_of_each_network_alone(count: int, way: int, side: int, settings: dict[str, Any]) -> None:
    """Whatever their number: a network's bits do not depend on the others."""
    chosen = TrainSettings(precision="fp32", **settings)
    stack = StackedStep([mlp(seed, side) for seed in range(count)], chosen, way=way)
    alone = [RegularStep(mlp(seed, side), chosen) for seed in range(count)]
    generator, lr = torch.Generator().manual_seed(0), torch.tensor(0.1)
    for _ in range(5):
        images = torch.randn(count, 64, 1, side, side, generator=generator)
        labels = torch.randint(10, (count, 64), generator=generator)
        labels[:, 3] = -100  # an ignored one
        losses = stack(images, labels, lr)
        for k, step in enumerate(alone):
            assert torch.equal(losses[k], step(images[k], labels[k], lr))
    for k, step in enumerate(alone):
        assert_equal(stack.of(k).save(), step.save())
        assert_equal(stack.of(k).state(), step.state())


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


class Counting(Net):
    """A network with a buffer that each pass moves, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__(outputs=6)
        self.register_buffer("seen", torch.zeros(6))
        self.again = nn.Linear(6, 6)
        self.again.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.hidden(x))
        self.seen = 0.5 * self.seen + hidden.detach().mean(0)
        return self.again(F.gelu(self.out(hidden)))[:, :3]


@needs_equal_products
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_normalised_layers_are_those_of_each_network_alone(norm: Callable[[int], nn.Module]) -> None:
    def built(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), norm(16), nn.Tanh(), nn.Linear(16, 16), norm(16), nn.Linear(16, 3))

    settings = TrainSettings(precision="fp32")
    stack, alone = (
        StackedStep([built(k) for k in range(3)], settings),
        [RegularStep(built(k), settings) for k in range(3)],
    )
    for _ in range(5):
        x, y = torch.randn(3, 64, 4), torch.randint(3, (3, 64))
        stack(x, y, torch.tensor(0.1))
        for k, step in enumerate(alone):
            step(x[k], y[k], torch.tensor(0.1))
    for k, step in enumerate(alone):
        assert_equal(stack.of(k).state(), step.state())


@needs_equal_products
def test_a_networks_buffers_and_tied_weights_are_its_own() -> None:
    def built(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Counting()

    settings, loss = TrainSettings(precision="fp32", optimizer="adam"), find_loss("mse")
    stack = StackedStep([built(k) for k in range(3)], settings, loss=loss)
    alone = [RegularStep(built(k), settings, loss=loss) for k in range(3)]
    inputs, targets = torch.randn(4, 3, 32, 4), torch.randn(4, 3, 32, 3)
    for x, y in zip(inputs, targets, strict=True):
        stack(x, y, torch.tensor(0.1))
        for k, step in enumerate(alone):
            step(x[k], y[k], torch.tensor(0.1))
    for k, step in enumerate(alone):
        assert_equal(stack.of(k).state(), step.state())
    other = StackedStep([built(9) for _ in range(3)], settings, loss=loss)
    other.of(1).load(alone[0].save())
    assert_equal(other.of(1).state(), alone[0].state())
    assert_equal(other.of(2).state(), RegularStep(built(9), settings, loss=loss).state())


@pytest.mark.parametrize("kind", ["images", "augmented images", "tensors"])
def test_batches_side_by_side_are_those_of_each_seed(kind: str) -> None:
    whole = TensorData("train", tensors(50), torch.device("cpu")) if kind == "tensors" else dataset(50, pad=1)
    if kind == "images":
        whole = dataset(50)
        whole.augmentation = type(whole.augmentation)()
    data = Taken(whole, lambda batch: (batch[0], batch[1]))
    how: dict[str, Any] = {"epoch": 3, "drop_last": False, "begin": 1}
    passes = [list(data.batches(16, seed=seed, **how)) for seed in (4, 5, 6)]
    found = list(data.side_by_side(16, seeds=(4, 5, 6), **how))
    assert [len(inputs[0]) for inputs, _ in found] == [16, 16, 2]
    for number, batch in enumerate(found):
        for k in range(3):
            for one, wanted in zip(batch, passes[k][number], strict=True):
                assert torch.equal(one[k], wanted)


# Three steps an epoch; fewer than 200 are not worth a trial.
RUN = ["dataset.limit=300", "train.batch_size=96", "train.epochs=67", "train.lr=0.3", "device=cpu", "workers=1"]


class Slow:
    """A clock by which whatever is timed later is faster: the stack, in its trial."""

    def __init__(self) -> None:
        self.now, self.tick = 0.0, 1.0

    def __call__(self) -> float:
        self.tick *= 0.8
        self.now += self.tick
        return self.now


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def session_of(data: Path, folder: Path, *more: str) -> Session:
    settings = load_settings(dataset="digits", overrides=[*RUN, f"dataset.directory={data}", *more])
    return new_session(settings, RunFolder(folder))


def together(session: Session, numbers: Sequence[int], kind: str = "source") -> None:
    models = [planned(session, kind, index) for index in numbers]
    train_together(session, models, partial(finish_regular, session), clock=Slow())


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven sources, trained one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    with opened(session_of(data, folder)) as session:
        list(regular_models(session, "source", MANY))
    return folder


def assert_as_alone(folder: Path, alone: Path, numbers: Sequence[int] = range(MANY)) -> None:
    one, other = RunFolder(folder), RunFolder(alone)
    for index in numbers:
        found, wanted = (load_checkpoint(run.model("source", index), own=True) for run in (one, other))
        assert_equal(dict(found.state.items()), dict(wanted.state.items()))
        assert found.metadata == wanted.metadata
    told = [
        {(line["model"], line["epoch"]): line["loss"] for line in run.log.read() if line["model"] in names}
        for run in (one, other)
        for names in [{f"source {index}" for index in numbers}]
    ]
    assert told[0] == told[1]
    assert len(one.log.read()) == len(told[0])
    assert not one.in_training("source", 0).parent.exists()


def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all stacks that are made."""
    made: list[int] = []
    begin = StackedStep.__init__

    def init(self: StackedStep, models: Sequence[nn.Module], *arguments: Any, **more: Any) -> None:
        made.append(len(models))
        begin(self, models, *arguments, **more)

    monkeypatch.setattr(StackedStep, "__init__", init)
    return made


@needs_equal_products
def test_models_are_those_trained_alone_whichever_were_missing(
    data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stacks(monkeypatch)
    with opened(session_of(data, tmp_path / "all")) as session:
        together(session, range(MANY))
        assert not session.run.finished("heldout", 0)
    assert set(made) == {MANY}
    assert_as_alone(tmp_path / "all", alone)
    assert len(event_files(tmp_path / "all")) == MANY  # one for each, though epochs come in turns

    made.clear()
    with opened(session_of(data, tmp_path / "some")) as session:
        together(session, (4, 0, 6))
        assert [session.run.finished("source", index) for index in range(MANY)] == [
            True,
            *[False] * 3,
            True,
            False,
            True,
        ]
    assert set(made) == {3}
    assert_as_alone(tmp_path / "some", alone, (0, 4, 6))


@needs_equal_products
@pytest.mark.parametrize("files", [3 * 4, 3 * 4 + 1], ids=["between steps", "within a save of all"])
def test_a_kill_changes_no_bit(
    files: int, data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were saved at one step go on together, others alone."""
    often = ("checkpoint.seconds=0", "checkpoint.minutes=0.0000001")
    written = []
    save = resume.save_checkpoint

    def counted(*arguments: Any) -> None:
        if len(written) == files:
            kill()
        written.append(save(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", counted)
        with pytest.raises(Killed), opened(session_of(data, tmp_path, *often)) as session:
            together(session, range(3))
    assert not list(tmp_path.rglob("seed-*"))
    made = stacks(monkeypatch)
    with opened(session_of(data, tmp_path)) as session:
        together(session, range(3))
        assert bool(made) == (files == 3 * 4)
        assert session.run.finished("source", 2) == (files == 3 * 4)
        list(regular_models(session, "source", 3))
    assert_as_alone(tmp_path, alone, range(3))


def after_epochs(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> None:
    """`act` when so many epochs are in the log."""
    extend, done = RunLog.extend, list[int]()

    def acting(self: RunLog, entries: Any) -> None:
        extend(self, entries)
        done.append(1)
        if len(done) == count:
            act()

    monkeypatch.setattr(RunLog, "extend", acting)


@needs_equal_products
def test_a_request_to_stop_saves_all(data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        after_epochs(patch, 17, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped) as stopped, signals_stop(), opened(session_of(data, tmp_path)) as session:
            together(session, range(3))
    assert "epoch 17 of source 0, which is whole, and of 2 others" in str(stopped.value)
    with opened(session_of(data, tmp_path)) as session, monkeypatch.context() as patch:
        after_epochs(patch, 67 - 17 + 1, kill)  # nothing is trained again
        together(session, range(3))
    assert_as_alone(tmp_path, alone, range(3))


@needs_equal_products
def test_one_that_is_no_longer_finite_leaves_the_others(
    data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained alone, it says so as ever."""
    bad = list[int]()

    def poisoned(call: Any, number: int, step: Any, images: Tensor, *more: Tensor) -> Any:
        if bad:
            images = images.clone()
            images[bad.pop()] = torch.nan
        return call(step, images, *more)

    with opened(session_of(data, tmp_path)) as session:
        with monkeypatch.context() as patch:
            around_calls(patch, StackedStep, poisoned)
            after_epochs(patch, 9, lambda: bad.append(1))
            together(session, range(4))
        assert [session.run.finished("source", index) for index in range(4)] == [True, False, True, True]
        with monkeypatch.context() as patch:
            poison(patch, RegularStep, lambda number: number == 28)
            with pytest.raises(FastarError, match=r"training source 1: loss not finite at epoch 10, step 1"):
                list(regular_models(session, "source", 4))
        list(regular_models(session, "source", 4))
    assert_as_alone(tmp_path, alone, range(4))


class Normed(Net):
    """Layer-norm sums its gradients over a batch in another order than `vmap` does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.layer_norm(torch.relu(self.hidden(x)), (6,), self.out.weight[0], self.out.weight[1]))


class Asking(Net):
    """Its values decide what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)


class Scalars(Net):
    """A parameter and a buffer without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale / self.temperature


class AskingLate(Asking):
    """After some steps, values decide."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x) if self.steps > 30 and float(x.sum()) > 1e9 else Net.forward(self, x)


def users_session(folder: Path, build: Callable[[], nn.Module], loss: Any = "cross_entropy", **changes: Any) -> Session:
    small: Recipe = recipe(**{"epochs": 100, "batch_size": 24, "sources": {"number": 3}, **changes})
    given = Given(build=build, data=UserSplits(tensors(), tensors(20, seed=1)), loss=loss)
    name = loss if isinstance(loss, str) else "tests:loss"
    return new_session(small.settings(PYTHON, "tests:build", name), RunFolder(folder), given=given)


@needs_equal_small_products
@pytest.mark.parametrize("build", [Net, Scalars])
def test_a_users_network_and_loss(
    build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(users_session(tmp_path / "alone", build, weighted)) as session:
        list(regular_models(session, "source", 3))
    made = stacks(monkeypatch)
    with opened(users_session(tmp_path / "all", build, weighted)) as session:
        together(session, range(3))
    assert set(made) == {3}
    assert_as_alone(tmp_path / "all", tmp_path / "alone", range(3))


@needs_equal_products
def test_a_network_that_cannot_go_on_in_a_stack_goes_on_alone(tmp_path: Path) -> None:
    with opened(users_session(tmp_path / "alone", AskingLate)) as session:
        list(regular_models(session, "source", 3))
    with opened(users_session(tmp_path / "all", AskingLate)) as session:
        together(session, range(3))
        assert not session.run.finished("source", 0)
        list(regular_models(session, "source", 3))
    assert_as_alone(tmp_path / "all", tmp_path / "alone", range(3))


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (Dropping, {}),
        (Normed, {}),
        (Asking, {}),
        (Net, {"gradient_clip": 1.0}),
        (Net, {"epochs": 99}),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten()), {}),
    ],
    ids=["draws", "rounds otherwise", "asks", "clipped", "short", "convolution"],
)
def test_others_are_left_to_be_trained_alone(
    build: Callable[[], nn.Module], changes: dict[str, Any], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    with opened(users_session(tmp_path, build, **changes)) as session:
        together(session, range(3))
        assert not any(session.run.finished("source", index) for index in range(3))
        assert session.run.log.read() == []
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stack_that_is_slower_is_not_begun(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1000))
    after_epochs(monkeypatch, 1, kill)
    with opened(session_of(data, tmp_path)) as session:
        models = [planned(session, "source", index) for index in range(3)]
        train_together(session, models, partial(finish_regular, session), clock=lambda: next(times) ** 2)
        assert not session.run.finished("source", 0)
