"""Networks like trained ones in seconds: some steps on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastar.models import build_model
from fastar.runtime.seeds import derive_seed

INPUT_SHAPE = (3, 8, 8)
EXAMPLE = torch.zeros(2, *INPUT_SHAPE, dtype=torch.float32, device="cpu")
BATCH = 64


def digits() -> tuple[Tensor, Tensor, str]:
    """Images [n, 3, 8, 8] of mean 0 and deviation 1, labels, and what they are."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(10, (1797,), generator=generator, device="cpu")
        grey = torch.randn(10, 8, 8, generator=generator, dtype=torch.float32, device="cpu")[labels] + torch.randn(
            1797, 8, 8, generator=generator, dtype=torch.float32, device="cpu"
        )
        what = "ten noisy patterns"
    else:
        data = load_digits()
        grey = torch.tensor(data.images, dtype=torch.float32, device="cpu")
        labels = torch.tensor(data.target, dtype=torch.int64, device="cpu")
        what = "scikit-learn digits"
    grey = (grey - grey.mean()) / grey.std()
    return grey[:, None].expand(-1, 3, -1, -1).contiguous(), labels, what


def train(model: nn.Module, steps: int, seed: int) -> nn.Module:
    """`steps` steps of SGD (rate 0.05, momentum 0.9) where the model is."""
    device = next(model.parameters()).device
    images, labels = (tensor.to(device) for tensor in digits()[:2])
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    batches = torch.randint(len(images), (steps, BATCH), generator=generator, device="cpu").to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for batch in batches:
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def trained(
    arch: str, seed: int, steps: int, cache: Path | None, width: float | None, device: torch.device
) -> nn.Module:
    """A network after `steps` steps, from the folder `cache` if it is there; `width` as the architecture's setting."""
    # An mlp's width is a number of units.
    options: dict[str, Any] = {} if width is None else {"width": int(width) if width == int(width) else width}
    model = build_model(arch, input_shape=INPUT_SHAPE, classes=10, seed=seed, **options).to(device)
    tag = "-".join([arch, *(f"{k}{v}" for k, v in options.items()), str(steps), f"{seed:03d}"])
    path = None if cache is None else cache / f"{tag}.pt"
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True, map_location=device))
        return model
    train(model, steps, seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model
