"""Normalization by given statistics."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._axes import as_axes, expand, feature_shape, reduction_axes
from jaxbn._dtypes import as_dtype, as_float, real_part, upcast, widest
from jaxbn._kernels.affine_map import affine_map, inverse_deviation
from jaxbn._sharding import split_like
from jaxbn._typing import Array, ArrayLike, Axes, DTypeLike
from jaxbn._values.canonical import as_number


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: Axes = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> Array:
    r"""Returns `x` normalized by the given statistics, then scaled and shifted.

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    Computed in float32, or in x's dtype where that is wider, and cast once at the end.

    Args:
        x: Floating or complex, of rank 2 or more.
        mean: Of the shape of the features.
        var: Likewise, real and non-negative.
        scale: Likewise, or None for 1.
        bias: Likewise, or None for 0.
        feature_axes: The axes of x that the other arrays belong to.
        epsilon: Added to `var` inside the square root.
        dtype: The dtype of the result; None for that of x.

    Returns:
        An array of the shape of `x`.

    Raises:
        TypeError: x is of an integer or boolean dtype; epsilon is not a known number.
        ValueError: An axis is out of range or named twice; an array does not have the
            shape of the features; epsilon is not positive and finite.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0], [3.0]])
        >>> mean, var = jnp.array([2.0]), jnp.array([1.0])
        >>> print(jaxbn.normalize(x, mean, var, bias=jnp.array([5.0]), epsilon=1e-12))
        [[4.]
         [6.]]

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", 2015.

    Differs from `tf.nn.batch_normalization`, which computes x times a factor plus an
    offset in x's dtype and so loses digits when the mean is large.
    """
    x = as_float(x)
    epsilon = check_epsilon(epsilon)
    feature_axes = as_axes(feature_axes)
    axes = reduction_axes(feature_axes, x.shape)
    features = feature_shape(feature_axes, x.shape)
    arrays = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    for name, array in arrays.items():
        if array is not None and jnp.shape(array) != features:
            raise ValueError(
                f"{name} must have the shape {features} of the features of x, whose shape "
                f"is {x.shape}, got {jnp.shape(array)}. Check feature_axes={feature_axes}."
            )
    given = (None if a is None else expand(jnp.asarray(a), axes) for a in arrays.values())
    return normalize_aligned(x, *given, epsilon=epsilon, dtype=as_dtype(dtype))


@functools.partial(jax.jit, static_argnames=("epsilon", "dtype"))
def normalize_aligned(
    x: Array,
    mean: Array | None,
    var: Array | None,
    scale: Array | None,
    bias: Array | None,
    *,
    epsilon: float,
    dtype: DTypeLike | None,
) -> Array:
    """Returns `normalize` of checked arrays, each of x's rank and broadcast to x."""
    # Vectors of a model may be split over devices as x is not.
    mean, var, scale, bias = split_like(x, (mean, var, scale, bias))
    assert mean is not None
    assert var is not None
    given = [array for array in (mean, scale, bias) if array is not None]
    wide = widest(upcast(x).dtype, *(array.dtype for array in given))
    slope = inverse_deviation(
        var.astype(real_part(wide)), jnp.asarray(epsilon, real_part(wide))
    ).astype(wide)
    if scale is not None:
        slope = slope * scale.astype(wide)
    offset = None if bias is None else bias.astype(wide)
    if dtype is None:
        dtype = wide if jnp.issubdtype(wide, jnp.complexfloating) else x.dtype
    return affine_map(x, mean.astype(wide), slope, offset, dtype=dtype)


def check_epsilon(epsilon: Any) -> float:
    """Returns `epsilon` as Python's number, or raises unless it is positive and finite."""
    number = as_number("epsilon", epsilon, "Write epsilon=1e-5 or the like.")
    if not 0 < number < math.inf:
        raise ValueError(
            f"epsilon must be positive and finite, got {number}. It keeps a constant "
            "feature from dividing by 0; 1e-5 is usual."
        )
    return number
