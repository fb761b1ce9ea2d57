"""`fastar barrier` beside a slow computation with none of its code: plain torch in float64, a model at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_cases import fastar
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.config import dataset_spec
from fastar.data.raw.digits import read_digits
from fastar.data.splits import chosen_images
from fastar.models import build_model

OPTIONS = {"mlp": {"width": 12}, "resnet8": {"width": 0.25}}
LIMIT, SHARE, POINTS = 300, 0.2, 5

Images = dict[str, tuple[Tensor, Tensor]]


def network(arch: str, seed: int) -> nn.Module:
    return build_model(arch, input_shape=(1, 8, 8), classes=10, seed=seed, **OPTIONS[arch])


def images_of_all_splits() -> Images:
    """Normalised by all that lie in the training set's file; float64."""
    raw, found = read_digits(dataset_spec("digits")), {}
    pixels = {s: torch.from_numpy(getattr(raw, s).images.squeeze(-1)[:, None] / 255.0) for s in ("train", "test")}
    mean, std = pixels["train"].mean(), pixels["train"].std(correction=0)
    for split, limit in (("train", LIMIT), ("validation", None), ("test", None)):
        file = "test" if split == "test" else "train"
        labels = getattr(raw, file).labels
        index = chosen_images(labels, split, validation=SHARE, limit=limit, classes="0123456789", name="digits")
        found[split] = (pixels[file][index] - mean) / std, torch.from_numpy(labels[index])
    return found


def trained(arch: str, seed: int, images: Images) -> nn.Module:
    """So long that there is a barrier between two of them."""
    model = network(arch, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images["train"][0].float()), images["train"][1]).backward()
        optimizer.step()
    return model


def by_hand(arch: str, ends: list[nn.Module], images: Images) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    first, second = (dict(model.double().named_parameters()) for model in ends)
    for k in range(POINTS):
        t, model = k / (POINTS - 1), network(arch, 0).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_((1 - t) * first[name] + t * second[name])
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.register_forward_hook(keep_statistics)
            model.train()(images["train"][0])
            for split, (x, y) in images.items():
                logits = model.eval()(x)
                found.setdefault(f"{split}_loss", []).append(float(F.cross_entropy(logits, y)))
                found.setdefault(f"{split}_accuracy", []).append(float((logits.argmax(1) == y).double().mean()))
    return found


def keep_statistics(layer: nn.BatchNorm2d, args: tuple[Tensor], _: Tensor) -> None:
    """Running statistics become those of the one batch that is shown."""
    if layer.training:
        layer.running_mean, layer.running_var = args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), correction=0)


@pytest.mark.parametrize("arch", sorted(OPTIONS))
def test_barrier_by_hand(arch: str, tmp_path: Path) -> None:
    images = images_of_all_splits()
    models = [trained(arch, seed, images) for seed in (1, 2)]
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for model, file in zip(models, files, strict=True):
        torch.save(model.state_dict(), file)
    outcome = fastar(
        *("barrier", *files, "--no-match", "--json", "--points", POINTS, "--dataset", "digits", "--arch", arch),
        *(f"model.width={OPTIONS[arch]['width']}", f"dataset.directory={tmp_path / 'data'}", f"dataset.limit={LIMIT}"),
        # One batch holds all: its statistics are the population's, whatever the order.
        *(f"dataset.validation={SHARE}", f"train.batch_size={LIMIT}", "evaluation.batch_size=70", "device=cpu"),
    )
    assert outcome.code == 0, outcome.err
    (path,) = json.loads(outcome.out)["paths"]
    wanted = by_hand(arch, models, images)
    for name, values in wanted.items():
        assert path[name] == pytest.approx(values, rel=5e-5), name  # fp32 against float64, nine layers deep
    for split in ("train", "validation", "test"):
        losses = wanted[f"{split}_loss"]
        gaps = [loss - losses[0] - k / (POINTS - 1) * (losses[-1] - losses[0]) for k, loss in enumerate(losses)]
        assert max(gaps) > 0.1
        assert path[f"{split}_barrier"] == pytest.approx(max(gaps), rel=5e-4)  # a difference of the above
        assert path[f"{split}_largest_loss"] == max(path[f"{split}_loss"])
        right = wanted[f"{split}_accuracy"]
        falls = [one - right[0] - k / (POINTS - 1) * (right[-1] - right[0]) for k, one in enumerate(right)]
        assert path[f"{split}_accuracy_barrier"] == pytest.approx(min(falls), abs=1e-12)
