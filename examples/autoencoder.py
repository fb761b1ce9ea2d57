"""A star model of U-Nets that clean noisy digits: a dense loss, the mean squared error of every pixel.

    python examples/autoencoder.py

A batch is a tuple (noisy images, clean images). The noise is drawn by a torch Dataset, anew in each epoch; fastar seeds
it by epoch and sample, so that a training that was stopped goes on to the same bits.
It prints losses and barriers. On the training data: star to sources 0.003, star to heldouts 0.004, regular to regular
0.006, and 0.072 without matching.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastar


class UNet(nn.Module):
    """Images [batch, 1, 8, 8] -> images: down to 4 x 4 and up again, beside what was seen at 8 x 8."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        fine = self.first(images)
        return self.last(torch.cat([fine, self.up(self.down(fine))], dim=1))


class NoisyDigits(Dataset[tuple[Tensor, Tensor]]):
    """Digits with pixels from 0 to 1: (with noise, without)."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clean = self.images[index]
        return clean + 0.5 * torch.randn_like(clean), clean


def main(epochs: int = 10, number: int = 6, samples: int = 1797) -> fastar.Star:
    images = torch.tensor(load_digits().images[:samples] / 16, dtype=torch.float32).unsqueeze(1)
    kept = len(images) * 4 // 5
    train, test = NoisyDigits(images[:kept]), NoisyDigits(images[kept:])
    recipe = fastar.Recipe(epochs=epochs, batch_size=64, lr=0.05, star={"epochs": 2 * epochs})
    sources = fastar.train_sources(UNet, train, recipe, number=number, loss="mse")
    heldouts = fastar.train_sources(UNet, train, recipe, number=2, kind="heldout", loss="mse")
    star = fastar.train_star(UNet, sources, train, recipe, heldouts=heldouts, test=test, loss="mse")
    print(star.table())
    return star


if __name__ == "__main__":
    main()
