"""Axes and alignment as TensorFlow had them."""

import operator
from collections.abc import Sequence
from typing import TypeAlias

from jaxbn._typing import Array

ReducedAxes: TypeAlias = int | Sequence[int]


def feature_axis(data_format: str) -> int:
    """Returns the axis of the channels."""
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(
            f"data_format must be 'NHWC' or 'NCHW', got {data_format!r}. NHWC has the "
            "features last and NCHW next to the batch, at any rank."
        )
    return 1 if data_format == "NCHW" else -1


def canonical(axes: ReducedAxes, ndim: int) -> tuple[int, ...]:
    """Returns the axes to reduce, non-negative and ascending."""
    try:
        named = tuple(map(operator.index, axes if isinstance(axes, Sequence) else (axes,)))
    except TypeError:
        raise TypeError(
            f"axes must be an int or a sequence of ints, got {axes!r}. Write axes=[0] for "
            "the rows of a batch, axes=[0, 1, 2] for images."
        ) from None
    canonical = tuple(sorted({axis % ndim for axis in named})) if ndim else ()
    if len(canonical) != len(named) or any(not -ndim <= axis < ndim for axis in named):
        raise ValueError(
            f"axes {named} are not different axes of x, whose rank is {ndim}. Choose them "
            f"within [{-ndim}, {ndim - 1}], each once."
        )
    return canonical


def of_rank(array: Array, ndim: int) -> Array:
    """Returns `array` at rank `ndim`, aligned from the right as TensorFlow broadcast."""
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)
