"""What counts in a batch and how much: masks and sample weights, checked and lined up."""

import jax.numpy as jnp

from jaxbn._dtypes import at_least_float32, real_part
from jaxbn._typing import Array, ArrayLike, Shape
from jaxbn._values.canonical import known


def prepare_weights(
    weights: ArrayLike | None, x: Array, axes: tuple[int, ...]
) -> Array | None:
    """Returns `weights` checked, at x's rank and in the dtype of the statistics."""
    if weights is None:
        return None
    # Known values are examined in NumPy, also where the cast below would hide them.
    values = known(weights)
    weights = jnp.asarray(weights)
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(
            f"weights must be boolean or real, got {weights.dtype}. Pass their magnitude."
        )
    aligned = _align(weights, x.shape, axes).astype(real_part(at_least_float32(x.dtype)))
    # A traced value is unknown: there, a negative weight is the caller's to avoid.
    if values is not None and not (values >= 0).all():
        raise ValueError(
            f"weights must not be negative or NaN, got {values.min()} among them. Give "
            "weight 0 to what should not count."
        )
    return aligned


def _align(weights: Array, shape: Shape, axes: tuple[int, ...]) -> Array:
    aligned_shape = _aligned_shape(weights.shape, len(shape), axes)
    if aligned_shape is None or any(
        have not in (1, want) for have, want in zip(aligned_shape, shape, strict=True)
    ):
        reduced = tuple(shape[axis] for axis in axes)
        raise ValueError(
            f"weights of shape {weights.shape} do not fit x of shape {shape}. Give them "
            f"x's rank and a shape that broadcasts to x's, or the shape {reduced[:1]} of "
            f"its rows, or that of its positions: the leading part of {reduced}."
        )
    return weights.reshape(aligned_shape)


def _aligned_shape(shape: Shape, ndim: int, axes: tuple[int, ...]) -> Shape | None:
    if len(shape) == ndim:
        return shape
    if len(shape) > len(axes):
        return None
    size_of = dict(zip(axes, shape, strict=False))
    return tuple(size_of.get(axis, 1) for axis in range(ndim))
