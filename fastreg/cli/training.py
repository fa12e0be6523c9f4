"""The demo's training: the same network, plain and converted, trained side by side on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import fastreg
from fastreg.cli import images
from fastreg.cli.residual_network import ResidualNetwork
from fastreg.cli.timing import synchronize
from fastreg.cli.vision_transformer import VisionTransformer
from fastreg.convert import Report

PLAIN, CONVERTED = NAMES = ("plain", "converted")
VISION_TRANSFORMER, RESIDUAL_NETWORK = NETWORKS = ("vision transformer", "residual network")

# With nothing dropped, gradients differ by fp32 rounding alone. In training the two models draw masks of their own, as
# two plain ones do: tried with these settings, their losses in the last epoch are 0.015 (the residual network's 0.002)
# apart, those of plain and converted 0.009 (0.005). An accuracy over 360 images moves in steps of 0.003.
GRADIENT_ALLOWANCE = 1e-4
LOSS_ALLOWANCE = 0.05
ACCURACY_ALLOWANCE = 0.04


@dataclass(frozen=True)
class Settings:
    """The model and its training.

    Attributes:
        network: ``"vision transformer"`` or ``"residual network"``.
        heads: of the vision transformer.
        train_limit: train on so many images only; None for all.
    """

    network: str = VISION_TRANSFORMER
    seed: int = 0
    epochs: int = 15
    batch: int = 64
    width: int = 128
    depth: int = 4
    heads: int = 4
    learning_rate: float = 2e-3
    train_limit: int | None = None


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave, by model's name: the mean training loss and the accuracy on the test images.

    Attributes:
    """

    number: int
    loss: dict[str, float]
    accuracy: dict[str, float]

    @property
    def loss_difference(self) -> float:
        """Between the two models' losses."""
        return abs(self.loss[PLAIN] - self.loss[CONVERTED])


@dataclass
class Training:
    """Two models of one seed on their way.

    Attributes:
        report: what ``convert`` did to the second.
        step_seconds: of every step (forward, backward, optimiser), by model's name; the two take turns.
        gradient_difference: before the first step and with nothing dropped, the largest over the parameters, as a
            share of their largest.
    """

    models: dict[str, torch.nn.Module]
    report: Report
    epochs: list[Epoch] = field(default_factory=list)
    step_seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})
    gradient_difference: float = 0.0

    @property
    def loss_difference(self) -> float:
        """The difference between the two models' losses in the last epoch."""
        return self.epochs[-1].loss_difference

    @property
    def accuracy_difference(self) -> float:
        """The difference between the two models' accuracies at the end."""
        last = self.epochs[-1].accuracy
        return abs(last[PLAIN] - last[CONVERTED])

    def disagreements(self) -> list[str]:
        """What is further apart than rounding explains, a line each."""
        limits = (
            ("first gradients", self.gradient_difference, GRADIENT_ALLOWANCE),
            ("last losses", self.loss_difference, LOSS_ALLOWANCE),
            ("final accuracies", self.accuracy_difference, ACCURACY_ALLOWANCE),
        )
        return [
            f"the {what} differ by {found:.3g}, allowed {limit}"
            for what, found, limit in limits
            if not found <= limit
        ]


def make_model(settings: Settings, device: torch.device) -> torch.nn.Module:
    """The model; the same weights for the same seed, on every device."""
    torch.manual_seed(settings.seed)
    model: torch.nn.Module
    if settings.network == RESIDUAL_NETWORK:
        model = ResidualNetwork(width=settings.width, depth=settings.depth)
    else:
        model = VisionTransformer(width=settings.width, depth=settings.depth, heads=settings.heads)
    return model.to(device)


def start(settings: Settings, device: torch.device) -> Training:
    """Both models, of one seed; the second converted."""
    models = {name: make_model(settings, device) for name in NAMES}
    return Training(models, convert(models[CONVERTED]))


def convert(model: torch.nn.Module) -> Report:
    """Convert a model as the demo does."""
    return fastreg.convert(model, fuse=True)


def steps_of(settings: Settings, digits: images.Digits) -> int:
    """The optimiser's steps in one epoch; a last, smaller batch is left out."""
    return len(digits.train_images) // settings.batch


def train(
    training: Training, settings: Settings, digits: images.Digits, advance: Callable[[], None]
) -> Iterator[Epoch]:
    """Train both models, a step of one and then the same step of the other; yields every epoch.

    Args:
        advance: called after each step.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    count, steps = len(digits.train_images), steps_of(settings, digits)
    optimisers = {
        name: torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.05)
        for name, model in training.models.items()
    }
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.learning_rate, total_steps=settings.epochs * steps
        )
        for optimiser in optimisers.values()
    ]
    training.gradient_difference = _gradient_difference(
        training.models, digits.train_images[: settings.batch], digits.train_labels[: settings.batch]
    )
    for number in range(1, settings.epochs + 1):
        order = torch.randperm(count, generator=generator)
        losses: dict[str, list[float]] = {name: [] for name in NAMES}
        for step in range(steps):
            chosen = order[step * settings.batch : (step + 1) * settings.batch].to(digits.train_images.device)
            batch = images.shifted(digits.train_images[chosen], generator)
            for name, model in training.models.items():
                loss, seconds = _step(model, optimisers[name], batch, digits.train_labels[chosen])
                losses[name].append(loss)
                training.step_seconds[name].append(seconds)
            for schedule in schedules:
                schedule.step()
            advance()
        epoch = Epoch(
            number,
            {name: sum(values) / len(values) for name, values in losses.items()},
            {name: accuracy(model, digits) for name, model in training.models.items()},
        )
        training.epochs.append(epoch)
        yield epoch


def _step(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer, batch: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """One step of one model: its loss and its seconds. The gradients stay until the next step."""
    model.train()
    synchronize(batch.device)
    begin = time.perf_counter()
    optimiser.zero_grad()
    loss = F.cross_entropy(model(batch), labels)
    loss.backward()
    optimiser.step()
    synchronize(batch.device)
    return loss.item(), time.perf_counter() - begin


def _gradient_difference(
    models: dict[str, torch.nn.Module], batch: torch.Tensor, labels: torch.Tensor
) -> float:
    """The largest difference between the two models' gradients with nothing dropped, as a share of the largest."""
    for name, model in models.items():
        dropouts = [each for each in model.modules() if isinstance(each, torch.nn.Dropout)]
        rates: list[Any] = [each.p for each in dropouts]
        for each in dropouts:
            # A rate of 0 as a number would leave out fastreg's kernels; what is in a tensor, only they know.
            zero: Any = torch.zeros((), device=batch.device) if name == CONVERTED else 0.0
            each.p = zero
        F.cross_entropy(model.train()(batch), labels).backward()
        for each, rate in zip(dropouts, rates, strict=True):
            each.p = rate
    pairs = zip(models[PLAIN].parameters(), models[CONVERTED].parameters(), strict=True)
    differences = []
    for plain, converted in pairs:
        assert plain.grad is not None
        assert converted.grad is not None
        differences.append(
            float((plain.grad - converted.grad).abs().max() / plain.grad.abs().max().clamp_min(1e-12))
        )
    return max(differences)


@torch.no_grad()
def accuracy(model: torch.nn.Module, digits: images.Digits) -> float:
    """The share of the test images that are classified right; leaves the model in evaluation mode."""
    model.eval()
    return float((model(digits.test_images).argmax(1) == digits.test_labels).double().mean())
