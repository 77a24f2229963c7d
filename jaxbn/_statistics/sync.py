"""Moments over devices: the sums and counts of all shards, in one collective."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._kernels.accelerator import divisor
from jaxbn._kernels.compensated import (
    compensated_sum,
    halves,
    halves_below,
    interleaved,
    settled,
    two_product,
    two_sum,
)
from jaxbn._kernels.reduction import ExactMoments
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.named_axes import as_groups, check_axis, check_nesting
from jaxbn._typing import Array, AxisGroups, AxisName


def sync_moments(
    moments: Moments,
    axis_name: AxisName,
    *,
    axis_index_groups: AxisGroups | None = None,
) -> Moments:
    r"""Returns the moments of the batches of all devices taken as one.

    .. math::
        n = \sum_d n_d, \quad
        \mu = \frac{1}{n} \sum_d n_d \mu_d, \quad
        \sigma^2 = \frac{1}{n} \sum_d n_d \left(\sigma_d^2 + |\mu_d - \mu|^2\right)

    over the devices d, whose batches may differ in size, be weighted, or be empty. One
    `psum` forward and one backward. What would cancel is summed in twice the precision,
    so the variance is as exact as that of one device.

    Args:
        moments: Those of the batch of this device.
        axis_name: The mapped axis of `pmap`, `shard_map` or `vmap`, or a tuple of them.
        axis_index_groups: None, or groups of device indices that partition the axis, as
            for `jax.lax.psum`; of unequal sizes too, and also where JAX has no groups.

    Returns:
        `Moments`, equal on all devices (of a group).

    Raises:
        NameError: There is no such axis here.
        NotImplementedError: The axis is that of a `vmap` inside a `shard_map` with
            check_vma=True.
        TypeError: axis_name or axis_index_groups are of the wrong type.
        ValueError: The groups are no partition of the axis; the shapes of moments differ.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[[0.0], [2.0]], [[10.0], [12.0]]])
        >>> pooled = jax.vmap(
        ...     lambda x: jaxbn.sync_moments(jaxbn.moments(x), "device"), axis_name="device"
        ... )(x)
        >>> print(pooled.mean.ravel(), pooled.var.ravel(), pooled.count.ravel())
        [6. 6.] [26. 26.] [4. 4.]

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.
        Dekker, "A floating-point technique for extending the available precision", 1971.

    Differs from Flax and Haiku, which average the devices' means and squares: that is
    wrong for unequal counts, and NaN everywhere if one device has none.
    """
    axis_index_groups = as_groups(axis_name, axis_index_groups)
    check_axis(axis_name, axis_index_groups)
    mean, var, count = moments
    if jnp.shape(mean) != jnp.shape(var):
        raise ValueError(
            "the mean and the variance of moments must have one shape, got "
            f"{jnp.shape(mean)} and {jnp.shape(var)}. Take them from jaxbn.moments."
        )
    count = jnp.broadcast_to(jnp.asarray(count, var.dtype), var.shape)
    exact = ExactMoments(mean, var, count, jnp.zeros_like(mean))
    return Moments(*sync_exact(exact, axis_name, axis_index_groups)[:3])


def sync_exact(
    moments: ExactMoments, axis_name: AxisName, groups: AxisGroups | None
) -> ExactMoments:
    """Returns the moments of all devices; what rounding leaves out of the means counts."""
    mean, var, count, rest = moments
    check_nesting(mean, axis_name)
    if not jnp.iscomplexobj(mean):
        mean, rest, var, count = _sync(mean, rest, var, count, axis_name, groups)
        return ExactMoments(mean, var, count, rest)
    # Real and imaginary parts travel as two features; the real variance rides on the first.
    mean, rest, var, count = _sync(
        jnp.stack([mean.real, mean.imag]),
        jnp.stack([rest.real, rest.imag]),
        jnp.stack([var, jnp.zeros_like(var)]),
        jnp.stack([count, count]),
        axis_name,
        groups,
    )
    mean, rest = (lax.complex(a[0], a[1]) for a in (mean, rest))
    return ExactMoments(mean, var.sum(0), count[0], rest)


def sum_over_devices(
    parts: tuple[Array, ...], axis_name: AxisName, groups: AxisGroups | None
) -> tuple[Array, ...]:
    """Returns sums of one shape over the devices, in one collective."""
    if not jnp.iscomplexobj(parts[0]):
        return tuple(_sum(jnp.stack(parts), axis_name, groups))
    first, *others = parts
    re, im, *others = _sum(jnp.stack([first.real, first.imag, *others]), axis_name, groups)
    return lax.complex(re, im), *others


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _sync(mean, rest, var, count, axis_name, groups):
    # n, n mean and n mean^2, of which nearly all cancels in the variance, are computed in
    # three times the precision, of which the sums over devices keep 2^-60.
    words = [count * var, *halves(count)]
    total = _product((count, jnp.zeros_like(count), jnp.zeros_like(count)), mean, rest)
    words += [*_as_words(total), *_as_words(_product(total, mean, rest))]
    within, *words = _sum(jnp.stack(words), axis_name, groups)
    count, count_rest = two_sum(*words[:2])
    total, square = _from_words(words[2:6]), _from_words(words[6:])

    n = divisor(count)
    mean = settled(total[0] / n)
    product = _product((n, count_rest, jnp.zeros_like(n)), mean, jnp.zeros_like(mean))
    negative = [-part for part in product]
    slip, slip_rest = compensated_sum(*interleaved(total, negative))
    # With slip = total - n mean: square - total^2 / n = square - n mean^2 - 2 mean slip
    # - slip^2 / n, of which the first difference is exact.
    cross, cross_rest = two_product(2 * mean, slip)
    less = [-part for part in _product(product, mean, jnp.zeros_like(mean))]
    late = -cross_rest - 2 * mean * slip_rest - slip * (slip / n)
    between, between_rest = compensated_sum(*interleaved(square, less), -cross, late)
    within += jnp.maximum(between + between_rest, 0)
    mean, rest = two_sum(mean, slip / n + slip_rest / n)
    return mean, rest, within / n, count


Triple = tuple[Array, Array, Array]


def _product(a: Triple, b: Array, rest: Array) -> Triple:
    """Returns a times the sum of b and its rest; each part some 24 bits below the last."""
    first, low = two_product(a[0], b)
    (second, second_low), (third, third_low) = two_product(a[1], b), two_product(a[0], rest)
    middle, lost = two_sum(low, second)
    middle, lost_too = two_sum(middle, third)
    last = (lost + lost_too) + (second_low + third_low) + (a[2] * b + a[1] * rest)
    return first, middle, last


def _as_words(a: Triple) -> list[Array]:
    """Returns four words of which sums over devices lose nothing above 2^-60 of `a`."""
    high, low = halves_below(a[1], a[0])
    return [*halves(a[0]), high, low + a[2]]


def _from_words(words: list[Array]) -> Triple:
    """Undoes `_as_words` of a sum."""
    first, low = two_sum(words[0], words[1])
    second, last = two_sum(words[2], words[3])
    middle, lost = two_sum(low, second)
    first, middle = two_sum(first, middle)
    middle, last = two_sum(middle, last + lost)
    return first, middle, last


@functools.partial(_sync.defjvp, symbolic_zeros=True)
def _sync_jvp(axis_name, groups, primals, tangents):
    mean, rest, var, count = primals
    tangents = tangents[0], *tangents[2:]  # the rest moves with the mean
    out = _sync(mean, rest, var, count, axis_name, groups)
    apart = (mean - out[0]) + (rest - out[1])
    tmean, tvar, tcount = (
        jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
        for primal, tangent in zip((mean, var, count), tangents, strict=True)
    )
    terms = [count * tmean, count * tvar + 2 * count * apart * tmean]
    if not isinstance(tangents[2], SymbolicZero):
        terms[0] += apart * tcount
        terms[1] += (var + jnp.square(apart) - out[2]) * tcount
        terms.append(tcount)
    by_mean, by_var, *by_count = _sum(jnp.stack(terms), axis_name, groups)
    n = divisor(out[3])
    by_count = by_count[0] if by_count else jnp.zeros_like(n)
    return out, (by_mean / n, jnp.zeros_like(n), by_var / n, by_count)


def _sum(x: Array, axis_name: AxisName, groups: AxisGroups | None) -> Array:
    """Returns the sum of `x` over the devices, or over those of the group of this one."""
    if groups is None:
        return lax.psum(x, axis_name)
    try:
        return lax.psum(x, axis_name, axis_index_groups=groups)
    except NotImplementedError:
        # Under vmap and under the varying-axes check JAX has no groups: every group sums
        # into a slot of its own.
        member = {device: slot for slot, group in enumerate(groups) for device in group}
        slots = jnp.array([member[device] for device in sorted(member)])
        mine = slots[lax.axis_index(axis_name)] == jnp.arange(len(groups))
        spread = jnp.where(mine.reshape(-1, *[1] * x.ndim), x[None], 0)
        picked = jnp.where(mine.reshape(-1, *[1] * x.ndim), lax.psum(spread, axis_name), 0)
        return picked.sum(0)
