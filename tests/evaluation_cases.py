"""Models, rows and data for the tests of evaluation, and plain one-at-a-time evaluation in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.evaluation.batch_norm import Statistics
from fastar.flat import FlatLayout
from fastar.models import build_model

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def resnet(seed: int) -> nn.Module:
    """A narrow ResNet-8 whose every tensor is random, batch-norm's parameters and statistics too."""
    model = build_model("resnet8", input_shape=(3, 8, 8), classes=4, seed=seed, width=0.5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3 + (not name.endswith("bias")))
            if name.endswith("running_var"):
                value.abs_().add_(0.1)
    return model


def mlp(seed: int) -> nn.Module:
    return build_model("mlp", input_shape=(3, 8, 8), classes=4, seed=seed, width=12, depth=2)


def row(model: nn.Module) -> Tensor:
    return FlatLayout.from_module(model).flatten(model.state_dict())


def data(count: int = 50, size: int = 16, seed: int = 0) -> Batches:
    """50 samples in batches of 16: the last one holds 2."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator) * 2 + 0.5
    labels = torch.randint(4, (count,), generator=generator)
    return lambda: zip(images.split(size), labels.split(size), strict=True)


def alone(model: nn.Module, batches: Batches, statistics: Statistics | None = None) -> tuple[float, float]:
    """Mean loss and accuracy of one model, plainly, in float64."""
    model = copy.deepcopy(model).double().eval()
    if statistics:
        model.load_state_dict({**model.state_dict(), **statistics})
    images, labels = (torch.cat(part) for part in zip(*batches(), strict=True))
    with torch.no_grad():
        logits = model(images.double())
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def population_by_hand(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """What the statistics should be, in float64: each batch-norm layer's inputs, batch by batch, in training mode.

    Every layer's inputs are kept, and the mean and biased variance taken of all of them at once.
    """
    model = copy.deepcopy(model).double().train()
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            inputs[name] = []
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].movedim(1, 0)))
    with torch.no_grad():
        for images, _ in batches():
            model(images.double())
    found = {}
    for name, parts in inputs.items():
        everything = torch.cat([part.flatten(1) for part in parts], 1)
        found[f"{name}.running_mean"] = everything.mean(1)
        found[f"{name}.running_var"] = everything.var(1, correction=0)
    return found


def snapshot(model: nn.Module) -> dict[str, object]:
    """All of a model's state that evaluation could disturb: bits, storage, modes, momenta, hooks."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "storage": [value.data_ptr() for value in model.state_dict().values()],
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    values = before["values"]
    assert isinstance(values, dict)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name
    assert {k: v for k, v in after.items() if k != "values"} == {k: v for k, v in before.items() if k != "values"}
