"""The state of a norm that gathers the moments of several batches, begun and ended."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._compat import exported
from jaxbn._dtypes import widened
from jaxbn._state import is_stats
from jaxbn._statistics.moments import Moments
from jaxbn._typing import PyTree


@exported
class Gathered(NamedTuple):
    """The state of a norm while it gathers the moments of several batches.

    Structure, shapes and dtypes never change, so `jax.lax.scan` can carry it.

    Example:
        >>> import jaxbn
        >>> _, state = jaxbn.BatchNorm().init(1)
        >>> gathered = jaxbn.gather(state)
        >>> print(gathered.batch.count, gathered.stats.var)
        [0.] [1.]

    Attributes:
        stats: `start` after one update with the moments gathered so far.
        start: The running statistics before.
        batch: The moments of all batches so far, taken as one.
    """

    stats: Any
    start: Any
    batch: Moments


def gather(states: PyTree) -> PyTree:
    """Returns states that gather: every state of a norm becomes a `Gathered`.

    Args:
        states: The state of a norm, or any pytree of them.

    Returns:
        The pytree with a `Gathered` of count 0 in place of every `BatchStats` and
        `RenormStats`; other leaves are as they were.

    Raises:
        ValueError: It holds no state of a norm, or one that gathers already.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> bn = jaxbn.Gather(jaxbn.BatchNorm(momentum=0.0))
        >>> params, state = bn.init(1)
        >>> gathered = jaxbn.gather(state)
        >>> for x in (jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])):
        ...     y, gathered = bn.apply(params, gathered, x, training=True)
        ...
        >>> state = jaxbn.track_gathered(gathered)
        >>> print(state.mean, state.var)
        [3.] [5.]
    """
    leaves = jax.tree.leaves(states, is_leaf=is_state)
    if any(isinstance(leaf, Gathered) for leaf in leaves):
        raise ValueError(
            "a state gathers already. Pass what track_gathered(states) returns, to start "
            "again from the statistics tracked so far."
        )
    if not any(map(is_state, leaves)):
        raise ValueError(
            f"there is no BatchStats or RenormStats in {jax.tree.structure(states)}. Pass "
            "the states that init() returned; for Flax, see jaxbn.linen.gather."
        )

    def begin(state: Any) -> Any:
        if not is_state(state):
            return state
        # Sums are float32 or wider, also those of a state that is not.
        kinds = widened((state.mean, state.var, state.var))
        zeros = map(jnp.zeros_like, kinds)
        # A copy, since a donated state must not hold one buffer twice.
        return Gathered(state, jax.tree.map(jnp.copy, state), Moments(*zeros))

    return jax.tree.map(begin, states, is_leaf=is_state)


def track_gathered(states: PyTree) -> PyTree:
    """Returns the states after one update with all that each has gathered.

    Args:
        states: What `gather` returned, after the batches.

    Returns:
        The pytree as it was before `gather`, with the statistics tracked once.

    Raises:
        ValueError: It holds no state that gathers.

    Example:
        >>> import jaxbn
        >>> _, state = jaxbn.BatchNorm().init(1)
        >>> print(jaxbn.track_gathered(jaxbn.gather(state)).var)
        [1.]
    """
    leaves = jax.tree.leaves(states, is_leaf=is_state)
    if not any(isinstance(leaf, Gathered) for leaf in leaves):
        raise ValueError(
            f"there is no Gathered in {jax.tree.structure(states)}. Pass the states that "
            "started as gather(states) and went through Gather(bn).apply."
        )

    def end(state: Any) -> Any:
        return state.stats if isinstance(state, Gathered) else state

    return jax.tree.map(end, states, is_leaf=is_state)


def is_state(value: object) -> bool:
    """Tells whether a node of a pytree is the state of a norm, gathering or not."""
    return isinstance(value, Gathered) or is_stats(value)
