"""A right dropout family and DropBlock, cut into the steps that a mutant can get wrong: lanes, units, scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastreg.backends.reference import _philox
from fastreg.backends.reference.drop_block import pack, unpack

Optional = torch.Tensor | None
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ELEMENT, CHANNEL, SAMPLE, BATCH = range(4)


class RightDropout:
    """``operator`` gives the functions that a backend exports."""

    def operator(self, name: str) -> Any:
        if name == "drop_block_inplace":
            return self.apply_inplace
        return getattr(self, name.removeprefix("dropout_").removeprefix("drop_block_"))

    # --- dropout's operators ---

    def fwd(
        self,
        input: torch.Tensor,
        residual: Optional,
        rows: Optional,
        layers: Optional,
        seed: Optional,
        threshold: int,
        dynamic: Optional,
        unit: int,
        rescale: bool,
    ) -> torch.Tensor:
        total = self.branch(input, rows, layers, seed, self.limit(threshold, dynamic), unit, rescale)
        if residual is not None:
            return self.laid_out(self.store(self.add(total, residual), residual.dtype), input)
        return self.laid_out(self.store(total, input.dtype), input)

    def inplace(
        self,
        input: torch.Tensor,
        seed: torch.Tensor,
        threshold: int,
        dynamic: Optional,
        unit: int,
        rescale: bool,
    ) -> None:
        input.copy_(self.fwd(input, None, None, None, seed, threshold, dynamic, unit, rescale))

    def bwd(
        self,
        grad: torch.Tensor,
        input: Optional,
        rows: Optional,
        layers: Optional,
        seed: Optional,
        threshold: int,
        dynamic: Optional,
        unit: int,
        rescale: bool,
        dtype: int,
        mask: Sequence[bool],
    ) -> Any:
        given = (self.backward_seed(seed), self.limit(threshold, dynamic), unit, rescale)
        grad_input = grad.new_empty(0, dtype=DTYPES[dtype])
        grad_layers = (grad if layers is None else layers).new_empty(0)
        if mask[0]:
            kept = self.branch(grad, rows, self.backward_layers(layers), *given)
            grad_input = self.laid_out(self.store(kept, DTYPES[dtype]), grad)
        if mask[1] and layers is not None and input is not None:
            products = self.branch(grad, rows, None, *given) * self.load(input)
            grad_layers = self.store(self.column_sums(products.reshape(-1, layers.numel())), layers.dtype)
        return grad_input, grad_layers

    # --- its steps ---

    def limit(self, threshold: int, dynamic: Optional) -> int:
        return threshold if dynamic is None else int(dynamic)

    def lanes_of(self, unit: int) -> int:
        return 2**16 if unit == ELEMENT else 2**32

    def scale(self, limit: int, lanes: int) -> float:
        return lanes / (lanes - limit) if limit < lanes else 0.0

    def load(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.dtype == torch.float64 else tensor.float()

    def store(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype)

    def add(self, total: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return total + self.load(residual)

    def laid_out(self, result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=result.dtype).copy_(result)

    def backward_seed(self, seed: Optional) -> Optional:
        return seed

    def backward_layers(self, layers: Optional) -> Optional:
        return layers

    def column_sums(self, products: torch.Tensor) -> torch.Tensor:
        return products.sum(0)

    def row_scales(self, rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return self.load(rows).reshape(*rows.shape, *(1,) * (tensor.dim() - rows.dim()))

    def half_lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        return _philox.half_lanes(seed, count)

    def lanes(self, seed: torch.Tensor, count: int) -> torch.Tensor:
        return _philox.lanes(seed, count)

    def kept(self, lanes: torch.Tensor, limit: int) -> torch.Tensor:
        return lanes >= limit

    def drop(self, keep: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, values, 0.0)

    def positions(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = torch.arange(tensor.numel())
        return (
            flat.as_strided(tensor.shape, tensor.stride()) if tensor.numel() else flat.reshape(tensor.shape)
        )

    def units(self, shape: Sequence[int], unit: int) -> torch.Tensor:
        leading = {CHANNEL: 2, SAMPLE: 1, BATCH: 0}[unit]
        index = torch.arange(math.prod(shape[:leading]))
        return index.reshape(*shape[:leading], *(1,) * (len(shape) - leading)).expand(tuple(shape))

    def keep(self, tensor: torch.Tensor, seed: torch.Tensor, limit: int, unit: int) -> torch.Tensor:
        if unit == ELEMENT:
            return self.kept(self.half_lanes(seed, tensor.numel()), limit)[self.positions(tensor)]
        units = self.units(tensor.shape, unit)
        return self.kept(self.lanes(seed, int(units.max()) + 1 if units.numel() else 0), limit)[units]

    def branch(
        self,
        tensor: torch.Tensor,
        rows: Optional,
        layers: Optional,
        seed: Optional,
        limit: int,
        unit: int,
        rescale: bool,
    ) -> torch.Tensor:
        values = self.load(tensor)
        if rows is not None:
            values = values * self.row_scales(rows, tensor)
        if layers is not None:
            values = values * self.load(layers)
        if seed is None:
            return values
        if rescale:
            values = values * self.scale(limit, self.lanes_of(unit))
        return self.drop(self.keep(tensor, seed, limit, unit), values)

    # --- DropBlock's operators ---

    def mask(
        self,
        seed: torch.Tensor,
        shape: Sequence[int],
        block: Sequence[int],
        threshold: int,
        dynamic: Optional,
        anywhere: bool,
    ) -> Any:
        keep = self.keep_blocks(seed, shape, block, self.limit(threshold, dynamic), anywhere)
        return pack(keep), self.counts(keep)

    def apply(self, input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        factor = self.load_scale(scale, input.dtype).reshape(-1, *(1,) * (input.dim() - 1))
        kept = self.drop(unpack(bits, input.shape[-1]), self.load(input) * factor)
        return self.laid_out(self.store(kept, input.dtype), input)

    def apply_inplace(self, input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> None:
        input.copy_(self.apply(input, bits, scale))

    # --- its steps ---

    def before(self, length: int, anywhere: bool) -> int:
        return length // 2 if anywhere else 0

    def places(self, size: int, length: int, anywhere: bool) -> int:
        return size if anywhere else size - length + 1

    def counts(self, keep: torch.Tensor) -> torch.Tensor:
        return keep.flatten(1).sum(1)

    def load_scale(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return scale if dtype == torch.float64 else scale.float()

    def reach(self, length: int) -> int:
        return length

    def keep_blocks(
        self, seed: torch.Tensor, shape: Sequence[int], block: Sequence[int], limit: int, anywhere: bool
    ) -> torch.Tensor:
        spatial = shape[2:]
        places = [self.places(size, length, anywhere) for size, length in zip(spatial, block, strict=True)]
        seeds = ~self.kept(self.lanes(seed, math.prod(shape[:2]) * math.prod(places)), limit)
        keep = torch.ones(tuple(shape), dtype=torch.bool)
        for sample, channel, *place in seeds.reshape(*shape[:2], *places).nonzero().tolist():
            window = []
            for at, length in zip(place, block, strict=True):
                first = at - self.before(length, anywhere)
                window.append(slice(max(first, 0), first + self.reach(length)))
            keep[(sample, channel, *window)] = False
        return keep
