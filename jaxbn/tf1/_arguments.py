"""Checks the arguments of TensorFlow, and translates them into those of the core."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from jaxbn._layers.renorm_limits import RenormLimits, check_limits
from jaxbn._typing import Array
from jaxbn._values.canonical import as_settled, known

ReducedAxes: TypeAlias = int | Sequence[int]

# TensorFlow's smallest epsilon for the fused kernel; cuDNN refuses less than 1e-5.
FUSED_EPSILON = 1.001e-5
_LIMITS = {"rmin": "r_min", "rmax": "r_max", "dmax": "d_max"}
_NO_LIMITS = RenormLimits(r_min=0.0, r_max=jnp.inf, d_max=jnp.inf)


def to_axes(axis: Any) -> int | tuple[int, ...]:
    """Returns `axis` as the core takes it."""
    axes = axis if isinstance(axis, list) else [axis]
    if not all(isinstance(each, int) for each in axes):
        raise TypeError(
            f"axis must be an int or a list of ints, got {axis!r} of type "
            f"{type(axis).__name__}. Write axis=-1 or, for several axes, axis=[1, 2]."
        )
    return tuple(axes) if isinstance(axis, list) else axis


DataFormat: TypeAlias = Literal["NHWC", "NCHW"]


def feature_axis(data_format: DataFormat) -> int:
    """Returns the axis of the channels."""
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(
            f"data_format must be 'NHWC' or 'NCHW', got {data_format!r}. NHWC has the "
            "features last and NCHW next to the batch, at any rank."
        )
    return 1 if data_format == "NCHW" else -1


def axes_to_reduce(axes: ReducedAxes, ndim: int) -> tuple[int, ...]:
    """Returns the axes to reduce, non-negative and ascending."""
    try:
        named = tuple(map(operator.index, axes if isinstance(axes, Sequence) else (axes,)))
    except TypeError:
        raise TypeError(
            f"axes must be an int or a sequence of ints, got {axes!r}. Write axes=[0] for "
            "the rows of a batch, axes=[0, 1, 2] for images."
        ) from None
    axes = tuple(sorted({axis % ndim for axis in named})) if ndim else ()
    if len(axes) != len(named) or any(not -ndim <= axis < ndim for axis in named):
        raise ValueError(
            f"axes {named} are not different axes of x, whose rank is {ndim}. Choose them "
            f"within [{-ndim}, {ndim - 1}], each once."
        )
    return axes


def of_rank(array: Array, ndim: int) -> Array:
    """Returns `array` at rank `ndim`, aligned from the right as TensorFlow broadcast."""
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def to_limits(clipping: Mapping[str, Any] | None) -> RenormLimits:
    """Returns the limits of renorm, where a missing one is none."""
    clipping = clipping or {}
    unknown = sorted(set(clipping) - set(_LIMITS))
    if unknown:
        raise ValueError(
            f"renorm_clipping may hold {', '.join(_LIMITS)}, got {', '.join(unknown)}. "
            "Pass it as the layer was made with; rename or drop what is not among them."
        )
    limits = _NO_LIMITS._replace(**{_LIMITS[key]: value for key, value in clipping.items()})
    check_limits(limits)
    return limits


def check_decay(name: str, decay: float | Array) -> float | Array:
    """Returns `decay` as Python's number or traced, or raises unless it is in [0, 1]."""
    remedy = "It is the share of the old average in the new one; 0.99 is usual."
    decay = as_settled(name, decay, remedy)
    value = known(decay)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {decay}. {remedy}")
    return decay
