"""The formulations for GPUs and TPUs, and for whatever is small: plain, in one reading.

XLA fuses all sums over one array into one kernel there ("multi-output fusion"), so nothing
has to be kept apart. A conditional, for which a GPU waits for the host, is taken only where
a sample would cost an all-reduce or stand between x and the product that makes it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxbn._dtypes import at_least_float32, upcast, widest
from jaxbn._kernels.compensated import settled, two_sum
from jaxbn._kernels.operands import Map, MapSettings, MapTangent, Reduction, Sums
from jaxbn._kernels.operation import has_known_size, is_small, number_of_elements
from jaxbn._sharding import broadcast_like, may_be_split
from jaxbn._typing import Array, DTypeLike

Triple = tuple[Array, Array, Array]

# The sample holds at least 1/32 of x. If its mean is off by d, then var >= d^2 / 32, so at
# most 5 bits cancel in E[d^2] - E[d]^2.
SPARSENESS = 32
# Use E[x^2] - E[x]^2 only while mean^2 <= 16 var, where at most 4 bits cancel.
ILL_CONDITIONED = 16.0


def moments(axes: tuple[int, ...], of: Reduction, whole: bool) -> Triple:
    """Returns the mean, what its rounding left out, and the biased variance.

    Sums deviations from the mean of a sample, and their squares, in one reading of x.
    Weighted arrays, of which a sample may hold nothing, are read twice. Where x may be
    split over devices, the mean of a sample would be one more all-reduce.
    """
    if not whole and may_be_split(of.x, axes):
        return guarded(axes, of)
    if not is_sampled(of):
        return two_pass(axes, of, whole)
    shift = sample_mean(axes, of.x)
    return around(axes, of, shift, upcast(of.x) - shift)


def moments_on_tpu(axes: tuple[int, ...], of: Reduction, whole: bool) -> Triple:
    """Returns the same, of sums of values wherever x is not small.

    A sum of values is fused into the matrix product that makes x, where a sample would
    have to wait for it: four products and layers take .69 of the estimated cycles forward.
    """
    return moments(axes, of, whole and is_small(of.x))


def all_within(values: Array, bounds: Array) -> Array:
    """Tells whether no value lies above its bound, or is NaN."""
    return jnp.all(values <= bounds)


def guarded(
    axes: tuple[int, ...],
    of: Reduction,
    apart: Callable[..., Any] = lambda of, *_: of,
    all_within: Callable[[Array, Array], Array] = all_within,
) -> Triple:
    """Sums x and its square, and reads x again where that has lost digits.

    Args:
        axes: Those that are summed over.
        of: What is summed.
        apart: Returns its first argument as values that XLA reads for one sum only; the
            others tell apart what else would be equal.
        all_within: The function of that name, in a formulation for the platform.
    """
    first, second = apart(of), apart(of, lax.full_like(of.x, 1, shape=(1,)))
    total = weighted_sum(axes, first, upcast(first.x))
    square = weighted_sum(axes, second, upcast(second.x), upcast(second.x))
    count = divisor(count_of(axes, of))
    mean = total / count
    squared = mean * mean
    well = all_within(squared, ILL_CONDITIONED * (square / count - squared))

    def again() -> Triple:
        # Not `mean`: as an operand of the conditional it would be computed by a loop of its
        # own, for which every pass would wait.
        shift = settled(total / count)
        first, by = apart((of, shift))
        slip = weighted_sum(axes, first, upcast(first.x) - by)
        second, by = apart((of, shift), slip)
        deviation = upcast(second.x) - by
        return shift, slip, weighted_sum(axes, second, deviation, deviation)

    around_zero = lax.full_like(total, 0), total, square
    shift, slip, spread = lax.cond(well, lambda: around_zero, again)
    return combined(shift, slip / count, spread / count)


def is_sampled(of: Reduction) -> bool:
    """Tells whether a sample of x holds something of every sum, and costs less than x."""
    return of.weights is None and has_known_size(of.x) and not is_small(of.x)


def two_pass(axes: tuple[int, ...], of: Reduction, whole: bool) -> Triple:
    """Sums x, then deviations from its mean, which rounding leaves, and their squares."""
    shift = settled(mean_of(axes, of, upcast(of.x)))
    return around(axes, of, shift, upcast(of.x) - shift)


def around(axes: tuple[int, ...], of: Reduction, shift: Array, deviation: Array) -> Triple:
    """Returns the moments of x, given its deviations from a shift near the mean."""
    return combined(
        shift, mean_of(axes, of, deviation), mean_of(axes, of, deviation, deviation)
    )


def combined(shift: Array, slip: Array, spread: Array) -> Triple:
    """Returns the moments of x, given the mean deviation from `shift` and its square."""
    slip = settled(slip)
    return *two_sum(shift, slip), lax.max(spread - slip * slip, lax.full_like(spread, 0))


def sample_mean(axes: tuple[int, ...], x: Array) -> Array:
    """Returns the mean of a sample of x, with its last bits cleared."""
    sample = sample_of(axes, x)
    return settled(mean_of(axes, Reduction(sample, None, None), upcast(sample)))


def mean_of(
    axes: tuple[int, ...], of: Reduction, values: Array, times: Array | None = None
) -> Array:
    """Returns the weighted mean of values, or of values times others; 0 of nothing."""
    return weighted_sum(axes, of, values, times) / divisor(count_of(axes, of))


def weighted_sum(
    axes: tuple[int, ...], of: Reduction, values: Array, times: Array | None = None
) -> Array:
    """Returns the weighted sum of `values`, or of values times `times`.

    The weight comes first in the product: 0 times a square that overflowed is NaN.
    """
    weighted = values if of.weights is None else values * of.weights
    return total_of(weighted if times is None else weighted * times, axes)


def total_of(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns the sum of x over `axes`, which stay with size 1."""
    return lax.expand_dims(lax.reduce_sum(x, axes=axes), axes)


