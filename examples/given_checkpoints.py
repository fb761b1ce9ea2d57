"""A star model of checkpoints that fastar did not train: four ResNets, saved as people save them.

    python examples/given_checkpoints.py

A plain PyTorch loop trains them on scikit-learn's digits and saves them: the state alone, under "state_dict" beside an
epoch, with the "module." of DataParallel, and in half precision. fastar is given the four files.
It prints losses and barriers. On the training data: star to its three sources 0.035, to the fourth network 0.818,
regular to regular 0.805. A star of three sources is not nearer to other networks than these are to each other.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fastar


class BasicBlock(nn.Module):
    """torchvision's block, with its names."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + kept)


class ResNet(nn.Module):
    """torchvision's ResNet, with two small stages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def train_plainly(seed: int, data: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
        schedule.step()
    return model


def save_four(folder: Path, data: tuple[Tensor, Tensor], epochs: int) -> list[Path]:
    """Train four networks, and save each in another way."""
    models = [train_plainly(seed, data, epochs) for seed in range(4)]
    saved = [
        models[0].state_dict(),
        {"epoch": epochs, "state_dict": models[1].state_dict()},
        {"epoch": epochs, "state_dict": nn.DataParallel(models[2]).state_dict()},
        {"model": models[3].half().state_dict()},
    ]
    paths = [folder / f"resnet-{n}.pt" for n in range(4)]
    for path, content in zip(paths, saved, strict=True):
        torch.save(content, path)
    return paths


def main(epochs: int = 10, samples: int = 1797) -> fastar.Star:
    digits = load_digits()
    images = torch.tensor(digits.images[:samples] / 16, dtype=torch.float32).unsqueeze(1)
    labels, kept = torch.tensor(digits.target[:samples]), samples * 4 // 5
    train, test = (images[:kept], labels[:kept]), (images[kept:], labels[kept:])
    recipe = fastar.Recipe(epochs=2 * epochs, batch_size=64, lr=0.05)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_four(Path(folder), train, epochs)
        star = fastar.train_star(ResNet, paths[:3], train, recipe, heldouts=paths[3:], test=test)
    print(star.table())
    return star


if __name__ == "__main__":
    main()
