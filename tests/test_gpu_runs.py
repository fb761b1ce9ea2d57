"""What a GPU does is what a CPU does: runs, matching, streaming, compiled steps. `make rehearse` simulates one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluation_cases
import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import small, tensors
from torch import nn
from training_cases import batches

import fastar
from fastar.config import StarSettings, TrainSettings
from fastar.data.convert import Form, prepare
from fastar.data.encode import Encoding
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.flat import FlatLayout
from fastar.losses import find_loss
from fastar.models import build_model
from fastar.runtime.device import simulated
from fastar.runtime.memory import cap_gpu
from fastar.training import RegularStep, SourcesStore, StarStep

pytestmark = pytest.mark.gpu
SHAPE = (3, 8, 8)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def on_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("cpu")
    return run, train_star(small(data, *PLAIN), run)


PLAIN = ("train.precision=fp32", "sources.heldout=1", "star.epochs=3", "star.match_every_epochs=1", "train.lr=0.05")


@pytest.mark.parametrize(
    "more",
    [
        ["sources.store=device"],
        ["sources.store=host", "train.graph=true", "evaluation.graph=true"],
        ["sources.store=file", "train.graph=auto", "train.compile=auto"],
    ],
    ids=lambda more: " ".join(more),
)
def test_a_run_is_that_of_a_cpu(
    gpu: torch.device, data: Path, tmp_path: Path, on_cpu: tuple[Path, dict[str, Any]], more: list[str]
) -> None:
    folder, wanted = on_cpu
    found = train_star(small(data, *PLAIN, *more, "device=auto"), tmp_path)
    assert found["device"] != "cpu"
    # Some 30 steps in fp32 that add in other orders.
    for file, state in tensors(folder).items():
        for name, value in tensors(tmp_path)[file].items():
            if value.dtype == torch.float32:
                torch.testing.assert_close(value, state[name], rtol=0, atol=1e-3)
            else:
                assert torch.equal(value, state[name]), (file, name)
    for one, other in zip(found["paths"], wanted["paths"], strict=True):
        assert one["test_loss"] == pytest.approx(other["test_loss"], abs=2e-3)


def test_a_run_in_bf16_under_a_cap(gpu: torch.device, data: Path, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats(gpu)  # those of tests before, in the same process
    found = train_star(small(data, "train.precision=bf16", "device=cuda", "gpu_memory=2GB"), tmp_path)
    assert 0 < found["peak_bytes"] <= 2e9
    cap_gpu(gpu, torch.cuda.mem_get_info(gpu)[1])


def test_more_than_the_cap_cannot_be_had(gpu: torch.device) -> None:
    cap_gpu(gpu, 1 << 30)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device=gpu)
    finally:
        cap_gpu(gpu, torch.cuda.mem_get_info(gpu)[1])


@pytest.mark.parametrize("method", ["weight", "activation", "sinkhorn", "none"])
def test_networks_are_matched_measured_and_averaged(gpu: torch.device, method: str) -> None:
    shown = list(evaluation_cases.data()())
    examples = shown[0][0][:2]

    def work(device: torch.device) -> tuple[fastar.Matched, list[float]]:
        one, other = (evaluation_cases.resnet(seed).to(device) for seed in (0, 1))
        found = fastar.match(one, other, example_inputs=examples.to(device), method=method, data=shown)
        return found, fastar.barrier(one, fastar.apply(found, other), shown).loss

    (found, losses), (wanted, others) = work(gpu), work(torch.device("cpu"))
    assert float(found.result.objective) == pytest.approx(float(wanted.result.objective), rel=1e-4)
    if method != "sinkhorn":  # its gradient steps carry roundings on
        assert all(torch.equal(found[name].cpu(), wanted[name]) for name in wanted)
        assert losses == pytest.approx(others, rel=1e-4)


def test_images_stream_to_it_as_to_a_cpu(gpu: torch.device, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in range(2):
            folder = tmp_path / "raw" / split / f"n{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = generator.integers(0, 256, (40 + number, 44, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{number}.JPEG")
    encoding = Encoding(max_resolution=40, compress_probability=1)
    files = prepare(
        "imagefolder",
        own_name="made",
        raw=tmp_path / "raw",
        directory=tmp_path / "out",
        form=Form(encoding),
        workers=1,
    )
    there, here = (StreamingDataset(files, "train", device, size=24, threads=2) for device in (str(gpu), "cpu"))
    for one, other in zip(there.batches(8, seed=3, epoch=1), here.batches(8, seed=3, epoch=1), strict=True):
        assert one[0].device == gpu
        # Normalised by the same fp32 arithmetic, fused or not.
        torch.testing.assert_close(one[0].cpu(), other[0], rtol=0, atol=1e-5)
        assert torch.equal(one[1].cpu(), other[1])


def network(seed: int) -> nn.Module:
    return build_model("resnet8", input_shape=SHAPE, classes=4, seed=seed, width=0.25)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["regular", "star"])
def test_compiled_steps_equal_eager_ones(gpu: torch.device, kind: str, graph: bool) -> None:
    """50 steps, two epochs; each ends with a short batch."""
    if simulated():
        pytest.skip("no kernel can be compiled for a simulated GPU")
    torch.backends.cudnn.deterministic = True

    def train(**change: bool) -> tuple[list[float], torch.Tensor]:
        settings = TrainSettings(lr=0.05, precision="fp32", **change)
        model = network(0).to(gpu)
        step: Any = RegularStep(model, settings)
        if kind == "star":
            states = [network(n).state_dict() for n in (1, 2)]
            z = SourcesStore(FlatLayout.from_module(model), states, ["a", "b"], gpu)
            step = StarStep(model, settings, StarSettings(), z, seed=1)
        losses = []
        for epoch in range(2):
            step.begin_epoch(epoch, 25)
            for i, (images, labels) in enumerate(batches(25, epoch, SHAPE)):
                count = 5 if i == 24 else len(images)
                lr = torch.tensor(0.05, device=gpu)
                losses.append(float(step(images[:count].to(gpu), labels[:count].to(gpu) % 4, lr)))
        return losses, step.theta

    losses, theta = train(compile=True, graph=graph)
    wanted, same = train()
    # Fused kernels round elsewhere; 50 steps carry it on.
    assert losses == pytest.approx(wanted, abs=1e-3)
    torch.testing.assert_close(theta, same, rtol=0, atol=1e-3)


def test_a_gpu_that_is_not_there(gpu: torch.device, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FastarError, match=r"^device='cuda:9': no such GPU here"):
        train_star(small(data, "device=cuda:9"), tmp_path)


class Net(nn.Module):
    """A network that takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        outputs: torch.Tensor = self.last(torch.relu(self.hidden(x if more is None else x + more)))
        return outputs


