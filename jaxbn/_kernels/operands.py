"""What the operations on arrays of x's size take: one tuple of arrays for each."""

from typing import NamedTuple

from jaxbn._typing import Array, DTypeLike


class Reduction(NamedTuple):
    """Operands of the moments of `x`; `count` is the total weight of each feature."""

    x: Array
    weights: Array | None
    count: Array | None  # pyright: ignore[reportIncompatibleMethodOverride]


class Map(NamedTuple):
    """Operands of (x - mean) slope + offset + residual; the vectors broadcast to x."""

    x: Array
    mean: Array
    slope: Array
    offset: Array | None
    residual: Array | None


class MapTangent(NamedTuple):
    """Operands of the tangent of the map, which is linear in those called tangents.

    A ReLU behind the map is open where `y` is positive, or, without y, where the map with
    `offset` is; without both there is none.
    """

    x: Array
    mean: Array
    slope: Array
    offset: Array | None
    y: Array | None
    x_tangent: Array | None
    slope_tangent: Array | None
    offset_tangent: Array | None
    residual_tangent: Array | None


class Sums(NamedTuple):
    """Operands of the sums of t and of t (x - mean), in which `t` is linear.

    With `slope` and `offset`, t counts where a ReLU behind the map is open.
    """

    x: Array
    mean: Array
    slope: Array | None
    offset: Array | None
    weights: Array | None
    t: Array


class MapSettings(NamedTuple):
    """The static part of a map."""

    relu: bool
    dtype: DTypeLike
