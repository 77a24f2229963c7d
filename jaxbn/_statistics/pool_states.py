"""Statistics of clients or branches that trained apart, pooled into one state."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernels.reduction import ExactMoments
from jaxbn._state import is_stats, stats_of
from jaxbn._statistics.moments import pool_moments
from jaxbn._typing import Array, ArrayLike, Pair, PyTree
from jaxbn._values.canonical import known


def pool_states(states: PyTree, weights: ArrayLike | None = None) -> PyTree:
    r"""Returns the statistics of clients, branches or domains pooled into one state.

    .. math::
        \mu = \frac{\sum_k w_k \mu_k}{\sum_k w_k}, \quad
        \sigma^2 = \frac{\sum_k w_k (\sigma_k^2 + |\mu_k - \mu|^2)}{\sum_k w_k}

    For models that trained apart, each on data of its own: clients of a federation, members
    of an ensemble that are averaged, the domains of a `DomainBatchNorm`.

    Args:
        states: A state, any pytree of them, or a collection batch_stats of linen, whose
            arrays have the clients along an axis in front: stack them by
            `jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)`.
        weights: How much each client counts, such as the number of rows that it saw, of
            shape (clients,); None for all alike.

    Returns:
        `states` without the axis.

    Raises:
        TypeError: states hold no statistics, or something else besides.
        ValueError: The arrays do not have one axis of clients; weights do not fit it, are
            known to be negative, or all 0.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> states = jaxbn.BatchStats(jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [1.0]]))
        >>> print(*jaxbn.pool_states(states)[:2])
        [2.] [5.]

    Differs from averaging the arrays, as FedAvg does, which leaves out how far the means of
    the clients lie apart. Differs from `sync_state`, which pools over devices.
    """
    leaves, structure = jax.tree.flatten(states, is_leaf=_is_node)
    nodes = [_as_stats(leaf) for leaf in leaves]
    unknown = [
        type(a).__name__ for a, node in zip(leaves, nodes, strict=True) if node is None
    ]
    if unknown or not leaves:
        raise TypeError(
            f"pool_states pools running statistics, got {', '.join(unknown) or 'nothing'}. "
            "Pass states alone, such as BatchStats, or a collection batch_stats; average "
            "params by a rule of their own."
        )
    count = _checked_weights(weights, jax.tree.leaves(nodes))
    pooled = [_pooled(node, count) for node in nodes]
    restored = [
        {name: getattr(new, name) for name in old} if isinstance(old, Mapping) else new
        for old, new in zip(leaves, pooled, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)


def _is_node(value: Any) -> bool:
    return _as_stats(value) is not None


def _as_stats(value: Any) -> Any | None:
    """Returns a state, also one whose fields are the entries of a mapping, or None."""
    if is_stats(value):
        return value
    if not isinstance(value, Mapping) or any(
        isinstance(a, Mapping) for a in value.values()
    ):
        return None
    state = stats_of(value)
    return state if state is not None and set(value) <= set(state._fields) else None


def _checked_weights(weights: ArrayLike | None, arrays: list[Array]) -> Array:
    sizes = {jnp.shape(array)[:1] for array in arrays}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"the arrays of states have leading axes {sorted(sizes)}, which must be one "
            "axis of clients. Stack the states of all clients first."
        )
    (shape,) = sizes
    if weights is None:
        return jnp.ones(shape)
    weights = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    if weights.shape != shape:
        raise ValueError(
            f"weights must have the shape {shape} of the clients, got "
            f"{weights.shape}. Give each client one number: the rows that it saw."
        )
    values = known(weights)
    if values is not None and not ((values >= 0).all() and values.any()):
        raise ValueError(
            f"weights must be 0 or more, and not all 0, got {values}. Pass the number of "
            "rows that each client saw."
        )
    return jnp.asarray(weights)


def _pooled(state: Any, weights: Array) -> Any:
    def pool(mean: Array, var: Array) -> Pair:
        count = weights.astype(var.dtype).reshape(-1, *[1] * (var.ndim - 1))
        count = jnp.broadcast_to(count, var.shape)
        moments = ExactMoments(mean, var, count, jnp.zeros_like(mean))
        whole = pool_moments(moments)
        return whole.mean, whole.var

    return state.pooled(pool)
