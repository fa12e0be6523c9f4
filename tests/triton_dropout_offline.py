"""What of dropout's and DropBlock's Triton kernels is compiled without a GPU (triton_offline.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastreg._channels import dense_strides
from fastreg._units import CHANNEL, ELEMENT, SAMPLE, lanes
from fastreg.backends.triton import drop_block, dropout
from triton_offline import BF16, F16, F32, Launch, record

_UNITS = {ELEMENT: "elements", CHANNEL: "channels", SAMPLE: "samples"}
_NUMBERS = {F32: 0, BF16: 1, F16: 2}


def activations(
    shape: tuple[int, ...], dtype: torch.dtype, rows: bool = False, aligned: bool = True
) -> torch.Tensor:
    """Activations of which no element is ever written, and which therefore take no memory."""
    flat = torch.empty(math.prod(shape) + 1, dtype=dtype)
    flat = flat[:-1] if aligned else flat[1:]
    strides = dense_strides(shape, rows) if rows else torch.empty(shape, device="meta").stride()
    return flat.as_strided(shape, strides, flat.storage_offset())


def randomized(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """``tensor`` with random elements, the same for the same name."""
    generator = torch.Generator().manual_seed(len(name))
    return tensor.copy_(torch.randn(tensor.shape, generator=generator))


@dataclass(frozen=True)
class Dropout:
    """Forward and backward of a dropout; with the gradient of layer_scale, if there is one.

    Attributes:
        residual, layer_scale: their dtypes.
        row_scale: of how many leading dimensions.
        rows: the channels lie innermost.
        dynamic: the rate is in a tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: int = ELEMENT
    residual: torch.dtype | None = None
    row_scale: int = 0
    layer_scale: torch.dtype | None = None
    rows: bool = False
    dynamic: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        dtypes = f"{self.dtype}-{self.residual}".replace("torch.", "")
        tails = [name for name in ("rows", "dynamic") if getattr(self, name)]
        tails += [f"row_scale{self.row_scale}"] * bool(self.row_scale)
        tails += [f"layer_scale-{self.layer_scale}".replace("torch.", "")] * (self.layer_scale is not None)
        return "-".join(
            ["dropout", size, _UNITS[self.unit], dtypes, *tails, *["unaligned"] * (not self.aligned)]
        )

    @property
    def number(self) -> int:
        """By which the operators know the dtype."""
        return _NUMBERS[self.dtype]

    def activations(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random ones, the same for the same name."""
        return randomized(activations(self.shape, dtype or self.dtype, self.rows), name)

    def launches(self) -> list[Launch]:
        input = activations(self.shape, self.dtype, self.rows, self.aligned)
        residual = grad_output = row_scale = layer_scale = dynamic_threshold = None
        if self.residual is not None:
            residual = activations(self.shape, self.residual, self.rows, self.aligned)
        grad_output = activations(self.shape, self.residual or self.dtype, self.rows, self.aligned)
        if self.row_scale:
            row_scale = torch.empty(self.shape[: self.row_scale])
        if self.layer_scale is not None:
            layer_scale = torch.empty(self.shape[-1], dtype=self.layer_scale)
        threshold = lanes(self.unit) // 10
        if self.dynamic:
            dynamic_threshold = torch.tensor(threshold)
        mask = (torch.tensor(1), threshold, dynamic_threshold, self.unit, True)

        def call() -> None:
            dropout.dropout_fwd(input, residual, row_scale, layer_scale, *mask)
            if self.layer_scale is not None or self.residual not in (None, self.dtype):
                dropout.dropout_bwd(
                    *(grad_output, input, row_scale, layer_scale, *mask),
                    *(self.number, (True, layer_scale is not None)),
                )

        return record(call)


@dataclass(frozen=True)
class DropBlock:
    """Mask and application of a DropBlock, with a mask for each channel unless ``one_plane``."""

    shape: tuple[int, ...]
    block: int
    dtype: torch.dtype
    rows: bool = False
    anywhere: bool = False
    one_plane: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        tails = [name.replace("_", " ") for name in ("rows", "anywhere", "one_plane") if getattr(self, name)]
        return "-".join([f"drop_block{self.block}", size, dtype, *tails, *["unaligned"] * (not self.aligned)])

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.shape[0], 1 if self.one_plane else self.shape[1], *self.shape[2:])

    @property
    def blocks(self) -> tuple[int, ...]:
        """The block's size in every dimension."""
        return (self.block,) * (len(self.shape) - 2)

    def activations(self, name: str) -> torch.Tensor:
        """Random ones, the same for the same name."""
        return randomized(activations(self.shape, self.dtype, self.rows), name)

    def launches(self) -> list[Launch]:
        input = activations(self.shape, self.dtype, self.rows, self.aligned)
        scale = torch.empty(self.shape[0], dtype=torch.float64)

        def call() -> None:
            bits, _ = drop_block.drop_block_mask(
                *(torch.tensor(1), self.mask_shape, self.blocks, 2**20, None, self.anywhere)
            )
            drop_block.drop_block_apply(input, bits, scale)

        return record(call)


DROPOUTS = (
    Dropout((8192, 4096), BF16, residual=BF16),
    Dropout((8192, 4096), BF16),
    Dropout((8192, 4096), F32, residual=F32),
    Dropout((8192, 4096), BF16, residual=F32),
    Dropout((8192, 4096), F16, dynamic=True),
    Dropout((8192, 4096), BF16, residual=BF16, aligned=False),
    Dropout((16, 512, 1024), BF16, residual=BF16, row_scale=1, layer_scale=F32),
    Dropout((16, 512, 1024), BF16, SAMPLE, residual=BF16, layer_scale=F32),
    Dropout((16, 512, 1024), F32, SAMPLE, residual=F32, row_scale=2, layer_scale=F32, dynamic=True),
    Dropout((16, 512, 1024), BF16, residual=F32, layer_scale=BF16),
    Dropout((16, 512, 1022), BF16, residual=BF16, layer_scale=F32),
    Dropout((16, 512, 1001), F16, residual=F16, row_scale=1, layer_scale=F16),
    Dropout((32, 256, 56, 56), BF16, SAMPLE, residual=BF16),
    Dropout((32, 256, 28, 28), BF16, CHANNEL),
    Dropout((32, 256, 7, 7), BF16, CHANNEL),
    Dropout((32, 256, 7, 7), F32, CHANNEL, dynamic=True),
    Dropout((32, 256, 28, 28), BF16, CHANNEL, rows=True),
    Dropout((32, 256, 28, 28), F32, CHANNEL, rows=True),
    Dropout((32, 3, 56, 56), F16, CHANNEL, rows=True),
    Dropout((2**19, 2**13), BF16, SAMPLE, residual=BF16, layer_scale=F32),
)
DROP_BLOCKS = (
    DropBlock((32, 256, 56, 56), 7, BF16),
    DropBlock((32, 256, 28, 28), 7, BF16),
    DropBlock((32, 512, 14, 14), 7, F16, anywhere=True),
    DropBlock((32, 2048, 7, 7), 3, BF16),
    DropBlock((32, 256, 28, 28), 7, F32, one_plane=True),
    DropBlock((32, 256, 28, 28), 7, BF16, rows=True),
    DropBlock((32, 64, 56, 56), 7, F32, rows=True, one_plane=True),
    DropBlock((8, 64, 300, 300), 31, BF16, anywhere=True),
    DropBlock((4, 64, 8, 28, 28), 3, BF16),
    DropBlock((4, 64, 32, 112, 112), 5, F32, rows=True),
    DropBlock((32, 255, 14, 14), 3, BF16, one_plane=True, aligned=False),
    DropBlock((1, 2**16, 2**8, 2**8), 7, BF16),
)
CALLS = (*DROPOUTS, *DROP_BLOCKS)
