"""The affine map that normalizes, what follows it at once, and its derivative."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._dtypes import real_part, widest
from jaxbn._kernels.affine_tangent import (
    before_activation,
    tangent_after,
    tangent_before,
    tangent_of_relu,
    tangent_through_relu,
    tiling_of,
)
from jaxbn._kernels.barriers import Input, isolated
from jaxbn._sharding import vary_over, varying_axes
from jaxbn._typing import Activation, Array, DTypeLike


@functools.partial(jax.jit, static_argnames=("epsilon", "dtype", "activation"), inline=True)
def affine_map(
    x: Input,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    epsilon: float,
    dtype: DTypeLike | None,
    residual: Array | None = None,
    activation: Activation | None = None,
) -> Array:
    """Returns `normalize` of checked arguments, each of x's rank and broadcast to x.

    Then `residual` is added and `activation` is applied, in the same precision.
    """
    value = x.value
    present = [array for array in (mean, scale, bias) if array is not None]
    wide = widest(x.wide.dtype, *(array.dtype for array in present))
    if dtype is None:
        dtype = wide if jnp.issubdtype(wide, jnp.complexfloating) else value.dtype
    scale, bias = (None if array is None else array.astype(wide) for array in (scale, bias))
    vectors = mean.astype(wide), var.astype(real_part(wide)), scale, bias
    captured = ()
    if activation is not None and activation is not jax.nn.relu:
        # What it captured, such as the slope of a parametric ReLU, may be differentiated.
        shape = jax.ShapeDtypeStruct(value.shape, wide)
        activation, captured = jax.closure_convert(activation, shape)
    return _affine(x, *vectors, residual, captured, epsilon, dtype, activation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7, 8, 9))
def _affine(x, mean, var, scale, bias, residual, captured, epsilon, dtype, activation):
    slope = _slope(_inverse(var, epsilon), scale, mean.dtype)
    # Or the loop over x would compute the vectors again for each element.
    _, mean, slope, bias = isolated(x.value, mean, slope, bias)
    y = before_activation(x.value, (mean, slope, bias), residual)
    return (y if activation is None else activation(y, *captured)).astype(dtype)


@functools.partial(_affine.defjvp, symbolic_zeros=True)
def _affine_jvp(epsilon, dtype, activation, primals, tangents):
    (_, x, _), mean, var, scale, bias, residual, captured = primals
    (_, _, tx), tmean, tvar, tscale, tbias, tresidual, tcaptured = jax.tree.map(
        _unless_zero, tangents, is_leaf=lambda t: isinstance(t, SymbolicZero)
    )
    y = _affine(*primals, epsilon, dtype, activation)
    inverse = _inverse(var, epsilon)
    slope = _slope(inverse, scale, mean.dtype)
    tslope = toffset = None
    if tvar is not None:
        # Multiplied up one factor at a time: the cube of `inverse` underflows where `var`
        # is above 1e25, although the product with the tangent does not.
        tslope = _slope(-0.5 * inverse * (inverse * (inverse * tvar)), scale, mean.dtype)
    if tscale is not None:
        tslope = _plus(tslope, inverse.astype(mean.dtype) * tscale)
    if tmean is not None:
        toffset = -slope * tmean
    toffset = _plus(toffset, tbias)
    tslope, toffset = _vary_together(x, tslope, toffset)
    vectors, tangents = (mean, slope, bias), (tx, tslope, toffset, tresidual)
    tiles = tiling_of(x, vectors, tangents)
    if tiles is not None and activation is jax.nn.relu and residual is None:
        return y, tangent_through_relu(dtype, tiles, x, vectors, tangents)
    tangent = tangent_before(dtype, tiles, x, vectors, tangents)
    if activation is None:
        return y, tangent
    if activation is jax.nn.relu and residual is not None:
        # Its sign tells as much, and the layers after this one keep y anyway.
        return y, tangent_of_relu(y, tangent)
    tcaptured = jax.tree.map(_or_zero, tcaptured, captured, is_leaf=lambda t: t is None)
    return y, tangent_after(
        dtype, activation, x, vectors, residual, captured, tangent, tcaptured
    )


def _unless_zero(tangent):
    return None if isinstance(tangent, SymbolicZero) else tangent


def _or_zero(tangent, primal):
    return jnp.zeros_like(primal) if tangent is None else tangent


def _plus(a, b):
    return b if a is None else a if b is None else a + b


def _vary_together(x, tslope, toffset):
    """Types both as x is between devices, in one piece.

    One sum over devices then brings both gradients back.
    """
    given = [t for t in (tslope, toffset) if t is not None]
    if not any(varying_axes(x) - varying_axes(t) for t in given):
        return tslope, toffset
    both = iter(vary_over(jnp.stack(jnp.broadcast_arrays(*given)), varying_axes(x)))
    return tuple(None if t is None else next(both) for t in (tslope, toffset))


def _inverse(var: Array, epsilon: float) -> Array:
    return lax.rsqrt(var + jnp.asarray(epsilon, var.dtype))


def _slope(inverse: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
    inverse = inverse.astype(dtype)
    return inverse if scale is None else inverse * scale
