"""Moving averages of any pytree, and of the params and statistics of a model together."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._compat import exported
from jaxbn._dtypes import refuse_half, upcast
from jaxbn._typing import Array, PyTree
from jaxbn._values.canonical import as_flag, as_number, as_settled, known
from jaxbn._values.journeys import Value


@exported
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
@dataclasses.dataclass(frozen=True, repr=False)
class Ema(Value):
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

    def __post_init__(self) -> None:
        remedy = "Pass one that changes from step to step to update(..., decay=...)."
        decay = as_number("decay", self.decay, remedy)
        _check_decay(decay)
        object.__setattr__(self, "decay", decay)
        object.__setattr__(self, "debias", as_flag("debias", self.debias))

    def init(self, tree: PyTree) -> EmaState:
        """Returns the average before the first update: `tree` itself.

        Args:
            tree: Any pytree of arrays.

        Returns:
            An `EmaState`.
        """
        # Copies, so that donating the averaged tree does not delete the average.
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
            TypeError: An array of the average is below float32, in which it would stall.
            ValueError: decay lies outside [0, 1]; the trees differ.
        """
        if decay is not None:
            _check_decay(decay)
        if jax.tree.structure(tree) != jax.tree.structure(state.average):
            raise ValueError(
                f"the tree has the structure {jax.tree.structure(tree)} but the average "
                f"{jax.tree.structure(state.average)}. Average one tree per state."
            )
        refuse_half(state, "state")
        rate = jnp.asarray(1 - (self.decay if decay is None else decay), jnp.float32)
        if num_updates is not None:
            n = jnp.asarray(num_updates).astype(jnp.float32)
            # This is 1 - min(d, (1 + n) / (10 + n)) without cancellation near 1.
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
        """Returns the average in `state`, in the dtypes of the tree `like` if given."""
        if like is None:
            return state.average
        return jax.tree.map(
            lambda average, leaf: average.astype(leaf.dtype), state.average, like
        )


@exported
class AverageState(NamedTuple):
    """A running average of the params and the statistics of a model.

    Example:
        >>> import jaxbn, jaxbn.optim
        >>> print(jaxbn.optim.ModelAverage().init(*jaxbn.init(2)).count)
        0.0

    Attributes:
        pair: The `EmaState` of `(params, stats)`.
        count: How many models are in the average, a float32 scalar.
    """

    pair: EmaState
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class ModelAverage(Value):
    r"""An average of params and statistics together: SWA, or EMA with a decay.

    .. math::
        a' = a + \frac{v - a}{n + 1} \text{ (SWA)}, \qquad
        a' = a + \frac{1 - d}{w'} (v - a),\; w' = d w + 1 - d \text{ (EMA)}

    The first model replaces what `init` was given. Means and variances are each averaged
    as they are. For a layer that reads the data linearly, the averaged mean is then that
    under the averaged weights, and the averaged variance an upper bound, since the
    variance is convex in the weights; pooling the variances, as one does for batches of
    one model, would add how far the means lie apart, which averaging the weights removes.
    Deeper layers read what the averaged weights before them made. So the averaged
    statistics are a start, and are to be taken from data again, by `reestimate`, before
    evaluation.

    Example:
        >>> import jaxbn, jaxbn.optim
        >>> params, stats = jaxbn.init(2)
        >>> average = jaxbn.optim.ModelAverage()
        >>> state = average.init(params, stats)
        >>> for mean in (1.0, 3.0):
        ...     moved = stats._replace(mean=stats.mean + mean)
        ...     state = average.update(state, params, moved)
        >>> params, stats = average.value(state)
        >>> print(stats.mean, stats.var)
        [2. 2.] [1. 1.]

    Attributes:
        decay: The decay d in [0, 1) of the moving average; None for equal weights.

    Raises:
        TypeError: decay is not a Python number.
        ValueError: decay lies outside [0, 1].

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
        Generalization", 2018.

    Differs from `optax.ema` of the params alone, which leaves the statistics of the last
    weights beside the averaged ones.
    """

    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None:
            object.__setattr__(self, "decay", self._ema().decay)

    def init(self, params: PyTree, stats: PyTree) -> AverageState:
        """Returns the average of no model yet, of the structure of `(params, stats)`."""
        return AverageState(self._ema().init((params, stats)), jnp.zeros(()))

    def update(self, state: AverageState, params: PyTree, stats: PyTree) -> AverageState:
        """Returns the average `state` after one more model, `params` and `stats`.

        No gradient flows into it.
        """
        decay = state.count / (state.count + 1) if self.decay is None else None
        pair = self._ema().update(state.pair, (params, stats), decay=decay)
        return AverageState(pair, state.count + 1)

    def value(
        self, state: AverageState, like: tuple[PyTree, PyTree] | None = None
    ) -> tuple[PyTree, PyTree]:
        """Returns the averages `(params, stats)` that `state` holds.

        They come in the dtypes of the pair `like` if one is given.
        """
        return self._ema().value(state.pair, like)

    def _ema(self) -> Ema:
        return Ema(0.0) if self.decay is None else Ema(self.decay, debias=True)


def _widened(leaf: Array) -> Array:
    return upcast(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _check_decay(decay: float | Array) -> None:
    value = known(as_settled("decay", decay, "0.999 is usual."))
    if value is not None and not 0 <= value <= 1:
        raise ValueError(
            f"decay must lie in [0, 1], got {decay}. The average spans about "
            "1 / (1 - decay) updates; 0.999 is usual."
        )
