"""What of the Triton kernels is compiled for dropout + residual + norm without a GPU (triton_offline.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastreg.backends.reference.dropout import DTYPES
from fastreg.backends.triton._dropout_add_branch import Branch
from fastreg.backends.triton.dropout_add_layer_norm import backward, forward
from triton_dropout_offline import activations
from triton_offline import BF16, F16, F32, ROWS, Launch, record


@dataclass(frozen=True)
class DropoutAddNorm:
    """A forward, or a backward asked for ``gradients`` of input, residual, weight, bias and layer_scale (l).

    Attributes:
        sum: the dtype of sum and residual.
        parameter: of weight, bias and layer_scale.
        scaled: there are row_scale and layer_scale.
        drops: there is a seed.
        keeps: the sum is written.
        dynamic: the rate is in a tensor.
    """

    hidden: int
    dtype: torch.dtype
    sum: torch.dtype
    parameter: torch.dtype = F32
    centred: bool = True
    gradients: str = ""
    scaled: bool = False
    drops: bool = True
    keeps: bool = True
    dynamic: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        dtypes = f"{self.dtype}-{self.sum}-{self.parameter}".replace("torch.", "")
        tails = [f"d_{self.gradients}"] * bool(self.gradients)
        tails += [name for name in ("scaled", "dynamic") if getattr(self, name)]
        tails += [f"not_{name}" for name in ("drops", "keeps", "aligned") if not getattr(self, name)]
        return "-".join(
            [f"dropout_add_{'layer' if self.centred else 'rms'}", str(self.hidden), dtypes, *tails]
        )

    def launches(self) -> list[Launch]:
        weight, bias, layer_scale = torch.empty(3, self.hidden, dtype=self.parameter).unbind()
        parameters = (weight, bias if self.centred else None)
        branch = Branch(
            torch.empty(ROWS) if self.scaled else None,
            layer_scale if self.scaled else None,
            torch.tensor(1) if self.drops else None,
            6554,
            torch.tensor(6554) if self.dynamic else None,
        )
        input, residual = self._rows(self.dtype), self._rows(self.sum)
        if not self.gradients:
            return record(
                lambda: forward(
                    *(input, residual, 1, *parameters, branch, 1e-5, False, self.keeps), centred=self.centred
                )
            )
        statistics = torch.empty((2, ROWS) if self.centred else (ROWS,))
        mask = [name in self.gradients for name in "irwbl"]
        return record(
            lambda: backward(
                *(self._rows(self.dtype), residual, self._rows(self.sum), input, 1, statistics),
                *(*parameters, branch, DTYPES.index(self.dtype), mask),
                centred=self.centred,
            )
        )

    def _rows(self, dtype: torch.dtype) -> torch.Tensor:
        return activations((ROWS, self.hidden), dtype, aligned=self.aligned)


# Sizes at every limit of _launch.py, with all there may be beside the rows, and with as little as there usually is.
SHAPES = (
    *(DropoutAddNorm(hidden, BF16, BF16, scaled=True) for hidden in (64, 1000, 7168, 8192, 28672, 32768)),
    *(DropoutAddNorm(hidden, F32, F32, scaled=True) for hidden in (64, 7168, 14336, 20480, 65536)),
    *(DropoutAddNorm(hidden, BF16, F32, scaled=True) for hidden in (1024, 20480)),
    *(DropoutAddNorm(hidden, BF16, BF16, scaled=True) for hidden in (3, 257, 1002, 8191)),
    DropoutAddNorm(262144, BF16, BF16, scaled=True),
    DropoutAddNorm(4096, BF16, BF16),
    DropoutAddNorm(4096, F16, F32, F16, centred=False, keeps=False, dynamic=True),
    DropoutAddNorm(1024, BF16, BF16, drops=False),
    DropoutAddNorm(1024, BF16, BF16, scaled=True, aligned=False),
    *(DropoutAddNorm(hidden, BF16, BF16, gradients="ir", scaled=True) for hidden in (1024, 14336, 20480)),
    *(DropoutAddNorm(hidden, F32, F32, gradients="ir", scaled=True) for hidden in (7168, 14336)),
    *(
        DropoutAddNorm(hidden, BF16, BF16, gradients="irwb", scaled=True)
        for hidden in (64, 1000, 1024, 6144, 8192, 12288, 65536)
    ),
    *(DropoutAddNorm(hidden, F32, F32, gradients="irwb", scaled=True) for hidden in (64, 3072, 8192, 16384)),
    *(
        DropoutAddNorm(hidden, BF16, BF16, gradients="irwbl", scaled=True)
        for hidden in (64, 1000, 1024, 6144, 8192)
    ),
    *(
        DropoutAddNorm(hidden, F32, F32, gradients="irwbl", scaled=True)
        for hidden in (64, 768, 1000, 2048, 6144, 16384)
    ),
    DropoutAddNorm(10240, F32, F32, gradients="irw", scaled=True),
    DropoutAddNorm(8191, F16, F16, gradients="ir", scaled=True),
    DropoutAddNorm(4095, BF16, BF16, gradients="irwb", scaled=True),
    *(DropoutAddNorm(hidden, BF16, F32, gradients="irwbl", scaled=True) for hidden in (17, 1024, 1002)),
    DropoutAddNorm(4096, F16, F16, F16, centred=False, gradients="irw", dynamic=True),
    DropoutAddNorm(1024, BF16, BF16, gradients="rwb", drops=False),
)