def squares(outputs: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (outputs - batch[-1]).square().mean(1)


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_user_s_network_and_loss_in_graphs_are_those_without(gpu: torch.device, inputs: int) -> None:
    """Of tensors on the device; a batch is one tensor of inputs and one of targets, or a tuple of more."""
    generator = torch.Generator().manual_seed(0)
    data = tuple(torch.randn(44, width, generator=generator).to(gpu) for width in (*[6] * inputs, 2))

    def star(graph: bool) -> fastar.Star:
        recipe = fastar.Recipe(
            epochs=3, batch_size=8, lr=0.05, drop_last=False, precision="fp32", graph=graph, evaluation={"graph": graph}
        )
        given: dict[str, Any] = {"loss": squares, "metrics": ["mae"], "progress": False}
        sources = fastar.train_sources(Net, data, recipe, number=2, **given)
        return fastar.train_star(Net, sources, data, recipe, heldouts=sources[:1], **given)

    found, wanted = star(graph=True), star(graph=False)
    for name, value in wanted.state.items():
        torch.testing.assert_close(found.state[name], value, rtol=0, atol=1e-5)  # other kernels may be chosen


def test_a_graph_takes_tensors_alone(gpu: torch.device) -> None:
    step = RegularStep(Net().to(gpu), TrainSettings(graph=True), loss=find_loss(squares))
    x, y = torch.zeros(4, 6, device=gpu), torch.zeros(4, 2, device=gpu)
    with pytest.raises(FastarError, match=r"train.graph=true: batches must hold tensors alone, not str; set it to fal"):
        step(x, {"name": "a", "y": y}, torch.zeros((), device=gpu))
