"""The ends of a measured path are the two models, whatever they compute with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import refused, tiny
from session_cases import with_data
from torch import Tensor, nn
from torch.nn import functional as F

import fastar
from fastar.config import load_settings
from fastar.errors import FastarError
from fastar.experiments.measure import check_endpoint
from fastar.experiments.plan.preflight import check_batches
from fastar.experiments.session import Session, new_session
from fastar.experiments.statistics_batches import statistics_size
from fastar.runs import RunFolder
from fastar.runs.model_files import Checkpoint
from fastar.symmetry import Symmetry

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Logits of two layers, with a batch-norm between them, and what `after` makes of them."""

    def __init__(self, seed: int, after: Callable[[Any, Tensor], Tensor] = lambda net, x: x, **also: Any):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self.after = after
        for name, value in also.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.inner(x))


def batches(sizes: tuple[int, ...] = (16, 16)) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    count = sum(sizes)
    inputs, labels = torch.randn(count, 8, generator=generator), torch.randint(3, (count,), generator=generator)
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))


def scaled(scale: float, **how: Any) -> Net:
    net = Net(0, lambda net, x: x * net.scale)
    net.register_buffer("scale", torch.tensor(scale), **how)
    return net


@pytest.mark.parametrize("how", [{}, {"persistent": False}], ids=["saved", "not saved"])
def test_buffers_that_differ_are_named(how: dict[str, bool]) -> None:
    """Those that no state dict has too: the loss at t = 1 was that of the second model with the first one's buffer."""
    with pytest.raises(FastarError, match="model_a and model_b differ in buffer 'scale'"):
        fastar.barrier(scaled(1, **how), scaled(20, **how), batches())
    with pytest.raises(FastarError, match="differ in buffer 'scale'"):
        fastar.barrier(Net(0), scaled(20, persistent=False), batches())
    both = fastar.barrier(scaled(20, **how), scaled(20, **how), batches(), points=3)
    alone = fastar.barrier(Net(0, lambda net, x: x * 20), Net(0, lambda net, x: x * 20), batches(), points=3)
    assert both == alone


def test_buffers_that_only_their_dtypes_round_are_the_same() -> None:
    exact, rounded = scaled(0.1), scaled(0.1)
    fastar.barrier(exact, exact.double(), batches(), points=2)
    rounded.scale = rounded.scale.bfloat16()
    with pytest.raises(FastarError, match="the end of the path is not model_b"):  # by 0.1 %, which is not rounding
        fastar.barrier(scaled(0.1), rounded, batches())


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            {"scale": 1.0},
            {"scale": 20.0},
            r"'scale' of the whole is 1\.0 in the network of the path and 20\.0 in model_b",
        ),
        ({"scale": torch.tensor(1.0)}, {"scale": torch.tensor(20.0)}, "'scale' of the whole is not the same"),
        ({"scale": torch.ones(3)}, {"scale": torch.arange(3.0)}, "'scale' of the whole is not the same"),
        ({"scale": 1.0}, {"scale": 1.0, "after": lambda net, x: -x}, "'after' of the whole is "),
    ],
)
def test_the_end_of_a_path_is_the_model(first: dict[str, Any], second: dict[str, Any], words: str) -> None:
    """Whatever is neither parameter nor buffer."""

    def net(after: Any = lambda net, x: x * net.scale, **also: Any) -> Net:
        return Net(0, after, **also)

    with pytest.raises(FastarError, match=f"the end of the path is not model_b: .*{words}"):
        fastar.barrier(net(**first), net(**second), batches())
    assert fastar.barrier(net(**second), net(**second), batches(), points=3).value == 0.0


def test_layers_that_differ_are_named() -> None:
    a, b = Net(0), Net(0)
    b.inner[2] = nn.Tanh()
    with pytest.raises(
        FastarError, match=r"not model_b: .*module 'inner\.2' is ReLU in the network of the path and Tanh"
    ):
        fastar.barrier(a, b, batches())
    b.inner[2] = nn.ReLU()
    assert isinstance(b.inner[1], nn.BatchNorm1d)
    b.inner[1].eps = 1e-3
    with pytest.raises(
        FastarError, match=r"'eps' of module 'inner\.1' is 1e-05 in the network of the path and 0\.001 in"
    ):
        fastar.barrier(a, b, batches())
    b.inner[1].eps, b.inner[1].momentum = 1e-5, 0.5  # decides no output
    fastar.barrier(a, b, batches(), points=2)


