"""Argument checks of the norms over channels, with torch's own error types and texts where torch has the check."""

from __future__ import annotations

import math

from torch import Tensor

from fastreg.ops._checks import PARAMETER_DTYPES

# Torch counts the arguments of torch.batch_norm and torch.instance_norm, whose order is another than the functional's.
_POSITIONS = {
    "input": 1,
    "weight": 2,
    "bias": 3,
    "running_mean": 4,
    "running_var": 5,
    "momentum": 7,
    "eps": 8,
}
_POSITIONS_OF_GROUP_NORM = {"input": 1, "num_groups": 2, "weight": 3, "bias": 4, "eps": 5}

# Some of the vectors by name, each of them (C,).
Vectors = tuple[tuple[str, object], ...]


def batch_norm(
    input: object,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    training: bool,
    momentum: object,
    eps: object,
    residual: object,
    synchronised: bool = False,
) -> None:
    """Check the arguments of a batch norm; a synchronised one shares its batch with other processes.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError, RuntimeError: values and shapes that do not fit; the types and texts are torch's.
        NotImplementedError: a dtype that the op does not serve.
        RuntimeError: a dtype or a device that does not go with the input's.
    """
    op = "batch_norm"
    if not isinstance(input, Tensor):
        raise _wrong_type(op, "input", input, "Tensor")
    _check_numbers(op, (("momentum", momentum), ("eps", eps)))
    if training and not synchronised:
        _check_batch_size(input)
    if eps <= 0.0 if training else eps < 0.0:  # type: ignore[operator]
        sign, when = ("positive", " during training") if training else ("non-negative", "")
        raise ValueError(f"batch_norm eps must be {sign}{when}, but got {eps}")
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not training:
        for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
            if statistic is None:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
    if input.dim() < 2:
        raise RuntimeError(
            "batch_norm: expected an input of at least 2 dimensions, (N, C, *), but got one of shape "
            f"{list(input.shape)}"
        )
    _check_dtype(op, input)
    running = (("running_mean", running_mean), ("running_var", running_var))
    _check_vectors(op, (*running, ("weight", weight), ("bias", bias)), input)
    if residual is not None and not (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype in PARAMETER_DTYPES[input.dtype]
        and residual.device == input.device
    ):
        _raise_residual_error(residual, input)
    _check_constant(op, running)


def sync_batch_norm(
    input: Tensor,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    momentum: object,
    eps: object,
    residual: object,
) -> None:
    """Check the arguments of a batch norm in training over several processes.

    Raises:
        As ``batch_norm`` does, but for one value a channel.
        ValueError: there are no channels, with torch.nn.SyncBatchNorm's text.
    """
    batch_norm(
        *(input, running_mean, running_var, weight, bias, True, momentum, eps, residual),
        synchronised=True,
    )
    if input.shape[1] == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")


def group_norm(input: object, num_groups: object, weight: object, bias: object, eps: object) -> None:
    """Check the arguments of a group norm.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError, RuntimeError: values and shapes that do not fit; the types and texts are torch's.
        NotImplementedError: a dtype that the op does not serve.
        RuntimeError: a dtype or a device that does not go with the input's.
    """
    op = "group_norm"
    if not isinstance(input, Tensor):
        raise _wrong_type(op, "input", input, "Tensor")
    if type(num_groups) is not int:
        raise _wrong_type(op, "num_groups", num_groups, "int")
    _check_numbers(op, (("eps", eps),))
    shape = input.shape
    if len(shape) < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {len(shape)}")
    if num_groups <= 0:
        raise RuntimeError(f"Expected num groups to be greater than 0, got {num_groups}")
    if shape[0] * shape[1] // num_groups * math.prod(shape[2:]) == 1:
        size = [shape[0] * shape[1] // num_groups, num_groups, *shape[2:]]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if shape[1] % num_groups != 0:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{list(shape)} and num_groups={num_groups}"
        )
    _check_dtype(op, input)
    _check_vectors(op, (("weight", weight), ("bias", bias)), input)


