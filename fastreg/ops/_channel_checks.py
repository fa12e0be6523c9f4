"""Argument checks of the norms over channels, with torch's own error types and texts where torch has the check."""

from __future__ import annotations

from torch import Tensor

from fastreg.ops._checks import PARAMETER_DTYPES

# Torch counts the arguments of torch.batch_norm, whose order is another than the functional's.
_POSITIONS = {
    "input": 1,
    "weight": 2,
    "bias": 3,
    "running_mean": 4,
    "running_var": 5,
    "momentum": 7,
    "eps": 8,
}


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
    if not isinstance(input, Tensor):
        raise _wrong_type("input", input, "Tensor")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if type(number) is not float and not isinstance(number, int | float):
            raise _wrong_type(name, number, "float")
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
    allowed = PARAMETER_DTYPES.get(input.dtype)
    if allowed is None:
        raise NotImplementedError(
            f'"batch_norm" not implemented for {input.dtype}: expected float32, bfloat16, float16 or float64'
        )
    shape, device = input.shape[1:2], input.device
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is not None and not (
            isinstance(vector, Tensor)
            and vector.shape == shape
            and vector.dtype in allowed
            and vector.device == device
        ):
            _raise_vector_error(name, vector, input)
    if residual is not None and not (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype in allowed
        and residual.device == device
    ):
        _raise_residual_error(residual, input)
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if isinstance(statistic, Tensor) and statistic.requires_grad:
            raise RuntimeError(
                f"The function 'batch_norm' is not differentiable with respect to argument '{name}'. This input "
                "cannot have requires_grad True."
            )


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


def _check_batch_size(input: Tensor) -> None:
    values = 1
    for dimension, size in enumerate(input.shape):
        if dimension != 1:
            values *= size
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )


def _wrong_type(name: str, value: object, expected: str) -> TypeError:
    position = f" (position {_POSITIONS[name]})" if name in _POSITIONS else ""
    return TypeError(
        f"batch_norm(): argument '{name}'{position} must be {expected}, not {type(value).__name__}"
    )


def _raise_vector_error(name: str, vector: object, input: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise _wrong_type(name, vector, "Tensor")
    channels = input.shape[1]
    if vector.numel() != channels or vector.dim() != 1:
        found = vector.numel() if vector.dim() == 1 else f"a tensor of shape {list(vector.shape)}"
        raise RuntimeError(f"{name} should contain {channels} elements not {found}")
    _raise_mismatch(name, vector, input)


def _raise_residual_error(residual: object, input: Tensor) -> None:
    if not isinstance(residual, Tensor):
        raise _wrong_type("residual", residual, "Tensor")
    if residual.shape != input.shape:
        raise RuntimeError(
            f"batch_norm: expected residual to be of the input's shape {list(input.shape)}, but got "
            f"{list(residual.shape)}; expand or slice it first"
        )
    _raise_mismatch("residual", residual, input)


def _raise_mismatch(name: str, tensor: Tensor, input: Tensor) -> None:
    allowed = PARAMETER_DTYPES[input.dtype]
    if tensor.dtype not in allowed:
        expected = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise RuntimeError(
            f"batch_norm: mixed dtype: {name} is {tensor.dtype} where the input is {input.dtype}; "
            f"expected {expected}: convert the {name} or the input with .to(dtype)"
        )
    raise RuntimeError(
        f"batch_norm: expected all tensors to be on the same device, but {name} is on {tensor.device} and the "
        f"input is on {input.device}; move one of them with .to(device)"
    )
