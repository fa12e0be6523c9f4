"""A small vision transformer in plain PyTorch, for images of any size.

The patch embedding is a convolution whose kernel can be stretched to larger patches, and positions are sines and
cosines of the patch's place, so one set of weights serves a digit of 8 x 8 and a photograph of 427 x 640. Blocks
normalise first (layer norm); queries and keys are normalised a head (RMS norm). Elements of both branches are dropped.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; Beyer et al., "FlexiViT", 2023 (stretched patches);
Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023 (normalised queries and keys).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Self-attention over patches, with queries and keys of unit RMS."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Only the values have a bias: the softmax cancels one of the keys, and the norm all but cancels the queries'.
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, patches, width) to the same."""
        query = self.query_norm(self.query(tokens).unflatten(-1, (self.heads, -1)))
        key = self.key_norm(self.key(tokens).unflatten(-1, (self.heads, -1)))
        value = self.value(tokens).unflatten(-1, (self.heads, -1))
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        output: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on the normalised tokens and, with dropout, added to them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.attention_dropout = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, patches, width) to the same."""
        tokens = tokens + self.attention_dropout(self.attention(self.attention_norm(tokens)))
        output: torch.Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return output


class VisionTransformer(nn.Module):
    """Classifies images of any size.

    Args:
        patch_size: the side, in pixels, of the patches it is trained on.
        channels: of the images.
        width: of a token; divisible by 4 and by ``heads``.
        depth: the number of blocks.
        heads: of the attention.
        classes: the number of outputs.
        dropout: the rate of the branches' dropout.
    """

    def __init__(
        self,
        patch_size: int = 2,
        channels: int = 1,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        classes: int = 10,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor, patch_size: int | None = None) -> torch.Tensor:
        """Logits.

        Args:
            images: any size; padded with zeros to whole patches.
                Shape: ``(batch, channels, height, width)``
            patch_size: the side of the patches to cut; None for that of the training.

        Returns:
            Shape: ``(batch, classes)``
        """
        patches = self._embed(images, patch_size)
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2) + positions(
            rows, columns, patches.shape[1], images.device
        )
        for block in self.blocks:
            tokens = block(tokens)
        logits: torch.Tensor = self.head(self.norm(tokens).mean(dim=1))
        return logits

    def _embed(self, images: torch.Tensor, patch_size: int | None) -> torch.Tensor:
        kernel, trained = self.patch.weight, self.patch.weight.shape[-1]
        size = patch_size or trained
        if size != trained:
            # The sum over a patch keeps its scale: more pixels, each with less weight.
            kernel = F.interpolate(kernel, size=(size, size), mode="bilinear") * (trained / size) ** 2
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % size, 0, -height % size))
        return F.conv2d(images, kernel, self.patch.bias, stride=size)


def positions(rows: int, columns: int, width: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines of each patch's row and column, a quarter of the width each; shape (rows * columns, width)."""
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4, device=device)
    down = torch.arange(rows, device=device)[:, None] * frequencies
    across = torch.arange(columns, device=device)[:, None] * frequencies
    down = torch.cat((down.sin(), down.cos()), 1)[:, None].expand(-1, columns, -1)
    across = torch.cat((across.sin(), across.cos()), 1)[None].expand(rows, -1, -1)
    return torch.cat((down, across), 2).flatten(0, 1)
