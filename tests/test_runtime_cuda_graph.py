"""The whole step, and evaluation, as CUDA graphs. What needs no GPU is shown with a recorder that replays by calls."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import evaluation_cases
import pytest
import torch
from torch import Tensor, nn
from training_cases import CPU, batches

from fastar.config import StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.evaluation import Measured, evaluate_rows
from fastar.flat import FlatLayout
from fastar.models import build_model
from fastar.runtime.cuda_graph import WARM_UP, CallGraph, Record
from fastar.training import RegularStep, SourcesStore, StarStep

SHAPE = (3, 8, 8)
EAGER = TrainSettings(lr=0.05, weight_decay=5e-3, precision="fp32")
GRAPH = EAGER.model_copy(update={"graph": True})


def resnet(seed: int) -> nn.Module:
    return build_model("resnet8", input_shape=SHAPE, classes=4, seed=seed, width=0.25)


class Recorder:
    """Stands in for a CUDA graph: a replay calls what was captured, a capture runs nothing that lasts."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, warm_up: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
        warm_up()

        def replay() -> None:
            self.replays += 1
            run()

        return replay


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def regular(settings: TrainSettings, device: torch.device = CPU, **more: Any) -> RegularStep:
    return RegularStep(resnet(0).to(device), settings, **more)


def star(settings: TrainSettings, device: torch.device = CPU, place: str = "device", **more: Any) -> StarStep:
    model = resnet(0).to(device)
    states = [resnet(n).state_dict() for n in (1, 2, 3)]
    z = SourcesStore(FlatLayout.from_module(model), states, ["a", "b", "c"], device, store=place)
    return StarStep(model, settings, StarSettings(), z, seed=1, **more)


def run(step: Any, epochs: int = 2, count: int = 7, short: int = 5, overflow: int = -1) -> list[float]:
    """Epochs that end with a batch of `short` images; every step's loss."""
    losses = []
    for epoch in range(epochs):
        step.begin_epoch(epoch, count)
        for i, (images, labels) in enumerate(batches(count, epoch, SHAPE)):
            images, labels = images.to(step.device), labels.to(step.device) % 4
            if i == overflow:
                images = images * float("inf")
            if i == count - 1:
                images, labels = images[:short], labels[:short]
            losses.append(float(step(images, labels, torch.tensor(0.05 / (1 + i), device=step.device))))
    return losses


KINDS = [
    (regular, {}),
    (star, {}),
    (star, {"place": "file"}),
]


