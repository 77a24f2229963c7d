"""TensorFlow's moving averages of variables and of tensors, with zero debiasing."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._averages import Ema, EmaState
from jaxbn._compat import exported
from jaxbn._dtypes import at_least_float32
from jaxbn._typing import Array, PyTree
from jaxbn._values.canonical import as_flag
from jaxbn._values.journeys import Value
from jaxbn.tf1._arguments import check_decay

_EMA = Ema(0.0)  # its decay is given at each update, where it may be traced


@exported
class MovingAverage(NamedTuple):
    """What TensorFlow kept of a moving average.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> tf1.ExponentialMovingAverage(0.9).init(jnp.zeros(2)).biased is None
        True

    Attributes:
        average: The shadow variables, a tree like the averaged one.
        biased: The averages from zero, where these are debiased; otherwise None.
        local_step: The number of updates so far, likewise.
    """

    average: PyTree
    biased: PyTree | None = None
    local_step: Array | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExponentialMovingAverage(Value):
    """`tf.train.ExponentialMovingAverage`, over any pytree.

    shadow = decay * shadow + (1 - decay) * value. TensorFlow began differently for
    variables, whose shadow starts at their value and where zero_debias is ignored, and for
    tensors such as batch moments, whose shadow starts at 0: `init` must be told which. A
    shadow that starts at 0 without zero_debias is too small for the first 1 / (1 - decay)
    updates, a variance included.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> ema = tf1.ExponentialMovingAverage(0.9, zero_debias=True)
        >>> state = ema.init({"mean": jnp.zeros(2)}, tensors=True)
        >>> state = ema.apply(state, {"mean": jnp.ones(2)})
        >>> print(ema.average(state)["mean"])
        [1. 1.]

    Attributes:
        decay: The decay in [0, 1]; may be traced.
        num_updates: The number of steps n so far, for the decay min(decay,
            (1 + n) / (10 + n)); may be traced, so make the value anew in each step.
        zero_debias: Whether averages of tensors are divided by 1 - decay ** updates. With
            num_updates, TensorFlow took the decay of the current update for all of them.
        name: No effect: it named operations of the graph.

    Raises:
        TypeError: decay is not a number.
        ValueError: decay lies outside [0, 1].
    """

    decay: float | Array
    num_updates: int | Array | None = None
    zero_debias: bool = False
    name: str = "ExponentialMovingAverage"

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", check_decay("decay", self.decay))
        object.__setattr__(self, "zero_debias", as_flag("zero_debias", self.zero_debias))

    def init(self, values: PyTree, tensors: bool = False) -> MovingAverage:
        """Returns the averages before the first update.

        Args:
            values: Any pytree of floating arrays.
            tensors: Whether to start as TensorFlow did for tensors, at 0, instead of as it
                did for variables, at their values.

        Returns:
            A `MovingAverage`.

        Raises:
            TypeError: A value is not floating.
        """
        values = jax.tree.map(_floating, values)
        if not tensors:
            return MovingAverage(_EMA.init(values).average)
        zeros = jax.tree.map(jnp.zeros_like, values)
        if not self.zero_debias:
            return MovingAverage(_EMA.init(zeros).average)
        average, biased = _EMA.init(zeros).average, _EMA.init(zeros).average
        return MovingAverage(average, biased, jnp.zeros(()))

    def apply(self, state: MovingAverage, values: PyTree) -> MovingAverage:
        """Returns the averages after one more tree of values. No gradient flows into them.

        Args:
            state: As `init` or the last `apply` returned it.
            values: A tree like the one given to `init`.

        Returns:
            A `MovingAverage` like `state`.

        Raises:
            ValueError: The trees differ.
        """
        # Updating an average of 1 with 0 gives the decay of this update.
        one = _EMA.update(
            EmaState(jnp.ones(())), 0.0, decay=self.decay, num_updates=self.num_updates
        )
        debias = state.biased is not None
        return assign_moving_average(state, values, one.average, zero_debias=debias)

    def average(self, state: MovingAverage) -> PyTree:
        """Returns the averages that `state` holds, at least in float32."""
        return state.average


def assign_moving_average(
    state: MovingAverage, value: PyTree, decay: float | Array, zero_debias: bool = True
) -> MovingAverage:
    """Returns the moving average of a variable after one more value.

    TensorFlow's `moving_averages.assign_moving_average`, whose zero debiasing forgets what
    the variable held at first.

    Args:
        state: The average so far, with `biased` and `local_step` for zero debiasing: start
            these at 0, or take all from `ExponentialMovingAverage.init`.
        value: A tree like `state.average`.
        decay: The decay in [0, 1]; may be traced.
        zero_debias: Whether the average is `biased` / (1 - decay ** local_step).

    Returns:
        A `MovingAverage` like `state`.

    Raises:
        ValueError: decay lies outside [0, 1]; the trees differ; state is not one for zero
            debiasing, or is one without need.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> state = tf1.MovingAverage(jnp.array(5.0), jnp.array(0.0), jnp.array(0.0))
        >>> print(tf1.assign_moving_average(state, jnp.array(2.0), 0.5).average)
        2.0
    """
    if zero_debias != (state.biased is not None):
        got = "a" if state.biased is not None else "no"
        raise ValueError(
            f"zero_debias={zero_debias} got {got} biased average in its state. Start with "
            "MovingAverage(value) for a plain average, and with MovingAverage(value, "
            "zeros_like(value), zeros(())) for a debiased one."
        )
    start = state.average if state.biased is None else state.biased
    moved = _EMA.update(EmaState(start), value, decay=decay).average
    if state.local_step is None:
        return MovingAverage(moved)
    step = state.local_step + 1
    average = jax.tree.map(lambda biased: without_bias(biased, step, decay), moved)
    return MovingAverage(average, moved, step)


def without_bias(biased: Array, step: Array, decay: float | Array) -> Array:
    """Returns an average that started from 0, divided by the weight it has gathered."""
    wide = at_least_float32(biased.dtype)
    weight = 1 - jnp.asarray(decay).astype(wide) ** step.astype(wide)
    return (biased.astype(wide) / weight).astype(biased.dtype)


def _floating(value: Array) -> Array:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"a moving average needs floating values, got {value.dtype} of shape "
            f"{value.shape}. Leave it out, or use jaxbn.Ema, which carries it over."
        )
    return value