def instance_norm(
    input: object,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    use_input_stats: bool,
    momentum: object,
    eps: object,
) -> None:
    """Check the arguments of an instance norm.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError, RuntimeError: values and shapes that do not fit; the types and texts are torch's.
        NotImplementedError: a dtype that the op does not serve.
        RuntimeError: a dtype or a device that does not go with the input's.
    """
    op = "instance_norm"
    if not isinstance(input, Tensor):
        raise _wrong_type(op, "input", input, "Tensor")
    _check_numbers(op, (("momentum", momentum), ("eps", eps)))
    if use_input_stats:
        if math.prod(input.shape[2:]) == 1:
            raise ValueError(
                f"Expected more than 1 spatial element when training, got input size {input.size()}"
            )
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
    elif running_mean is None or running_var is None:
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when use_input_stats is false"
        )
    if input.dim() < 2:
        raise RuntimeError(
            "instance_norm: expected an input of at least 2 dimensions, (N, C, *), but got one of shape "
            f"{list(input.shape)}"
        )
    _check_dtype(op, input)
    running = (("running_mean", running_mean), ("running_var", running_var))
    _check_vectors(op, (*running, ("weight", weight), ("bias", bias)), input)
    _check_constant(op, running)


# --- parts -----------------------------------------------------------------------------------------------


def _check_numbers(op: str, numbers: Vectors) -> None:
    for name, number in numbers:
        if type(number) is not float and not isinstance(number, int | float):
            raise _wrong_type(op, name, number, "float")


def _check_dtype(op: str, input: Tensor) -> None:
    if input.dtype not in PARAMETER_DTYPES:
        raise NotImplementedError(
            f'"{op}" not implemented for {input.dtype}: expected float32, bfloat16, float16 or float64'
        )


def _check_vectors(op: str, vectors: Vectors, input: Tensor) -> None:
    shape, device = input.shape[1:2], input.device
    allowed = PARAMETER_DTYPES[input.dtype]
    for name, vector in vectors:
        if vector is not None and not (
            isinstance(vector, Tensor)
            and vector.shape == shape
            and vector.dtype in allowed
            and vector.device == device
        ):
            _raise_vector_error(op, name, vector, input)


def _check_constant(op: str, statistics: Vectors) -> None:
    for name, statistic in statistics:
        if isinstance(statistic, Tensor) and statistic.requires_grad:
            raise RuntimeError(
                f"The function '{op}' is not differentiable with respect to argument '{name}'. This input "
                "cannot have requires_grad True."
            )


def _check_batch_size(input: Tensor) -> None:
    values = 1
    for dimension, size in enumerate(input.shape):
        if dimension != 1:
            values *= size
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )


def _wrong_type(op: str, name: str, value: object, expected: str) -> TypeError:
    positions = _POSITIONS_OF_GROUP_NORM if op == "group_norm" else _POSITIONS
    position = f" (position {positions[name]})" if name in positions else ""
    return TypeError(f"{op}(): argument '{name}'{position} must be {expected}, not {type(value).__name__}")


def _raise_vector_error(op: str, name: str, vector: object, input: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise _wrong_type(op, name, vector, "Tensor")
    channels = input.shape[1]
    if vector.numel() != channels or vector.dim() != 1:
        if op == "group_norm":
            raise RuntimeError(
                f"Expected {name} to be a vector of size equal to the number of channels in input, but got "
                f"{name} of shape {list(vector.shape)} and input of shape {list(input.shape)}"
            )
        found = vector.numel() if vector.dim() == 1 else f"a tensor of shape {list(vector.shape)}"
        raise RuntimeError(f"{name} should contain {channels} elements not {found}")
    _raise_mismatch(op, name, vector, input)


def _raise_residual_error(residual: object, input: Tensor) -> None:
    if not isinstance(residual, Tensor):
        raise _wrong_type("batch_norm", "residual", residual, "Tensor")
    if residual.shape != input.shape:
        raise RuntimeError(
            f"batch_norm: expected residual to be of the input's shape {list(input.shape)}, but got "
            f"{list(residual.shape)}; expand or slice it first"
        )
    _raise_mismatch("batch_norm", "residual", residual, input)


def _raise_mismatch(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    allowed = PARAMETER_DTYPES[input.dtype]
    if tensor.dtype not in allowed:
        expected = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise RuntimeError(
            f"{op}: mixed dtype: {name} is {tensor.dtype} where the input is {input.dtype}; "
            f"expected {expected}: convert the {name} or the input with .to(dtype)"
        )
    raise RuntimeError(
        f"{op}: expected all tensors to be on the same device, but {name} is on {tensor.device} and the "
        f"input is on {input.device}; move one of them with .to(device)"
    )
