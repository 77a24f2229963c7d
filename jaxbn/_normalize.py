"""The affine map that normalizes, its derivative and the dtype of its result."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axes import as_axes, expand, feature_shape, reduction_axes
from jaxbn._dtypes import as_dtype, as_float, real_part, upcast, widest
from jaxbn._placement import vary_over, varying_axes
from jaxbn._typing import Array, Axes, DTypeLike


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
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
        TypeError: x is of an integer or boolean dtype.
        ValueError: An axis is out of range or named twice; an array does not have the
            shape of the features; epsilon is not positive.

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
    check_epsilon(epsilon)
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
    wide = {
        name: None if array is None else expand(jnp.asarray(array), axes)
        for name, array in arrays.items()
    }
    return affine_map(x, **wide, epsilon=epsilon, dtype=as_dtype(dtype))


def check_epsilon(epsilon: float) -> None:
    """Raises unless `epsilon` is positive."""
    if not epsilon > 0:
        raise ValueError(
            f"epsilon must be positive, got {epsilon}. It keeps a constant feature from "
            "dividing by 0; 1e-5 is usual."
        )


@functools.partial(jax.jit, static_argnames=("epsilon", "dtype"), inline=True)
def affine_map(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    epsilon: float,
    dtype: DTypeLike | None,
) -> Array:
    """Returns `normalize` of checked arguments, each of x's rank and broadcast to x."""
    present = [array for array in (mean, scale, bias) if array is not None]
    wide = widest(upcast(x).dtype, *(array.dtype for array in present))
    if dtype is None:
        dtype = wide if jnp.issubdtype(wide, jnp.complexfloating) else x.dtype
    scale, bias = (None if array is None else array.astype(wide) for array in (scale, bias))
    return _affine(
        x, mean.astype(wide), var.astype(real_part(wide)), scale, bias, epsilon, dtype
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _affine(x, mean, var, scale, bias, epsilon, dtype):
    y = (x.astype(mean.dtype) - mean) * _slope(_inverse(var, epsilon), scale, mean.dtype)
    return (y if bias is None else y + bias).astype(dtype)


@_affine.defjvp
def _affine_jvp(epsilon, dtype, primals, tangents):
    x, mean, var, scale, bias = primals
    tx, tmean, tvar, tscale, tbias = tangents
    y = _affine(x, mean, var, scale, bias, epsilon, dtype)
    inverse = _inverse(var, epsilon)
    slope = _slope(inverse, scale, mean.dtype)
    # Multiplied up one factor at a time: the cube of `inverse` underflows where `var` is
    # above 1e25, although the product with the tangent does not.
    tslope = _slope(-0.5 * inverse * (inverse * (inverse * tvar)), scale, mean.dtype)
    if tscale is not None:
        tslope = tslope + inverse.astype(mean.dtype) * tscale
    toffset = -slope * tmean if tbias is None else tbias - slope * tmean
    if varying_axes(x) - varying_axes(tslope) or varying_axes(x) - varying_axes(toffset):
        # Typed as differing between devices in one piece, so that one sum over devices
        # brings both gradients back.
        both = jnp.stack(jnp.broadcast_arrays(tslope, toffset))
        tslope, toffset = vary_over(both, varying_axes(x))
    return y, _affine_tangent(dtype, x, mean, slope, tx, tslope, toffset)


# Checkpointed, so that the backward pass keeps x in its own dtype and centers it again,
# instead of keeping the centered copy.
@functools.partial(jax.checkpoint, static_argnums=0)
def _affine_tangent(dtype, x, mean, slope, tx, tslope, toffset):
    centered = x.astype(mean.dtype) - mean
    return (tx.astype(mean.dtype) * slope + centered * tslope + toffset).astype(dtype)


def _inverse(var: Array, epsilon: float) -> Array:
    return lax.rsqrt(var + jnp.asarray(epsilon, var.dtype))


def _slope(inverse: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
    inverse = inverse.astype(dtype)
    return inverse if scale is None else inverse * scale
