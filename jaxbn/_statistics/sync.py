"""Moments over devices: the sums and counts of all shards, in one collective."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._kernels.compensated import halves, settled, two_product, two_sum
from jaxbn._kernels.reduction import divisor
from jaxbn._sharding import varying_axes
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.named_axes import as_groups
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
    moments = Moments(mean, var, jnp.broadcast_to(jnp.asarray(count, var.dtype), var.shape))
    return sync_exact(moments, jnp.zeros_like(mean), axis_name, axis_index_groups)


def sync_exact(
    moments: Moments, rest: Array, axis_name: AxisName, groups: AxisGroups | None
) -> Moments:
    """Returns `sync_moments`, given also what the rounding of the means left out."""
    mean, var, count = moments
    check_nesting(mean, axis_name)
    if not jnp.iscomplexobj(mean):
        return Moments(*_sync(mean, rest, var, count, axis_name, groups))
    # The two parts are two features, of which the first brings the variance along.
    mean, var, count = _sync(
        jnp.stack([mean.real, mean.imag]),
        jnp.stack([rest.real, rest.imag]),
        jnp.stack([var, jnp.zeros_like(var)]),
        jnp.stack([count, count]),
        axis_name,
        groups,
    )
    return Moments(lax.complex(mean[0], mean[1]), var.sum(0), count[0])


def check_nesting(x: Array, axis_name: AxisName) -> None:
    """Raises for an axis of vmap that JAX cannot sum over, where types tell of varying."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mapped = tuple(name for name in names if name not in manual)
    if mapped and varying_axes(x):
        raise NotImplementedError(
            f"JAX cannot sum over the axes {mapped} of vmap inside a shard_map that checks "
            "varying axes. Pass check_vma=False to jax.shard_map, or make them mesh axes."
        )


def check_axis(axis_name: AxisName, groups: AxisGroups | None) -> None:
    """Raises unless the axis is bound here, and the groups partition it."""
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise NameError(
            f"there is no mapped axis {axis_name!r} here. Call this under jax.pmap or "
            f"jax.vmap with axis_name={axis_name!r}, or under a jax.shard_map that is "
            "manual over it. Under plain jax.jit, statistics are those of the whole batch "
            "already: leave axis_name out."
        ) from None
    if groups is not None and sum(map(len, groups)) != size:
        raise ValueError(
            f"axis_index_groups {groups} do not cover the {size} devices of the axis "
            f"{axis_name!r}. Name each of 0 to {size - 1} in exactly one group, or see "
            "jaxbn.axis_groups."
        )


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
    return mean + mean_rest, (within + jnp.maximum(between, 0)) / n, count


def _normal(high: Array, low: Array, rest: Array) -> tuple[Array, Array]:
    """Returns the sum of three numbers as its value and what the value rounds off."""
    total, lost = two_sum(high, low)
    return two_sum(total, lost + rest)


@functools.partial(_sync.defjvp, symbolic_zeros=True)
def _sync_jvp(axis_name, groups, primals, tangents):
    mean, rest, var, count = primals
    tangents = tangents[0], *tangents[2:]  # the rest moves with the mean
    out = _sync(mean, rest, var, count, axis_name, groups)
    apart = mean - out[0]
    tmean, tvar, tcount = (
        jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
        for primal, tangent in zip((mean, var, count), tangents, strict=True)
    )
    terms = [count * tmean, count * tvar + 2 * count * apart * tmean]
    if not isinstance(tangents[2], SymbolicZero):
        terms[0] += apart * tcount
        terms[1] += (var + jnp.square(apart) - out[1]) * tcount
        terms.append(tcount)
    by_mean, by_var, *by_count = _sum(jnp.stack(terms), axis_name, groups)
    n = divisor(out[2])
    return out, (by_mean / n, by_var / n, by_count[0] if by_count else jnp.zeros_like(n))


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
