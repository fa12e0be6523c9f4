"""What of group and instance norm's Triton kernels is compiled without a GPU (triton_offline.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastreg._activations import GELU, GELU_TANH, HARDSWISH, IDENTITY, LEAKY_RELU, NAMES, RELU, SILU
from fastreg._channels import dense_strides
from fastreg.backends.triton import group_norm, instance_norm
from triton_offline import BF16, F16, F32, Launch, record


@dataclass(frozen=True)
class Layer:
    """Forward and backward of a group norm; of an instance norm with running statistics if there are no ``groups``."""

    shape: tuple[int, ...]
    groups: int
    rows: bool
    dtype: torch.dtype
    activation: int = IDENTITY
    parameter: torch.dtype | None = F32
    aligned: bool = True

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        dtypes = f"{self.dtype}-{self.parameter}".replace("torch.", "")
        name = f"group{self.groups}" if self.groups else "instance"
        family = "rows" if self.rows else "planes"
        return "-".join(
            [name, size, family, dtypes, NAMES[self.activation], *["unaligned"] * (not self.aligned)]
        )

    def launches(self) -> list[Launch]:
        input, grad_output = self._activations(), self._activations()
        channels = self.shape[1]
        groups = self.groups or channels
        weight = bias = None
        if self.parameter is not None:
            weight, bias = torch.empty(2, channels, dtype=self.parameter).unbind()
        running = torch.empty(2, channels).unbind()
        statistics = torch.empty(2, self.shape[0], groups)
        end = (self.activation, 0.1)

        def forward() -> None:
            if self.groups:
                group_norm.group_norm_fwd(input, groups, weight, bias, 1e-5, *end)
            else:
                instance_norm.instance_norm_fwd(input, weight, bias, *running, 0.1, 1e-5, *end)

        def backward() -> None:
            group_norm.group_norm_bwd(
                grad_output, input, groups, statistics, weight, bias, *end, (True, True, True)
            )

        return record(forward) + record(backward)

    def _activations(self) -> torch.Tensor:
        """Activations of which no element is ever written, and which therefore take no memory."""
        flat = torch.empty(math.prod(self.shape) + 1, dtype=self.dtype)
        flat = flat[:-1] if self.aligned else flat[1:]
        return flat.as_strided(self.shape, dense_strides(self.shape, self.rows), flat.storage_offset())


# Layers of a ResNet and of a diffusion model, with the activations and dtypes spread over them; the largest slabs of
# each kind; and odd sizes.
LAYERS = (
    Layer((32, 64, 56, 56), 32, False, BF16, RELU),
    Layer((2, 320, 64, 64), 32, True, BF16, SILU),
    Layer((8, 1280, 16, 16), 32, True, BF16, SILU),
    Layer((32, 256, 56, 56), 32, False, BF16, SILU, parameter=BF16),
    Layer((32, 64, 56, 56), 32, True, F16, LEAKY_RELU, parameter=F16),
    Layer((16, 1280, 8, 8), 32, True, F32, HARDSWISH),
    Layer((16, 640, 32, 32), 32, False, F32, GELU),
    Layer((32, 2048, 7, 7), 32, True, BF16, RELU),
    Layer((32, 2048, 7, 7), 32, False, BF16, GELU_TANH, parameter=None),
    Layer((32, 96, 56, 56), 1, True, BF16, IDENTITY),
    Layer((1, 128, 8, 64, 64), 32, False, F32, SILU, parameter=None),
    Layer((4096, 256), 32, True, BF16, SILU),
    Layer((64, 100000), 1, True, BF16, GELU),
    Layer((32, 512, 7, 7), 0, False, BF16, RELU),
    Layer((32, 64, 56, 56), 0, True, BF16, RELU),
    Layer((5, 21, 33, 31), 3, False, BF16, RELU),
    Layer((16, 128, 16, 16), 32, True, BF16, SILU, aligned=False),
)
