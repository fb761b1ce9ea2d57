"""What batch-norm statistics are re-estimated from: shuffled, augmented batches, whatever the order of the file."""

from pathlib import Path

import torch
from session_cases import with_data

from fastar.config import Augmentation, load_settings
from fastar.data.in_memory import DeviceDataset
from fastar.experiments.session import Session, new_session
from fastar.experiments.statistics_batches import statistics_batches
from fastar.runs import RunFolder


def session_over(tmp_path: Path, labels: torch.Tensor, batch_size: int) -> Session:
    settings = load_settings(dataset="digits", overrides=[f"train.batch_size={batch_size}", "device=cpu"])
    session = new_session(settings, RunFolder(tmp_path))
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 1).contiguous()
    held = DeviceDataset(images, labels, mean=(0.0,), std=(1 / 255,), augmentation=Augmentation(pad=2))
    return with_data(session, train=held)


def test_batches_of_a_file_sorted_by_class_are_mixed(tmp_path: Path) -> None:
    labels = torch.arange(10).repeat_interleave(64)
    batches = list(statistics_batches(session_over(tmp_path, labels, 64)))
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == labels.tolist()
    assert min(len(y.unique()) for _, y in batches) >= 8, "a batch of 64 random images of 10 classes has nearly all"


def test_every_image_counts_once_and_none_is_left_alone(tmp_path: Path) -> None:
    labels = torch.arange(129) % 10
    sizes = [len(y) for _, y in statistics_batches(session_over(tmp_path, labels, 64))]
    assert sum(sizes) == 129
    assert min(sizes) > 1


def test_they_are_augmented_and_the_same_each_time(tmp_path: Path) -> None:
    session = session_over(tmp_path, torch.full((64,), 9), 64)
    (images, _), (again, _) = next(iter(statistics_batches(session))), next(iter(statistics_batches(session)))
    assert torch.equal(images, again)
    assert (images == 0).any(), "cropping after padding moves zeros in"
    (whole, _) = next(iter(session.data.splits()["train"]()))
    assert (whole != 0).all(), "losses are measured on the images as they are"
