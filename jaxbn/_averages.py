"""Exponential moving averages of any pytree: parameters, statistics, metrics."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._compat import is_traced
from jaxbn._dtypes import upcast
from jaxbn._typing import Array, PyTree


class EmaState(NamedTuple):
    """A running average.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> jaxbn.Ema(0.9).init({"w": jnp.zeros(2)}).weight is None
        True

    Attributes:
        average: The average, a tree like the averaged one; floating leaves at least
            float32, all others as they were last seen.
        weight: The share of the average that comes from updates, with `debias=True`.
    """

    average: PyTree
    weight: Array | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Ema:
    r"""An exponential moving average of every floating leaf of a pytree.

    .. math::
        a' = a + (1 - d_t) (v - a), \qquad
        d_t = \min\!\left(d, \frac{1 + n}{10 + n}\right) \text{ given } n, \text{ else } d

    With `debias`, the average starts from nothing: a' = a + (1 - d_t) / w' (v - a), where
    w' = d_t w + 1 - d_t, so that the first value is the first average.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> ema = jaxbn.Ema(0.9, debias=True)
        >>> state = ema.init({"w": jnp.zeros(2), "step": jnp.array(0)})
        >>> state = ema.update(state, {"w": jnp.ones(2), "step": jnp.array(1)})
        >>> print(ema.value(state)["w"], ema.value(state)["step"])
        [1. 1.] 1

    Attributes:
        decay: The decay d in [0, 1]: an average over about 1 / (1 - d) updates.
        debias: Whether the tree given to `init` is forgotten at the first update.

    Raises:
        TypeError: decay is not a Python number.
        ValueError: decay lies outside [0, 1].

    References:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.

    Differs from `optax.ema` in that leaves which are not floating are carried over, not
    averaged, that half precision is averaged in float32, and in the decay by step.
    """

    decay: float
    _: dataclasses.KW_ONLY
    debias: bool = False

    def __post_init__(self):
        if not isinstance(self.decay, (int, float)) or isinstance(self.decay, bool):
            raise TypeError(
                f"decay must be a Python number, got {self.decay!r}. Pass one that changes "
                "from step to step to update(..., decay=...)."
            )
        _check_decay(self.decay)

    def init(self, tree: PyTree) -> EmaState:
        """Returns the average before the first update: `tree` itself.

        Args:
            tree: Any pytree of arrays.

        Returns:
            An `EmaState`.
        """
        # Copies, so that donating the averaged tree does not take the average with it.
        average = jax.tree.map(lambda leaf: _widened(jnp.array(leaf)), tree)
        return EmaState(average, jnp.zeros(()) if self.debias else None)

    def update(
        self,
        state: EmaState,
        tree: PyTree,
        *,
        decay: float | Array | None = None,
        num_updates: int | Array | None = None,
    ) -> EmaState:
        """Returns the average after one more tree. No gradient flows into it.

        Args:
            state: As `init` or the last update returned it.
            tree: A tree of the structure and shapes of the one given to `init`.
            decay: Overrides the decay, for schedules; may be traced.
            num_updates: The number of updates or steps so far, for a decay that starts
                at 0.1 and grows: min(decay, (1 + n) / (10 + n)); may be traced.

        Returns:
            An `EmaState` like `state`.

        Raises:
            ValueError: decay lies outside [0, 1]; the trees differ.
        """
        if decay is not None:
            _check_decay(decay)
        if jax.tree.structure(tree) != jax.tree.structure(state.average):
            raise ValueError(
                f"the tree has the structure {jax.tree.structure(tree)} but the average "
                f"{jax.tree.structure(state.average)}. Average one tree per state."
            )
        rate = jnp.asarray(1 - (self.decay if decay is None else decay), jnp.float32)
        if num_updates is not None:
            n = jnp.asarray(num_updates).astype(jnp.float32)
            # 1 - min(d, (1 + n) / (10 + n)), free of the cancellation near 1.
            rate = jnp.maximum(rate, 9 / (10 + n))
        weight = state.weight
        if weight is not None:
            weight = weight + rate * (1 - weight)
            rate = rate / jnp.where(weight > 0, weight, 1)

        def toward(average: Array, value: Array) -> Array:
            if not jnp.issubdtype(average.dtype, jnp.inexact):
                return jnp.asarray(value)
            value = lax.stop_gradient(jnp.asarray(value)).astype(average.dtype)
            return average + rate.astype(average.dtype) * (value - average)

        return EmaState(jax.tree.map(toward, state.average, tree), weight)

    def value(self, state: EmaState, like: PyTree | None = None) -> PyTree:
        """Returns the average, in the dtypes of the tree `like` if one is given."""
        if like is None:
            return state.average
        return jax.tree.map(
            lambda average, leaf: average.astype(leaf.dtype), state.average, like
        )


def _widened(leaf: Array) -> Array:
    return upcast(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _check_decay(decay: float | Array) -> None:
    if not is_traced(decay) and not 0 <= decay <= 1:
        raise ValueError(
            f"decay must lie in [0, 1], got {decay}. The average spans about "
            "1 / (1 - decay) updates; 0.999 is usual."
        )
