"""The demo's real data: handwritten digits and two photographs that ship inside scikit-learn; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split


@dataclass(frozen=True)
class Digits:
    """8 x 8 grey images, (count, 1, 8, 8), standardised by the training images' mean and deviation, with labels."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def digits(device: torch.device, limit: int | None = None) -> Digits:
    """The digits: the first four fifths to train on, the last fifth to test.

    The split is not shuffled, because the file is in the order of its writers: the test digits are from hands that the
    model has not seen, which is harder and closer to use.

    Args:
        limit: keep only so many training images.
    """
    found = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        found.images, found.target, test_size=0.2, shuffle=False
    )
    mean, deviation = train.mean(), train.std()

    def images(values: numpy.ndarray) -> torch.Tensor:
        return torch.tensor((values - mean) / deviation, dtype=torch.float32, device=device)[:, None]

    def labels(values: numpy.ndarray) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Digits(images(train)[:limit], labels(train_labels)[:limit], images(test), labels(test_labels))


def photographs(device: torch.device) -> torch.Tensor:
    """The temple and the flower in grey at their own size, standardised: (2, 1, 427, 640)."""
    colour = numpy.stack(load_sample_images().images)
    grey = torch.tensor(colour, dtype=torch.float32, device=device).mean(dim=-1)[:, None]
    return (grey - grey.mean()) / grey.std()


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images, each moved by up to one pixel either way; the background fills the gap."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    down, across = torch.randint(0, 3, (2, count), generator=generator).to(images.device)
    row = (down[:, None] + torch.arange(height, device=images.device))[:, :, None]
    column = (across[:, None] + torch.arange(width, device=images.device))[:, None, :]
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded[sample, 0, row, column][:, None]
