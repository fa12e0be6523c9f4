"""The activations that a norm may end with: their names, and the numbers by which the operators know them."""

from __future__ import annotations

NAMES = ("identity", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish")

# csrc/activation.h has the same numbers.
IDENTITY, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH, HARDSWISH = range(len(NAMES))

_NUMBERS: dict[str | None, int] = {None: IDENTITY, **{name: number for number, name in enumerate(NAMES)}}


def number(op: str, activation: str | None) -> int:
    """The number of an activation that a user named; None is the identity.

    Raises:
        ValueError: there is no such activation; the text lists those there are.
    """
    try:
        return _NUMBERS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"{op}: unknown activation {activation!r}; expected None or one of {', '.join(NAMES)}"
        ) from None


def needs_sign_only(number: int) -> bool:
    """Whether the derivative depends on the sign of the argument only, so that one bit an element stands for it."""
    return number in (RELU, LEAKY_RELU)
