"""Replicas that agree: statistics that each device tracked alone, pooled and compared."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._dtypes import widened
from jaxbn._state import RunningStats, is_stats
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.named_axes import as_groups, check_axis
from jaxbn._statistics.running import stored
from jaxbn._statistics.sync import sum_over_devices, sync_moments
from jaxbn._typing import Array, AxisGroups, AxisName, Pair, PyTree
from jaxbn._values.canonical import known

State = TypeVar("State", bound=RunningStats)


def sync_state(
    state: State,
    axis_name: AxisName,
    *,
    weight: float | Array = 1.0,
    axis_index_groups: AxisGroups | None = None,
) -> State:
    r"""Returns the state of all replicas pooled into one, the same on every device.

    .. math::
        \mu = \frac{\sum_d w_d \mu_d}{\sum_d w_d}, \quad
        \sigma^2 = \frac{\sum_d w_d (\sigma_d^2 + |\mu_d - \mu|^2)}{\sum_d w_d}

    For layers without `axis_name`, whose replicas each track the statistics of their own
    part of the data, before evaluation or a checkpoint. Called under `pmap`, `shard_map`
    or `vmap`.

    Args:
        state: That of this device.
        axis_name: The mapped axis, or a tuple of them.
        weight: How much this replica counts, such as the number of rows that it saw.
        axis_index_groups: Groups of devices that pool among themselves; None for all.

    Returns:
        A state like `state`, which may leave a `shard_map` as replicated. Where all weights
        are 0, all replicas count alike. Sums are float32 or wider. A feature that is not
        finite on a replica is pooled from the others; where the pooled statistics are no
        finite numbers of the dtype of the state, it keeps that of the first replica.

    Raises:
        NameError: There is no such axis here.
        TypeError: state is not that of a `BatchNorm` or a `BatchRenorm`.
        ValueError: The groups are no partition of the axis; weight is no scalar, or is
            known to be negative.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> states = jaxbn.BatchStats(jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [1.0]]))
        >>> pooled = jax.vmap(lambda s: jaxbn.sync_state(s, "d"), axis_name="d")(states)
        >>> print(pooled.mean.ravel(), pooled.var.ravel())
        [2. 2.] [5. 5.]

    Differs from averaging the states with `pmean`, which leaves out how far the means of
    the replicas lie apart.
    """
    if not is_stats(state):
        raise TypeError(
            f"sync_state pools a BatchStats or a RenormStats, got {type(state).__name__}. "
            "Map it over the layers of a model: jax.tree.map(..., is_leaf=...). Statistics "
            "of your own are made known by jaxbn.register_stats."
        )
    groups = as_groups(axis_name, axis_index_groups)
    check_axis(axis_name, groups)
    wide = widened(state)
    count = _as_count(weight, wide.var)
    for leaf in jax.tree.leaves(wide):
        count = jnp.where(jnp.isfinite(leaf), count, 0)
    (total,) = sum_over_devices((count,), axis_name, groups)
    # Not the state of each device, by which replicas would stay apart: a checked shard_map
    # lets out what is a sum over devices, and nothing else.
    count = jnp.where(total > 0, count, jnp.ones_like(count))

    def pool(mean: Array, var: Array) -> Pair:
        mean, var = (jnp.where(count > 0, array, 0) for array in (mean, var))
        moments = Moments(mean, var, count)
        return sync_moments(moments, axis_name, axis_index_groups=groups)[:2]

    def of_the_first(leaf: Array) -> Array:
        heads = jnp.array([0] if groups is None else [group[0] for group in groups])
        mine = jnp.where((lax.axis_index(axis_name) == heads).any(), leaf, 0)
        return sum_over_devices((mine,), axis_name, groups)[0]

    return stored(jax.tree.map(of_the_first, state), wide.pooled(pool), jnp.ones(()))


def _as_count(weight: float | Array, like: Array) -> Array:
    """Returns the weight of a replica for each of its features, once it is checked."""
    if jnp.shape(weight):
        raise ValueError(
            f"weight must be a scalar, got shape {jnp.shape(weight)}. Sum it up: a replica "
            "counts as a whole."
        )
    value = known(weight)
    if value is not None and not value >= 0:
        raise ValueError(
            f"weight must be 0 or more, got {weight}. Pass the number of rows that this "
            "replica saw."
        )
    return jnp.broadcast_to(jnp.asarray(weight, like.dtype), like.shape)


def replica_differences(tree: PyTree, *, axis: int | None = None) -> dict[str, float]:
    """Tells whether the replicas of arrays have diverged, and by how much.

    Replicated arrays hold one copy on every device, and nothing keeps the copies equal:
    statistics that were tracked without `axis_name` under `pmap`, or under `shard_map`
    with `check_vma=False`, differ silently. Call it outside of any transformation.

    Args:
        tree: Arrays, such as params and state.
        axis: None to compare the copies of replicated arrays on this process's devices; an
            axis of devices, such as the leading one of what `pmap` returns, to compare
            along it.

    Returns:
        The largest absolute difference of each array that differs, by its path in the tree;
        empty if all replicas agree. A NaN agrees with a NaN only.

    Raises:
        TypeError: A leaf is not an array.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> state = jaxbn.BatchStats(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1)))
        >>> jaxbn.replica_differences(state, axis=0)
        {'.mean': 2.0}
    """
    differences = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise TypeError(
                f"the leaf {name} must be an array, got {type(leaf).__name__}. Pass the "
                "arrays of params and state."
            )
        if axis is not None:
            copies = np.moveaxis(np.asarray(leaf), axis, 0)
        elif isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
            copies = np.stack([shard.data for shard in leaf.addressable_shards])
        else:
            continue
        largest = _largest_difference(copies)
        if largest > 0:
            differences[name] = largest
    return differences


def _largest_difference(copies: np.ndarray) -> float:
    first = copies[:1]
    same = (copies == first) | ((copies != copies) & (first != first))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(np.where(same, 0, copies - first)).max()
    return float(np.inf if np.isnan(apart) else apart)
