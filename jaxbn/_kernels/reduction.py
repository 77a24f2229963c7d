"""Mean and variance in as few readings of x as keep the digits, and their derivative."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._axes import expand
from jaxbn._dtypes import real_part, upcast
from jaxbn._kernels.barriers import (
    Input,
    hidden,
    is_isolable,
    is_small,
    on_cpu_or_not,
    same,
)
from jaxbn._kernels.compensated import settled, two_sum
from jaxbn._kernels.tiles import Tiling, sums, tiling
from jaxbn._sharding import unsplit_axes
from jaxbn._typing import Array, Pair

Triple = tuple[Array, Array, Array]

# E[x^2] - E[x]^2 loses log2 of this number of bits at most, or is not used.
ILL_CONDITIONED = 16.0
# A sample holds at least one of this many elements. Were its mean off by d, it alone would
# add d^2 / SPARSENESS to the variance: as many bits are lost at most.
SPARSENESS = 32
# As many devices as a sample of rows is cut for; over more it may have to move.
MANY = 256


def count_elements(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """Returns the total weight of every feature of `x`, real."""
    features = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    if weights is None:
        size = math.prod(x.shape[axis] for axis in axes)
        return jnp.full(features, size, real_part(upcast(x).dtype))
    # Axes along which the weights are constant multiply them instead of being summed.
    repeats = math.prod(x.shape[axis] for axis in axes if weights.shape[axis] == 1)
    return jnp.broadcast_to(jnp.sum(weights * repeats, axes), features)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def mean_and_var(
    x: Input, weights: Array | None, count: Array, axes: tuple[int, ...]
) -> Triple:
    """Returns the mean of real x, what its rounding left out, and the biased variance."""
    value = x.value
    if is_small(value):
        return _twice(axes, value, weights, count)
    sampled = functools.partial(_sampled, axes)
    on_cpu = functools.partial(_guarded, axes)
    tiles = None if weights is not None else tiling(value, axes, 1)
    if tiles is not None:
        on_cpu = functools.partial(sampled, tiles=tiles)
    return on_cpu_or_not(on_cpu, sampled, value, weights, count)


def _guarded(
    axes: tuple[int, ...], x: Array, weights: Array | None, count: Array
) -> Triple:
    """Sums x and its square, and reads x again where that has lost digits.

    For CPUs, where sums over whole axes are fast of values, not of differences.
    """
    (first,), (second, _) = hidden(x), hidden(x, count)
    mean = _mean(upcast(first), weights, count, axes)
    square = _mean(upcast(second), weights, count, axes, times=upcast(second))
    well = jnp.all(jnp.square(mean) <= ILL_CONDITIONED * (square - jnp.square(mean)))
    shift = settled(mean)

    def again():
        return _deviations(x, weights, count, axes, shift, hidden)

    slip, spread = lax.cond(well, lambda: (mean, square), again)
    return _combined(jnp.where(well, jnp.zeros_like(shift), shift), slip, spread)


def _sampled(
    axes: tuple[int, ...],
    x: Array,
    weights: Array | None,
    count: Array,
    tiles: Tiling | None = None,
) -> Triple:
    """Sums deviations from the mean of a sample, and their squares, in one reading of x.

    For accelerators, which fuse both sums, and wait for the host at a conditional; and for
    CPUs where `tiles` of x are summed.
    """
    if weights is not None:  # a sample may have none
        return _twice(axes, x, weights, count)
    sample = _sample(x, axes)
    size = count_elements(sample, None, axes)
    shift = settled(_mean(upcast(sample), None, size, axes))
    if tiles is None:
        return _combined(shift, *_deviations(x, None, count, axes, shift))
    slip, spread = sums(_powers, tiles, (x,), (shift,))
    return _combined(shift, slip / divisor(count), spread / divisor(count))


def _powers(x: Array, shift: Array) -> Pair:
    deviation = upcast(x) - shift
    return deviation, jnp.square(deviation)


def _twice(axes: tuple[int, ...], x: Array, weights: Array | None, count: Array) -> Triple:
    """Sums x, then deviations from its mean, which rounding leaves, and their squares."""
    shift = settled(_mean(upcast(x), weights, count, axes))
    return _combined(shift, *_deviations(x, weights, count, axes, shift))


def _deviations(
    x: Array,
    weights: Array | None,
    count: Array,
    axes: tuple[int, ...],
    shift: Array,
    seen: Callable[..., tuple[Any, ...]] = lambda *arrays: arrays,
) -> Pair:
    """Returns the mean deviation from `shift` and the mean squared one.

    `seen` is what each of the two sums sees of the arrays.
    """
    first, around = seen(x, shift)
    slip = _mean(upcast(first) - expand(around, axes), weights, count, axes)
    second, around, _ = seen(x, shift, slip)
    centered = upcast(second) - expand(around, axes)
    return slip, _mean(centered, weights, count, axes, times=centered)


def _combined(shift: Array, slip: Array, spread: Array) -> Triple:
    slip = settled(slip)
    return *two_sum(shift, slip), jnp.maximum(spread - jnp.square(slip), 0)


def _sample(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns a part of `x`, cut so that a batch spread over devices need not move.

    The first axis is that of the batch, and only cut if there is no other.
    """
    free = unsplit_axes(x, axes)
    if len(axes) == 1 and free:
        (axis,) = axes
        step = max(math.gcd(x.shape[axis], SPARSENESS * MANY) // MANY, 1)
        shape = *x.shape[:axis], x.shape[axis] // step, step, *x.shape[axis + 1 :]
        return lax.index_in_dim(x.reshape(shape), 0, axis + 1, keepdims=False)
    limits, sparseness = list(x.shape), SPARSENESS
    for axis in axes[1:]:
        if axis in free:
            step = min(x.shape[axis], sparseness)
            limits[axis] = -(-x.shape[axis] // step)
            sparseness //= step
    return lax.slice(x, [0] * x.ndim, limits)


@functools.partial(mean_and_var.defjvp, symbolic_zeros=True)
def _mean_and_var_jvp(axes, primals, tangents):
    x, weights, count = primals
    tx, tweights, _ = tangents  # the terms of `tweights` hold what the count would add
    mean, rest, var = mean_and_var(x, weights, count, axes)
    tmean, tvar = jnp.zeros_like(mean), jnp.zeros_like(var)
    if not isinstance(tx.wide, SymbolicZero):
        by_x = _tangent_of_x(axes, x.kept, weights, count, mean, tx.wide)
        tmean, tvar = tmean + by_x[0], tvar + by_x[1]
    if weights is not None and not isinstance(tweights, SymbolicZero):
        by_weights = _tangent_of_weights(axes, x.kept, count, mean, var, tweights)
        tmean, tvar = tmean + by_weights[0], tvar + by_weights[1]
    return (mean, rest, var), (tmean, jnp.zeros_like(rest), tvar)


# Checkpointed, so that the backward pass keeps x in its own dtype and centers it again,
# instead of keeping the centered copy.
@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _tangent_of_x(axes, x, weights, count, mean, tx):
    centered = upcast(x) - expand(mean, axes)
    tx = tx if weights is None else tx * weights
    totals = jnp.sum(tx, axes), jnp.sum(centered * tx, axes)
    if is_isolable(x):
        # Transposed, or the loop over x would divide the vectors for each element.
        totals = on_cpu_or_not(lax.optimization_barrier, same, totals)
    return totals[0] / divisor(count), 2 * totals[1] / divisor(count)


@functools.partial(jax.checkpoint, static_argnums=0)
def _tangent_of_weights(axes, x, count, mean, var, tweights):
    centered = upcast(x) - expand(mean, axes)
    excess = jnp.square(centered) - expand(var, axes)
    return tuple(_mean(t, tweights, count, axes) for t in (centered, excess))


def _mean(
    x: Array,
    weights: Array | None,
    count: Array,
    axes: tuple[int, ...],
    *,
    times: Array | None = None,
) -> Array:
    """Returns the weighted mean of `x`, or of x times `times`, and 0 of nothing.

    The weight comes first in the product: 0 times a square that overflowed is NaN.
    """
    weighted = x if weights is None else x * weights
    product = weighted if times is None else weighted * times
    return jnp.sum(product, axes) / divisor(count)


def divisor(count: Array) -> Array:
    """Returns what to divide a sum by: `count`, or 1 where nothing was summed."""
    return jnp.where(count > 0, count, jnp.ones_like(count))
