"""What of batch norm's Triton kernels is compiled without a GPU (triton_offline.py): calls that reach every kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastreg._activations import GELU, GELU_TANH, HARDSWISH, IDENTITY, LEAKY_RELU, NAMES, RELU, SILU
from fastreg._channels import channel_view, dense_strides, sign_bytes
from fastreg.backends.triton import batch_norm
from triton_offline import BF16, F16, F32, Launch, record


@dataclass(frozen=True)
class Layer:
    """Forward and backward of a batch norm, in training unless ``evaluation``."""

    shape: tuple[int, ...]
    rows: bool
    dtype: torch.dtype
    activation: int = IDENTITY
    residual: bool = False
    parameter: torch.dtype | None = F32
    evaluation: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        dtypes = f"{self.dtype}-{self.parameter}".replace("torch.", "")
        tails = [name for name in ("residual", "evaluation") if getattr(self, name)] + ["unaligned"] * (
            not self.aligned
        )
        family = "rows" if self.rows else "planes"
        return "-".join(["batch", size, family, dtypes, NAMES[self.activation], *tails])

    def launches(self) -> list[Launch]:
        input, grad_output = self._activations(), self._activations()
        residual = self._activations() if self.residual else None
        vectors = [None] * 4
        if self.parameter is not None:
            vectors = list(torch.empty(4, self.shape[1], dtype=self.parameter).unbind())
        running = vectors[2:]
        statistics = torch.empty(2, self.shape[1])
        signs = None
        if self.residual and self.activation in (RELU, LEAKY_RELU):
            view = channel_view(input)
            assert view is not None
            signs = torch.empty(sign_bytes(view), dtype=torch.uint8)
        end = (self.activation, 0.1)
        mask = (True, self.residual and self.activation != IDENTITY, *[self.parameter is not None] * 2)

        def forward() -> None:
            if self.evaluation:
                mean, variance = running
                assert mean is not None
                assert variance is not None
                batch_norm.batch_norm_eval(input, residual, *vectors[:2], mean, variance, 1e-5, *end, True)
            else:
                batch_norm.batch_norm_fwd(
                    input, residual, *vectors[:2], *running, 0.1, 1e-5, *end, True, True
                )

        def backward() -> None:
            batch_norm.batch_norm_bwd(
                *(grad_output, input, residual if signs is None else None, signs, statistics, *vectors[:2]),
                *(not self.evaluation, *end, mask),
            )

        return record(forward) + record(backward)

    def _activations(self) -> torch.Tensor:
        """Activations of which no element is ever written, and which therefore take no memory."""
        flat = torch.empty(math.prod(self.shape) + 1, dtype=self.dtype)
        flat = flat[:-1] if self.aligned else flat[1:]
        return flat.as_strided(self.shape, dense_strides(self.shape, self.rows), flat.storage_offset())


# Layers of a ResNet, with the activations and dtypes spread over them; the largest slabs of each kind; and odd sizes.
LAYERS = (
    Layer((32, 64, 56, 56), False, BF16, RELU, residual=True),
    Layer((32, 64, 56, 56), False, F32, SILU),
    Layer((32, 64, 56, 56), False, F16, GELU_TANH, residual=True, parameter=F16),
    Layer((32, 64, 56, 56), True, BF16, RELU, residual=True),
    Layer((32, 64, 56, 56), True, F32, GELU, residual=True),
    Layer((32, 256, 14, 14), True, BF16, SILU, parameter=BF16),
    Layer((32, 256, 14, 14), False, BF16, RELU),
    Layer((32, 256, 28, 28), False, BF16, RELU, residual=True),
    Layer((16, 256, 28, 28), False, F32, GELU),
    Layer((32, 512, 7, 7), False, BF16, RELU, residual=True),
    Layer((128, 256, 8, 8), False, BF16, SILU, residual=True),
    Layer((128, 256, 8, 8), False, F32, RELU),
    Layer((256, 4096), True, BF16, RELU, residual=True),
    Layer((256, 4096), True, F32, HARDSWISH),
    Layer((32, 64, 56, 56), False, BF16, LEAKY_RELU, residual=True, evaluation=True),
    Layer((32, 256, 14, 14), True, BF16, SILU, evaluation=True),
    Layer((5, 17, 33, 31), False, BF16, RELU),
    Layer((1000, 301), True, F16, SILU, parameter=None),
    Layer((32, 256, 14, 14), True, BF16, RELU, aligned=False),
)
