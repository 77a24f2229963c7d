"""An average of the params and the statistics of a model, taken together."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._averages import Ema, EmaState
from jaxbn._typing import Array, PyTree


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
@dataclasses.dataclass(frozen=True)
class ModelAverage:
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

    def __post_init__(self):
        self._ema()

    def init(self, params: PyTree, stats: PyTree) -> AverageState:
        """Returns the average of no model yet, with the structure of the pair."""
        return AverageState(self._ema().init((params, stats)), jnp.zeros(()))

    def update(self, state: AverageState, params: PyTree, stats: PyTree) -> AverageState:
        """Returns the average after one more model. No gradient flows into it."""
        decay = state.count / (state.count + 1) if self.decay is None else None
        pair = self._ema().update(state.pair, (params, stats), decay=decay)
        return AverageState(pair, state.count + 1)

    def value(
        self, state: AverageState, like: tuple[PyTree, PyTree] | None = None
    ) -> tuple[PyTree, PyTree]:
        """Returns `(params, stats)`, in the dtypes of the pair `like` if one is given."""
        return self._ema().value(state.pair, like)

    def _ema(self) -> Ema:
        return Ema(0.0) if self.decay is None else Ema(self.decay, debias=True)