@pytest.mark.parametrize(("kind", "more"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("change", [{}, {"optimizer": "adamw"}, {"precision": "bf16"}], ids=str)
def test_replays_equal_eager_steps(
    recorder: Recorder, kind: Callable[..., Any], more: dict[str, Any], change: dict[str, Any]
) -> None:
    """Warm-up leaves no trace (weights, moments, batch-norm), every replay reads its own batch, rate, source and t."""
    eager = kind(EAGER.model_copy(update=change), **more)
    graph = kind(GRAPH.model_copy(update=change), **more, record=recorder)
    assert run(graph) == run(eager)
    assert recorder.replays == 2 * 6  # the short last batches are not replayed
    assert torch.equal(graph.theta, eager.theta)
    state, wanted = graph.state(), eager.state()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert int(state["bn1.num_batches_tracked"]) == 14


def test_a_replay_that_overflows_is_skipped(recorder: Recorder) -> None:
    found = []
    for settings in (EAGER, GRAPH):
        step = regular(settings, record=recorder)
        step.loss_scale.enabled, step.loss_scale.found_nonfinite = True, torch.zeros(())
        if settings.graph:  # it is told of the loss scale's tensors when it is made
            step._graph = step._graph_of(step._body)
        run(step, overflow=3)
        found.append((step.theta, float(step.loss_scale.scale)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.isfinite(found[0][0]).all()
    assert found[0][1] == found[1][1] == 2.0**-2  # halved once an epoch


def test_a_loss_outlives_the_next_replay(recorder: Recorder) -> None:
    step = regular(GRAPH, record=recorder)
    (first, labels), (second, others) = batches(2, 0, SHAPE)
    loss = step(first, labels % 4, torch.tensor(0.05))
    before = float(loss)
    step(second, others % 4, torch.tensor(0.05))
    assert float(loss) == before


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(FastarError, match=r"^train\.graph=true: CUDA graphs need a GPU.*set it to false$"):
        regular(GRAPH)


def test_a_capture_that_fails_is_a_clear_error() -> None:
    def fail(warm_up: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graph = CallGraph(lambda images, labels, lr: lr, [], CPU, record=fail)
    with pytest.raises(FastarError, match=r"could not be captured \(operation not permitted when.*graph=false$"):
        graph(torch.zeros(1), torch.zeros(1), torch.zeros(()))


def test_batches_that_do_not_fit() -> None:
    graph = CallGraph(lambda images, labels, lr: images.sum(), [], CPU, record=Recorder())
    images, labels, lr = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(())
    assert graph.fits(images, labels)
    graph(images, labels, lr)
    assert graph.fits(images + 1, labels)
    assert not graph.fits(images[:3], labels[:3])
    assert not graph.fits(images.double(), labels)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "more"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("change", [{}, {"optimizer": "adamw"}, {"precision": "bf16"}, {"precision": "fp16"}], ids=str)
def test_graphs_equal_eager_steps_on_a_gpu(
    kind: Callable[..., Any], more: dict[str, Any], change: dict[str, Any]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    torch.backends.cudnn.deterministic = True
    eager = kind(EAGER.model_copy(update=change), device, **more)
    graph = kind(GRAPH.model_copy(update=change), device, **more)
    losses, wanted = run(graph, count=25), run(eager, count=25)  # 50 steps
    # The same kernels; a library may choose others while capturing, whose roundings 50 steps carry on.
    tolerance = 1e-4 if "precision" not in change else 5e-2
    assert losses == pytest.approx(wanted, abs=tolerance)
    torch.testing.assert_close(graph.theta, eager.theta, rtol=0, atol=tolerance)
    assert int(graph.state()["bn1.num_batches_tracked"]) == 50


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [regular, star])
def test_a_step_gives_its_graph_s_memory_back_at_once(kind: Callable[..., Any]) -> None:
    """Thirty sources are trained one after another: none may wait for the garbage collector."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    step = kind(GRAPH, torch.device("cuda"))
    run(step)
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "more"), [(regular, {}), (star, {}), (star, {"place": "host"})], ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("settings", [EAGER, GRAPH], ids=["eager", "graph"])
@pytest.mark.parametrize("change", [{}, {"optimizer": "adamw"}, {"precision": "fp16"}, {"gradient_clip": 1.0}], ids=str)
def test_no_step_waits_for_the_device(
    kind: Callable[..., Any], more: dict[str, Any], settings: TrainSettings, change: dict[str, Any]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    step = kind(settings.model_copy(update=change), device, **more)
    given = [(images.to(device), labels.to(device) % 4) for images, labels in batches(8, 0, SHAPE)]
    lr = torch.tensor(0.05, device=device)
    step.begin_epoch(0, len(given))
    for images, labels in given[:2]:  # compiles kernels, captures
        step(images, labels, lr)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(images, labels, lr) for images, labels in given[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.gpu
def test_warm_up_and_captures_share_a_stream_of_their_own() -> None:
    """Torch hands out its streams in turn: another graph, or a copy of sources, may not get the one that captures."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    seen = []

    def body(images: Tensor) -> Tensor:
        seen.append(torch.cuda.current_stream())
        return images + 1

    one = torch.ones(1, device="cuda")
    for _ in range(2):
        assert float(CallGraph(body, [], one.device)(one)) == 2
    others = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(40))]
    assert len(seen) == 2 * (WARM_UP + 1)
    assert len(set(seen)) == 1
    assert seen[0] not in others


# Evaluation


def evaluated(
    kind: str, method: str, graph: bool, device: torch.device = CPU, record: Record | None = None
) -> dict[str, Measured]:
    """Three models over batches of 16, 16, 16 and 2 images."""
    models = [evaluation_cases.resnet(n) if kind == "resnet" else evaluation_cases.mlp(n) for n in range(3)]
    rows = torch.stack([evaluation_cases.row(model) for model in models]).to(device)

    def moved(batches: evaluation_cases.Batches) -> evaluation_cases.Batches:
        return lambda: ((images.to(device), labels.to(device)) for images, labels in batches())

    model = models[0].to(device)
    return evaluate_rows(
        model,
        FlatLayout.from_module(model),
        rows,
        {"train": moved(evaluation_cases.data()), "test": moved(evaluation_cases.data(seed=1))},
        statistics_batches=moved(evaluation_cases.data(seed=2)),
        method=method,
        graph=graph,
        record=record,
    )


EVALUATED = [("resnet", "population", 9), ("resnet", "reference", 9), ("mlp", "population", 6)]


@pytest.mark.parametrize(("kind", "method", "replays"), EVALUATED)
def test_evaluation_by_replays_is_the_same(recorder: Recorder, kind: str, method: str, replays: int) -> None:
    graph, eager = (evaluated(kind, method, on, record=recorder) for on in (True, False))
    assert recorder.replays == replays  # a pass of statistics and two of losses, without their short last batches
    for split, wanted in eager.items():
        assert torch.equal(graph[split].loss, wanted.loss)
        assert torch.equal(graph[split]["accuracy"], wanted["accuracy"])


def test_evaluation_by_graphs_needs_a_gpu() -> None:
    with pytest.raises(FastarError, match=r"^evaluation\.graph=true: CUDA graphs need a GPU"):
        evaluated("mlp", "population", True)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "method", "replays"), EVALUATED)
def test_evaluation_by_graphs_on_a_gpu(kind: str, method: str, replays: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    graph, eager = (evaluated(kind, method, on, device) for on in (True, False))
    for split, wanted in eager.items():  # the same fp32 kernels, or others' roundings of a loss of order 1
        torch.testing.assert_close(graph[split].loss, wanted.loss, rtol=1e-5, atol=1e-5)


# torch.compile


def compiled_and_eager(change: dict[str, Any]) -> tuple[list[float], list[float], Tensor, Tensor]:
    found = []
    for compiled in (True, False):
        settings = EAGER.model_copy(update={**change, "compile": compiled})
        step = star(settings)
        found.append((run(step, epochs=2, count=25), step.theta))
    return found[0][0], found[1][0], found[0][1], found[1][1]


@pytest.mark.slow
def test_a_compiled_network_trains_as_an_eager_one() -> None:
    """50 steps; the last of each 25 has a short batch, which goes to the network uncompiled."""
    losses, wanted, theta, same = compiled_and_eager({})
    # Fused operations round in another order: 1e-7 a step, which 50 steps carry on.
    assert losses == pytest.approx(wanted, abs=2e-4)
    assert (theta - same).abs().max() < 2e-4


@pytest.mark.slow
def test_a_compiled_network_in_bf16() -> None:
    losses, wanted, theta, same = compiled_and_eager({"precision": "bf16"})
    # Compiled code keeps in fp32 what eager rounds to bf16 (4e-3) between operations.
    assert losses == pytest.approx(wanted, abs=0.15)
    assert (theta - same).abs().max() < 0.1


def test_a_compiler_that_fails_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, **settings: Any) -> Callable[[Tensor], Tensor]:
        def call(images: Tensor) -> Tensor:
            raise torch._dynamo.exc.TorchDynamoException("no working\nC++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    step = regular(EAGER.model_copy(update={"compile": True}))
    (images, labels), *_ = batches(1, 0, SHAPE)
    with pytest.raises(FastarError, match=r"^train\.compile=true: .*\(no working C\+\+ compiler\); install.*=false$"):
        step(images, labels % 4, torch.tensor(0.05))


def test_only_batches_of_the_first_shape_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(model: nn.Module, **settings: Any) -> Callable[[Tensor], Tensor]:
        def call(images: Tensor) -> Tensor:
            calls.append(len(images))
            logits: Tensor = model(images)
            return logits

        return call

    monkeypatch.setattr(torch, "compile", fake)
    step = regular(EAGER.model_copy(update={"compile": True}))
    assert run(step) == run(regular(EAGER))
    assert calls == [16] * 12
