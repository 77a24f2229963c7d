"""A batch norm whose zero-debiased averages go with a count of batches, as Haiku's do."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.wrapper import Wrapper
from jaxbn._state import BatchNormParams, register_stats
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.running import like_state, moved, stored
from jaxbn._typing import Array, Pair

_DEFAULT = BatchNorm()


@register_stats
class CountedStats(NamedTuple):
    """Zero-debiased running statistics, and of how many batches.

    Attributes:
        mean: Running mean, of the shape of the features. Starts at 0.
        var: Running variance, likewise. Starts at 1.
        batches: How many batches each feature has seen: a float of that shape.
    """

    mean: Array
    var: Array
    batches: Array

    def renewed(self, mean: Array, var: Array) -> "CountedStats":
        """Returns the state after a data set of these moments."""
        return CountedStats(mean, var, jnp.maximum(self.batches, 1))

    def pooled(self, pool: Any) -> "CountedStats":
        """Returns the state of replicas pooled into one; `pool` pools moments."""
        batches, _ = pool(self.batches, jnp.zeros_like(self.batches))
        mean, var = pool(self.mean, self.var)
        return CountedStats(mean, var, batches)

    def hidden(self, momentum: float | Array) -> Pair:
        """Returns the averages before they are debiased."""
        share = _share(momentum, self.batches)
        return self.mean * share.astype(self.mean.dtype), self.var * share


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class CountedBatchNorm(Wrapper[BatchNormParams, CountedStats]):
    r"""Batch normalization with `debias`, whose state counts batches.

    .. math::
        s' = s + \frac{1 - m}{1 - m^{t + 1}} (b - s)

    after t batches. `BatchNorm(debias=True)` keeps 1 - m^t instead, which may then differ
    from step to step in m; here m is one number in all steps, or tells of all steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn._layers.counted_batch_norm import CountedBatchNorm
        >>> bn = CountedBatchNorm()
        >>> params, state = bn.init(1)
        >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[3.0], [5.0]])):
        ...     y, state = bn.apply(params, state, x, training=True, momentum=0.5)
        ...
        >>> print(state.mean.round(1), state.batches)
        [3.3] [2.]

    Attributes:
        bn: The settings of the layer.
    """

    bn: BatchNorm = _DEFAULT

    def init(
        self, num_features: int | tuple[int, ...], **options: Any
    ) -> tuple[BatchNormParams, CountedStats]:
        """Returns the params and the state; takes the keywords of `BatchNorm.init`."""
        params, state = self.bn.init(num_features, **options)
        return params, CountedStats(state.mean, state.var, jnp.zeros_like(state.var))

    @property
    def wrapped(self) -> BatchNorm:
        """The settings of the layer."""
        return self.bn

    def track(
        self, state: CountedStats, batch: Moments, *, momentum: float | Array | None = None
    ) -> CountedStats:
        """Returns the state after one update."""
        momentum = self.bn.momentum if momentum is None else momentum
        assert momentum is not None
        state, batch = lax.stop_gradient((state, batch))
        batch = like_state(batch, state.mean)
        batches = state.batches + 1
        # The first batch replaces the start to the last digit.
        rate = jnp.where(batches > 1, (1 - momentum) / _share(momentum, batches), 1)
        mean, var = (
            moved(state.mean, batch.mean, rate),
            moved(state.var, batch.var, rate),
        )
        return stored(state, CountedStats(mean, var, batches), batch.count)


def _share(momentum: float | Array, batches: Array) -> Array:
    """Returns 1 - m^t, with the digits that the difference of rounded numbers loses."""
    if isinstance(momentum, (int, float)):
        log = math.log(momentum) if momentum > 0 else -math.inf
    else:
        log = jnp.log(jnp.asarray(momentum).astype(batches.dtype))
    return jnp.where(batches > 0, -jnp.expm1(batches * log), 0)
