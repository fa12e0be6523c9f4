"""Argument checks shared by the row-wise norms, with torch's own error types and texts where torch has the check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FULL = frozenset((torch.float64,))

# The dtypes a parameter may have, for each dtype of the input.
PARAMETER_DTYPES = dict.fromkeys(_LOW, _LOW) | {torch.float64: _FULL}


def normalized_ndim(
    op: str,
    input: object,
    normalized_shape: Sequence[int],
    weight: object,
    bias: object,
    eps: object,
) -> int:
    """Check the arguments of a row-wise norm and return how many trailing dimensions it normalises.

    Raises:
        TypeError: input is not a tensor, normalized_shape not a sequence of ints, or eps not a number.
        ValueError, RuntimeError: the shapes do not fit; the types and texts are torch's.
        NotImplementedError: a dtype that the op does not serve.
        RuntimeError: a parameter of a dtype or on a device that does not go with the input's.
    """
    if type(normalized_shape) is not tuple:
        normalized_shape = _shape_tuple(op, normalized_shape)
    ndim = len(normalized_shape)
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    if type(eps) is not float and not isinstance(eps, int | float):
        position = 4 if op == "rms_norm" else 5
        raise TypeError(
            f"{op}(): argument 'eps' (position {position}) must be float, not {type(eps).__name__}"
        )
    shape = input.shape
    # The last dimension first: comparing a slice of a torch.Size costs four times as much.
    if (
        ndim == 0
        or len(shape) < ndim
        or shape[-1] != normalized_shape[-1]
        or (ndim > 1 and shape[-ndim:] != normalized_shape)
    ):
        _raise_shape_error(op, shape, normalized_shape)
    allowed = PARAMETER_DTYPES.get(input.dtype)
    if allowed is None:
        raise NotImplementedError(
            f'"{op}" not implemented for {input.dtype}: expected float32, bfloat16, float16 or float64'
        )
    device = input.device
    for parameter in (weight, bias):
        if parameter is not None and not (
            isinstance(parameter, Tensor)
            and parameter.shape == normalized_shape
            and parameter.dtype in allowed
            and parameter.device == device
        ):
            name = "weight" if parameter is weight else "bias"
            _raise_parameter_error(op, name, parameter, input, normalized_shape, allowed)
    return ndim


def _raise_parameter_error(
    op: str,
    name: str,
    parameter: object,
    input: torch.Tensor,
    normalized_shape: tuple[int, ...],
    allowed: frozenset[torch.dtype],
) -> None:
    if not isinstance(parameter, Tensor):
        position = 3 if name == "weight" else 4
        raise TypeError(
            f"{op}(): argument '{name}' (position {position}) must be Tensor, not {type(parameter).__name__}"
        )
    if parameter.shape != normalized_shape:
        raise RuntimeError(
            f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape "
            f"{list(parameter.shape)} and normalized_shape = {list(normalized_shape)}"
        )
    if parameter.dtype not in allowed:
        expected = "float64" if input.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise RuntimeError(
            f"{op}: mixed dtype: {name} is {parameter.dtype} where the input is {input.dtype}; "
            f"expected {expected}: convert the {name} or the input with .to(dtype)"
        )
    raise RuntimeError(
        f"{op}: expected all tensors to be on the same device, but {name} is on {parameter.device} and the "
        f"input is on {input.device}; move one of them with .to(device)"
    )


def _shape_tuple(op: str, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(normalized_shape, Sequence):
        raise TypeError(
            f"{op}(): argument 'normalized_shape' (position 2) must be tuple of ints, "
            f"not {type(normalized_shape).__name__}"
        )
    return tuple(normalized_shape)


def _raise_shape_error(op: str, shape: torch.Size, normalized_shape: Sequence[int]) -> None:
    ndim = len(normalized_shape)
    if ndim == 0:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, "
            "but got normalized_shape = []"
        )
    if op == "rms_norm" and len(shape) < ndim:
        raise ValueError(f"Input tensor must have at least {ndim} dimensions, but got {len(shape)}")
    wanted = ", ".join(str(size) for size in normalized_shape)
    star = "*" if op == "rms_norm" else "*, "
    raise RuntimeError(
        f"Given normalized_shape=[{wanted}], expected input with shape [{star}{wanted}], "
        f"but got input of size{list(shape)}"
    )