class Cached(nn.Module):
    """In evaluation mode it keeps a product that depends on its weights."""

    def __init__(self, seed: int):
        super().__init__()
        self.net, self.kept = Net(seed), {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.kept:
            self.kept["scale"] = self.net.inner[0].weight.detach().norm()
        return self.net(x) * self.kept["scale"]


def test_a_cache_of_what_weights_make_is_noticed() -> None:
    """All of the path was measured with the first model's."""
    with pytest.raises(FastarError, match=r"the end of the path is not model_b: .*kept"):
        fastar.barrier(Cached(0), Cached(1), batches())


def test_batch_norm_statistics_of_the_models_do_not_matter() -> None:
    a, b = Net(0), Net(1)
    expected = fastar.barrier(a, b, batches())
    norm = b.inner[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean += 3
    norm.running_var.zero_()
    assert fastar.barrier(a, b, batches()) == expected
    norm.running_var.fill_(torch.nan)  # its outputs are not finite, and those of the end of the path are not, too
    assert fastar.barrier(a, b, batches()) == expected


def test_what_draws_numbers_is_no_function() -> None:
    """Dropout that is on in evaluation mode was measured; nothing is drawn from the caller's generator."""
    left_on = lambda net, x: F.dropout(x, 0.5)  # noqa: E731
    for pair, name in (((Net(0, left_on), Net(1)), "model_a"), ((Net(0), Net(1, left_on)), "model_b")):
        before = torch.get_rng_state()
        with pytest.raises(FastarError, match=f"{name} gives two outputs for one batch .*F.dropout"):
            fastar.barrier(*pair, batches())
        assert torch.equal(torch.get_rng_state(), before)
    off = lambda net, x: F.dropout(x, 0.5, net.training)  # noqa: E731
    found = fastar.barrier(Net(0, off).train(), Net(1, off).train(), batches())
    assert found == fastar.barrier(Net(0), Net(1), batches())


@pytest.mark.parametrize("sizes", [(16, 1), (16, 1, 15), (16, 1, 1)])
def test_a_batch_of_one_sample_has_no_statistics_of_its_own(sizes: tuple[int, ...]) -> None:
    """It is joined to the one before: batch-norm of vectors ended in torch's own error."""
    a, b = Net(0), Net(1)
    merged = [17, 15] if len(sizes) == 3 and sizes[2] == 15 else [sum(sizes)]
    ones = batches(sizes)
    inputs, labels = (torch.cat(parts) for parts in zip(*ones, strict=True))
    whole = list(zip(inputs.split(merged), labels.split(merged), strict=True))
    found, expected = fastar.barrier(a, b, ones), fastar.barrier(a, b, whole)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)  # the losses' sums are of other batches
    assert found.accuracy == expected.accuracy
    apart = fastar.barrier(a, b, whole, statistics_data=ones)
    assert apart == expected


def test_batches_of_one_sample_alone_are_refused() -> None:
    a, b, data = Net(0), Net(1), batches((16, 1))
    for given in ({"data": data[1:]}, {"data": data[:1], "statistics_data": data[1:]}):
        with pytest.raises(FastarError, match="no variance of a batch of one sample: give larger batches"):
            fastar.barrier(a, b, **given)
    matching = {"example_inputs": data[0][0], "method": "activation"}
    with pytest.raises(FastarError, match="a batch of one sample"):
        fastar.match(a, b, data=data[1:], **matching)
    assert list(fastar.match(a, b, data=data, **matching)) == ["inner.0"]


def test_only_a_batch_of_one_sample_is_looked_for() -> None:
    """Matching by activations ran the network once more where no batch was to be joined."""

    def runs(*sizes: int) -> int:
        seen: list[int] = []

        def noting(net: Net, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

        given = {"data": batches(sizes), "example_inputs": batches()[0][0], "method": "activation"}
        assert list(fastar.match(Net(0, noting), Net(1, noting), **given)) == ["inner.0"]
        return len(seen)

    assert runs(16, 2) == runs(17) + 2  # one more batch of each network
    assert runs(16, 1) == runs(17) + 1


def test_images_of_which_one_is_enough_are_not_joined() -> None:
    """Their statistics are of each place of an image: such batches gave numbers, and give the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of 3 % of draws the losses are the same to the last digit
        nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)) for _ in range(2)]
        images, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    ones = list(zip(images.split(4), labels.split(4), strict=True))
    found = fastar.barrier(nets[0], nets[1], ones, points=3)
    joined = fastar.barrier(nets[0], nets[1], ones, statistics_data=[(images, labels)], points=3)
    assert found.loss != joined.loss


class Of(nn.Module):
    """A network of named, of several, or of nested inputs."""

    def __init__(self, seed: int, kind: str):
        super().__init__()
        self.net, self.kind = Net(seed), kind

    def forward(self, x: Any, y: Any = None) -> Tensor:
        if self.kind == "nested":
            x, y = x["x"], x["more"][0]
        return self.net(x + y)


@pytest.mark.parametrize("kind", ["named", "several", "listed", "nested"])
def test_inputs_may_be_what_a_forward_takes(kind: str) -> None:
    """In barriers and in matching by data, in the forms of `example_inputs`."""

    def given(x: Tensor, y: Tensor) -> Any:
        forms = {"named": {"x": x, "y": y}, "several": (x, y), "listed": [x, y], "nested": ({"x": x, "more": [y]},)}
        return forms[kind]

    plain = batches((16, 17, 1))
    data = [(given(x.double(), x * 2), labels) for x, labels in plain]
    nets = [Of(seed, kind) for seed in range(2)]
    expected = fastar.barrier(*(net.net for net in nets), [(x * 3, labels) for x, labels in plain])
    assert fastar.barrier(*nets, data).loss == pytest.approx(expected.loss, rel=1e-5)  # x + 2 x is not quite 3 x
    if kind == "named":
        floats = [(given(x, x * 2), labels) for x, labels in plain]
        found = fastar.match(*nets, example_inputs=floats[0][0], method="activation", data=floats)
        assert list(found) == ["net.inner.0"]


def of_digits(folder: Path, *overrides: str) -> Session:
    """A run of digits whose images become one pixel in resnet18, and more in resnet8."""
    arch = "resnet8" if "resnet8" in overrides else "resnet18"
    given = [f"dataset.directory={folder}", "model.width=0.125", "device=cpu", *overrides]
    settings = load_settings(dataset="digits", arch=arch, overrides=[one for one in given if "=" in one])
    return new_session(settings, RunFolder(folder / "run"))


def test_a_last_batch_of_one_image_is_said_before_training(tmp_path: Path) -> None:
    """Training ended in torch's own error, after the data were written."""
    options = [*tiny(tmp_path / "data"), "--arch", "resnet18", "model.width=0.125", "dataset.limit=101"]
    said = refused("train-sources", *options, "train.drop_last=false", "--out", tmp_path / "run")
    assert said == (
        "train.drop_last=false: the last of 101 images in batches of 50 is alone, and batch-norm layer "
        "stages.3.0.bn1 takes no variance of one sample; set train.batch_size=51 or train.drop_last=true"
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(FastarError, match=r"train.batch_size=1: batch-norm layer stages.3.0.bn1 takes no variance"):
        check_batches(of_digits(tmp_path, "train.batch_size=1"), 101)
    alone = ("train.batch_size=50", "train.drop_last=false")
    for overrides in (alone[:1], (*alone, "train.batch_size=51"), (*alone, "resnet8")):
        check_batches(of_digits(tmp_path, *overrides), 101)


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 5), ("resnet8", 2)])
def test_statistics_of_pairs_of_images_leave_none_alone(arch: str, size: int, tmp_path: Path) -> None:
    """13 images in batches of 2, 3 or 4 leave one; where its variance is known the batches stay what they were."""
    session = of_digits(tmp_path, arch, "train.batch_size=2")
    assert statistics_size(with_data(session, train=range(13))) == size


class Few:
    """Some test images of 8x8."""

    def __len__(self) -> int:
        return 6

    def sequential(self, size: int) -> list[Batch]:
        assert size >= 6
        return [(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6))]


def test_checkpoints_at_the_ends_of_paths_are_run_too(tmp_path: Path) -> None:
    """As `fastar barrier` does, permuted ones beside what they were."""
    session = of_digits(tmp_path, "resnet8")
    session = with_data(session, test=Few())
    model = session.network.build(seed=3)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) - 0.7)  # units live
    checkpoint = Checkpoint(dict(model.state_dict()))
    moved = session.network.symmetry.random(0)
    assert not moved.is_identity()
    for permutation in (None, moved):
        check_endpoint(session, "b.pt", checkpoint, permutation)

    class Forgetful(Symmetry):
        def apply(self, *given: Any) -> dict[str, Tensor]:
            state = super().apply(*given)
            return {name: checkpoint.state[name] if name.endswith("running_mean") else v for name, v in state.items()}

    known = session.network.symmetry
    session.network.symmetry = Forgetful(known.groups, known.parameters, known.buffers)
    with pytest.raises(FastarError, match=r"the end of the path is not b\.pt: on one batch"):
        check_endpoint(session, "b.pt", checkpoint, moved)
