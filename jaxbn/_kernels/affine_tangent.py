"""Tangents of the affine map and of what follows it, written for their transposes.

The backward pass is what JAX makes of them. All are checkpointed, so that it keeps x in its
own dtype and computes from that again what it needs, such as the centered x.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._kernels.barriers import (
    each_hidden,
    hidden,
    is_isolable,
    isolated,
    on_cpu_or_not,
)
from jaxbn._kernels.linear_transpose import add_linear
from jaxbn._kernels.tiles import sums, tiling
from jaxbn._sharding import broadcast_like


def before_activation(x, vectors, residual=None):
    """Returns what enters the activation."""
    mean, slope, bias = vectors
    y = (x.astype(mean.dtype) - mean) * slope
    y = y if bias is None else y + bias
    return y if residual is None else y + residual.astype(y.dtype)


@functools.partial(jax.checkpoint, static_argnums=(0, 1), prevent_cse=False)
def tangent_before(dtype, tiles, x, vectors, tangents):
    """Returns the tangent of what enters the activation."""
    if not jax.tree.leaves(tangents):
        return jnp.zeros_like(x, dtype)
    together = functools.partial(_together, dtype)
    if tiles is not None:
        tiled = functools.partial(_tiled, dtype, tiles, False)
        return on_cpu_or_not(tiled, together, x, vectors, tangents)
    if is_isolable(x):
        apart = functools.partial(_apart, dtype)
        return on_cpu_or_not(apart, together, x, vectors, tangents)
    return together(x, vectors, tangents)


@functools.partial(jax.checkpoint, static_argnums=(0, 1), prevent_cse=False)
def tangent_through_relu(dtype, tiles, x, vectors, tangents):
    """Returns the tangent after a ReLU, whose mask the loop over tiles computes again."""

    def one_by_one(x, vectors, tangents):
        tangent = _together(dtype, x, vectors, tangents)
        return tangent_after(dtype, jax.nn.relu, x, vectors, None, (), tangent, ())

    tiled = functools.partial(_tiled, dtype, tiles, True)
    return on_cpu_or_not(tiled, one_by_one, x, vectors, tangents)


@functools.partial(jax.checkpoint, prevent_cse=False)
def tangent_of_relu(y, tangent):
    """Returns the tangent after a ReLU that gave y."""
    return jnp.where(y > 0, isolated(tangent)[0], jnp.zeros_like(tangent))


@functools.partial(jax.checkpoint, static_argnums=(0, 1), prevent_cse=False)
def tangent_after(dtype, activation, x, vectors, residual, captured, tangent, tcaptured):
    """Returns the tangent after an activation."""
    x, *vectors = isolated(x, *vectors)
    before = before_activation(x, vectors, residual)
    tangent = isolated(tangent)[0].astype(before.dtype)
    along = (before, *captured), (tangent, *tcaptured)
    return jax.jvp(activation, *along)[1].astype(dtype)


def tiling_of(x, vectors, tangents):
    """Returns how the sums of the backward pass are cut, or None if they are not."""
    tx, tslope, toffset, _ = tangents
    if tx is None or tslope is None or toffset is None:
        return None
    given = [tslope, toffset, *(vector for vector in vectors if vector is not None)]
    if len({vector.shape for vector in given}) > 1:
        return None
    axes = tuple(axis for axis, size in enumerate(tslope.shape) if size == 1)
    return tiling(x, axes, 2)


def _tiled(dtype, tiles, has_relu, x, vectors, tangents):
    """Returns the tangent so that, transposed, both sums come of one reading."""
    tx, tslope, toffset, tresidual = tangents
    x, (mean, slope, bias) = each_hidden((x, vectors))
    vectors = mean, slope, jnp.zeros_like(mean) if bias is None else bias

    def masked(tangent, x, *vectors):
        if not has_relu:
            return tangent
        return jnp.where(before_activation(x, vectors) > 0, tangent, 0)

    def products(x, gradient, mean, *others):
        gradient = masked(gradient.astype(mean.dtype), x, mean, *others)
        return gradient * (x.astype(mean.dtype) - mean), gradient

    def of_vectors(given):
        return masked(_together(dtype, x, vectors, (None, *given, None)), x, *vectors)

    def transposed(gradient):
        return sums(products, tiles, (x, gradient), vectors)

    others = masked(_together(dtype, x, vectors, (tx, None, None, tresidual)), x, *vectors)
    return add_linear(others, of_vectors, transposed, (tslope, toffset), x)


def _together(dtype, x, vectors, tangents):
    mean, slope, _ = vectors
    return functools.reduce(operator.add, _parts(x, mean, slope, tangents)).astype(dtype)


def _apart(dtype, x, vectors, tangents):
    """Returns the same, added so that, transposed, each sum reads a value of its own."""
    apart = []
    mean, slope, _ = vectors
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
