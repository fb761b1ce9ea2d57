"""A star model of regression networks: mean squared error on scikit-learn's diabetes data.

    python examples/regression.py

442 patients of ten measurements each; the target is how far the disease went within a year, in standard deviations.
It prints losses and barriers. On the training data, ten sources: star to sources 0.040, star to heldouts 0.042, regular
to regular 0.071, and 0.436 without matching.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import fastar


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def patients() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data: (measurements [n, 10], target [n, 1])."""
    inputs, targets = (torch.tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = ((targets - targets.mean()) / targets.std()).unsqueeze(1)
    return (inputs[:342], targets[:342]), (inputs[342:], targets[342:])


def main(epochs: int = 40, number: int = 10) -> fastar.Star:
    train, test = patients()
    recipe = fastar.Recipe(epochs=epochs, batch_size=32, lr=0.02, weight_decay=1e-2, star={"epochs": 3 * epochs})
    sources = fastar.train_sources(build, train, recipe, number=number, loss="mse")
    heldouts = fastar.train_sources(build, train, recipe, number=3, kind="heldout", loss="mse")
    star = fastar.train_star(build, sources, train, recipe, heldouts=heldouts, test=test, loss="mse")
    print(star.table())
    return star


if __name__ == "__main__":
    main()
