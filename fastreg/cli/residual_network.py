"""A small residual network in plain PyTorch, for images of any size.

He et al., "Deep Residual Learning for Image Recognition", 2016: 3 x 3 convolutions with batch norm, a shortcut around
every two, and an average over the whole image before the last layer, in front of which elements are dropped.
"""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions, each with batch norm, and a shortcut around them.

    Args:
        channels: of the input.
        width: of the output.
        stride: of the first convolution, and of the shortcut's.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))
        self.activation = nn.ReLU()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the output's channels and size."""
        output = self.activation(self.norm1(self.convolution1(maps)))
        output = self.norm2(self.convolution2(output))
        sum_of_both: torch.Tensor = self.activation(output + self.shortcut(maps))
        return sum_of_both


class ResidualNetwork(nn.Module):
    """Classifies images of any size.

    Args:
        channels: of the images.
        width: channels of the first stage; each of the two that follow has twice as many at half the size.
        depth: blocks in each stage.
        classes: the number of outputs.
        dropout: the rate of the last layer's dropout.
    """

    def __init__(
        self, channels: int = 1, width: int = 16, depth: int = 1, classes: int = 10, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width * 2**stage for stage in range(3) for _ in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(before, after, after // before)
                for before, after in zip([width, *widths], widths, strict=False)
            )
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(widths[-1], classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        logits: torch.Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits
