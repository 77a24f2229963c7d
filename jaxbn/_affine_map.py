"""The affine map that normalizes, what follows it at once, and its derivative."""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._dtypes import real_part, widest
from jaxbn._isolation import Input, hidden, is_isolable, isolated, on_cpu_or_not
from jaxbn._placement import broadcast_like, vary_over, varying_axes
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
    y = _before_activation(x.value, mean, slope, bias, residual)
    return (y if activation is None else activation(y, *captured)).astype(dtype)


def _before_activation(x, mean, slope, bias, residual):
    y = (x.astype(mean.dtype) - mean) * slope
    y = y if bias is None else y + bias
    return y if residual is None else y + residual.astype(y.dtype)


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
    tpre = _tangent_before(dtype, x, mean, slope, (tx, tslope, toffset, tresidual))
    if activation is None:
        return y, tpre
    if activation is jax.nn.relu and residual is not None:
        # Its sign tells as much, and the layers after this one keep y anyway.
        return y, _tangent_of_relu(y, tpre)
    tcaptured = jax.tree.map(_or_zero, tcaptured, captured, is_leaf=lambda t: t is None)
    vectors = mean, slope, bias
    return y, _tangent_after(
        dtype, activation, x, vectors, residual, captured, tpre, tcaptured
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


# Checkpointed, so that the backward pass keeps x in its own dtype and centers it again,
# instead of keeping the centered copy.
@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _tangent_before(dtype, x, mean, slope, tangents):
    """Returns the tangent of what enters the activation."""
    if not jax.tree.leaves(tangents):
        return jnp.zeros_like(x, dtype)
    apart, together = (functools.partial(f, dtype) for f in (_apart, _together))
    arrays = x, mean, slope, tangents
    return on_cpu_or_not(apart, together, *arrays) if is_isolable(x) else together(*arrays)


def _together(dtype, x, mean, slope, tangents):
    return functools.reduce(operator.add, _parts(x, mean, slope, tangents)).astype(dtype)


def _apart(dtype, x, mean, slope, tangents):
    """Returns the same, added so that, transposed, each sum reads a value of its own."""
    apart = []
    x, mean, slope = hidden(x, mean, slope)
    for depth, part in enumerate(_parts(x, mean, slope, tangents)):
        part = part.astype(dtype)
        # Barriers of one value count as one, unless they are stacked to different heights.
        for _ in range(depth):
            part = lax.optimization_barrier(part)
        apart.append(part)
    return functools.reduce(operator.add, apart)


def _parts(x, mean, slope, tangents):
    tx, tslope, toffset, tresidual = tangents
    if tslope is not None:
        yield (x.astype(mean.dtype) - mean) * tslope
    if tx is not None:
        yield tx.astype(mean.dtype) * slope
    if tresidual is not None:
        yield tresidual.astype(mean.dtype)
    if toffset is not None:
        yield broadcast_like(toffset, x)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _tangent_of_relu(y, tpre):
    return jnp.where(y > 0, isolated(tpre)[0], jnp.zeros_like(tpre))


@functools.partial(jax.checkpoint, static_argnums=(0, 1), prevent_cse=False)
def _tangent_after(dtype, activation, x, vectors, residual, captured, tpre, tcaptured):
    # Computed again from these, what enters the activation is nothing to keep.
    x, mean, slope, bias = isolated(x, *vectors)
    before = _before_activation(x, mean, slope, bias, residual)
    tpre = isolated(tpre)[0].astype(before.dtype)
    along = (before, *captured), (tpre, *tcaptured)
    return jax.jvp(activation, *along)[1].astype(dtype)


def _inverse(var: Array, epsilon: float) -> Array:
    return lax.rsqrt(var + jnp.asarray(epsilon, var.dtype))


def _slope(inverse: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
    inverse = inverse.astype(dtype)
    return inverse if scale is None else inverse * scale
