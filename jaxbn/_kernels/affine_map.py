"""The map that normalizes x, with what follows it at once, and its derivative."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._kernels import accelerator, cpu
from jaxbn._kernels.accelerator import opened
from jaxbn._kernels.operands import Map, MapSettings, MapTangent
from jaxbn._kernels.operation import Operation, computed_apart
from jaxbn._kernels.reduction import sums
from jaxbn._sharding import vary_over, varying_axes
from jaxbn._typing import Array, DTypeLike, Pair


def affine_map(
    x: Array,
    mean: Array,
    slope: Array,
    offset: Array | None,
    residual: Array | None = None,
    *,
    relu: bool = False,
    dtype: DTypeLike,
) -> Array:
    """Returns (x - mean) slope + offset + residual in `dtype`, and the ReLU of it.

    The vectors are of x's rank and broadcast to x, and of the dtype of the computation.
    """
    operands = Map(x, mean, slope, offset, residual)
    return _MAP(MapSettings(relu, jnp.dtype(dtype)), operands)[0]


def affine_map_tangent(
    of: Map,
    y: Array | None,
    moving: Map,
    *,
    relu: bool,
    dtype: DTypeLike,
) -> Array:
    """Returns the tangent of `affine_map`, given those of its operands, None for none.

    The backward pass is the transpose: it keeps x in its own dtype, or y behind the ReLU of
    a residual, whose sign tells as much and which the layers behind keep anyway.
    """
    slope, offset = moving.slope, moving.offset
    if moving.mean is not None:
        # The mean moves as an offset does, so that one sum over x serves both.
        by_mean = of.slope * -moving.mean
        offset = by_mean if offset is None else offset + by_mean
    slope, offset = _alike(of.x, slope, offset)
    gate = of.offset if relu and of.residual is None else None
    if relu and of.residual is None and gate is None:
        gate = jnp.zeros_like(of.slope)
    operands = MapTangent(
        of.x,
        of.mean,
        of.slope,
        gate,
        y if relu and of.residual is not None else None,
        moving.x,
        slope,
        offset,
        moving.residual,
    )
    if not jax.tree.leaves((moving.x, slope, offset, moving.residual)):
        return jnp.zeros_like(of.x, dtype)
    return _TANGENT(jnp.dtype(dtype), operands)[0]


def _alike(x: Array, slope: Array | None, offset: Array | None) -> Any:
    """Types both as x is between devices, in one piece, and gives both one shape.

    One sum over devices then brings both gradients back.
    """
    if slope is not None and offset is not None and slope.shape != offset.shape:
        slope, offset = jnp.broadcast_arrays(slope, offset)
    given = [t for t in (slope, offset) if t is not None]
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return slope, offset
    missing = varying_axes(x)
    if all(varying_axes(t) >= missing for t in given):
        return slope, offset
    both = iter(vary_over(jnp.stack(given), missing))
    return tuple(None if t is None else next(both) for t in (slope, offset))


@jax.custom_jvp
def inverse_deviation(var: Array, epsilon: Array) -> Array:
    """Returns one over the standard deviation, 1 / sqrt(var + epsilon)."""
    return lax.rsqrt(var + epsilon)


@inverse_deviation.defjvp
def _(primals, tangents):
    inverse = inverse_deviation(*primals)
    # Multiplied up one factor at a time: the cube of `inverse` underflows where var is
    # above 1e25, although the product with the tangent does not.
    return inverse, -0.5 * (inverse * (inverse * (inverse * tangents[0])))


def _typed_like_x(dtype: DTypeLike, of: Any) -> tuple[Any]:
    return (of.x.update(dtype=dtype, weak_type=False),)


_MAP = Operation(
    "map",
    lambda settings, of: _typed_like_x(settings.dtype, of),
    accelerator.normalize,
    {"cpu": cpu.normalize},
)
_TANGENT = Operation("map_tangent", _typed_like_x, accelerator.normalize_tangent, {})


@_MAP.def_tangent
def _(settings, of, moving):
    (y,) = _MAP(settings, of)
    tangent = affine_map_tangent(of, y, moving, relu=settings.relu, dtype=settings.dtype)
    return (y,), (tangent,)


_TANGENT.def_linear_in(["x_tangent", "slope_tangent", "offset_tangent", "residual_tangent"])


@_TANGENT.def_transpose
def _(dtype, of, wanted, gradients):
    (gradient,) = gradients
    relu = None if of.offset is None else (of.slope, of.offset)
    if of.y is not None:
        # Stored once: the sums, the gradient of x and that of the residual all read it.
        (gradient,) = computed_apart(opened(of, gradient))
    found: dict[str, Any] = dict.fromkeys(of._fields)
    by_vectors = wanted.slope_tangent, wanted.offset_tangent
    if any(kind is not None for kind in by_vectors):
        found["offset_tangent"], found["slope_tangent"] = _gradients_of_vectors(
            of, relu, gradient, by_vectors
        )
    if wanted.residual_tangent is None and wanted.x_tangent is None:
        return MapTangent(**found)
    x, mean, slope, offset = computed_apart(
        of.x, of.mean, of.slope, of.offset, recomputes=relu is not None
    )
    if relu is not None:
        shown = of._replace(x=x, mean=mean, slope=slope, offset=offset)
        gradient = opened(shown, gradient.astype(slope.dtype))
    if wanted.x_tangent is not None:
        by_x = gradient.astype(slope.dtype) * slope
        found["x_tangent"] = by_x.astype(wanted.x_tangent.dtype)
    if wanted.residual_tangent is not None:
        found["residual_tangent"] = gradient.astype(wanted.residual_tangent.dtype)
    return MapTangent(**found)


def _gradients_of_vectors(
    of: MapTangent, relu: Pair | None, gradient: Array, wanted: tuple[Any, Any]
) -> Any:
    """Returns the gradients of the offset and of the slope, in the shape of both."""
    (kind, *_) = (kind for kind in wanted if kind is not None)
    axes = tuple(axis for axis, size in enumerate(kind.shape) if size == 1)
    totals = sums(of.x, of.mean, gradient, relu=relu, axes=axes)
    return tuple(total.astype(kind.dtype) for total in totals)
