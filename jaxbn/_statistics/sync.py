"""Moments over devices: the sums and counts of all shards, in one collective."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._kernels.accelerator import divisor
from jaxbn._kernels.compensated import halves, settled, two_product, two_sum
from jaxbn._statistics.moments import ExactMoments, Moments
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
    parts: tuple[Array, ...], axis_name: AxisName | None, groups: AxisGroups | None
) -> tuple[Array, ...]:
    """Returns sums of one shape over the devices, in one collective."""
    if axis_name is None:
        return parts
    if not jnp.iscomplexobj(parts[0]):
        return tuple(_sum(jnp.stack(parts), axis_name, groups))
    first, *others = parts
    re, im, *others = _sum(jnp.stack([first.real, first.imag, *others]), axis_name, groups)
    return lax.complex(re, im), *others


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _sync(mean, rest, var, count, axis_name, groups):
    # n, n mean and n mean^2, of which nearly all cancels, travel as leading halves, which
    # add up without rounding, and rests.
    total, total_rest = two_product(count, mean)
    square, square_rest = two_product(total, mean)
    square_rest += (total_rest + 2 * count * rest) * mean
    total_rest += count * rest
    words = [count * var, *halves(count)]
    words += [*halves(total), total_rest]
    words += [*halves(square), square_rest]
    within, *words = _sum(jnp.stack(words), axis_name, groups)
    count, count_rest = two_sum(*words[:2])
    total, total_rest = _normal(*words[2:5])
    square, square_rest = _normal(*words[5:])

    n = divisor(count)
    mean = settled(total / n)
    product, product_rest = two_product(mean, n)
    product_rest += mean * count_rest
    mean_rest = ((total - product) - product_rest + total_rest) / n
    product, product_rest = two_product(mean, total)
    cross = mean * total_rest + mean_rest * total
    between = (square - product) - product_rest + square_rest - cross
    mean, rest = two_sum(mean, mean_rest)
    return mean, rest, (within + jnp.maximum(between, 0)) / n, count


def _normal(high: Array, low: Array, rest: Array) -> tuple[Array, Array]:
    """Returns the sum of three numbers as its value and what the value rounds off."""
    total, lost = two_sum(high, low)
    return two_sum(total, lost + rest)


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