def count_of(axes: tuple[int, ...], of: Reduction) -> Array | int:
    """Returns the total weight of every feature; a number where there are no weights."""
    return number_of_elements(of.x, axes) if of.count is None else of.count


def divisor(count: Any) -> Any:
    """Returns what to divide a sum by: `count`, or 1 where nothing was summed."""
    if isinstance(count, int):
        return max(count, 1)
    return jnp.where(count > 0, count, jnp.ones_like(count))


def sample_of(axes: tuple[int, ...], x: Array) -> Array:
    """Returns a part of `x` that holds 1/32 of it or more, and lies together in memory.

    The examples at the front, not some of every example: on an H100 the forward pass of
    256x1024x14x14 in bfloat16 takes 138 us with the one and 155 with the other.
    """
    limits, sparseness = list(x.shape), SPARSENESS
    for axis in axes:
        step = min(x.shape[axis], sparseness)
        limits[axis] = -(-x.shape[axis] // step)
        sparseness //= step
    return lax.slice(x, [0] * x.ndim, limits)


def normalize(settings: MapSettings, of: Map, whole: bool) -> tuple[Array]:
    """Returns the map of x, with its ReLU."""
    y = before_relu(of.x, of.mean, of.slope, of.offset)
    y = y if of.residual is None else y + of.residual.astype(y.dtype)
    return ((jnp.maximum(y, 0) if settings.relu else y).astype(settings.dtype),)


def before_relu(x: Array, mean: Array, slope: Array, offset: Array | None) -> Array:
    """Returns (x - mean) slope + offset."""
    y = (x.astype(slope.dtype) - mean) * slope
    return y if offset is None else y + offset


def normalize_tangent(dtype: DTypeLike, of: MapTangent, whole: bool) -> tuple[Array]:
    """Returns the tangent of the map, behind its ReLU."""
    wide, parts = of.slope.dtype, []
    if of.slope_tangent is not None:
        parts.append((of.x.astype(wide) - of.mean) * of.slope_tangent)
    if of.x_tangent is not None:
        parts.append(of.x_tangent.astype(wide) * of.slope)
    if of.residual_tangent is not None:
        parts.append(of.residual_tangent.astype(wide))
    if of.offset_tangent is not None:
        parts.append(broadcast_like(of.offset_tangent, of.x))
    return (opened(of, functools.reduce(operator.add, parts)).astype(dtype),)


def opened(of: MapTangent | Sums, t: Array) -> Array:
    """Returns `t` where the ReLU of the map is open, and 0 elsewhere."""
    y = getattr(of, "y", None)
    if y is None:
        if of.slope is None or of.offset is None:
            return t
        y = before_relu(of.x, of.mean, of.slope, of.offset)
    # XLA's loops that select bfloat16 are scalar code on CPUs without AVX-512.
    wide = upcast(t) if t.dtype == jnp.bfloat16 else t
    return lax.select(y > 0, wide, lax.full_like(wide, 0)).astype(t.dtype)


def sums(axes: tuple[int, ...], of: Sums, whole: bool) -> tuple[Array, Array]:
    """Returns the sum of t and that of t (x - mean)."""
    total, product = (total_of(addend, axes) for addend in addends(of))
    return total, product


def addends(of: Sums) -> tuple[Array, Array]:
    """Returns t where it counts, and t (x - mean), in the wider dtype of t and x."""
    dtype = at_least_float32(widest(of.x.dtype, of.t.dtype))
    t = opened(of, of.t.astype(dtype))
    t = t if of.weights is None else t * of.weights.astype(dtype)
    return t, (upcast(of.x) - of.mean).astype(dtype) * t
