"""A batch norm that trains on its running statistics, as Equinox's older mode does."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._layers.apply import apply_layer
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._sharding import reshard_like
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.running import check_momentum, check_real, tracked
from jaxbn._typing import Array, Pair

_DEFAULT = BatchNorm()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EmaBatchNorm:
    r"""Batch normalization with the running statistics, in training too.

    .. math::
        y = \frac{x - M}{\sqrt{V + \epsilon}} \gamma + \beta, \qquad
        M = m M_{old} + (1 - m) \mu_B, \quad V = m V_{old} + (1 - m) \sigma_B^2

    and M = \mu_B, V = \sigma_B^2 on the first batch. The gradient flows through the share
    1 - m that the batch has in M and V. It is here so that layers of Equinox's
    `mode="ema"` train on as they did; new models train better with `BatchNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import BatchNorm, convert
        >>> layer = convert.EmaBatchNorm(BatchNorm(momentum=0.5))
        >>> params, state = layer.init(1)
        >>> y, state = layer.apply(params, state, jnp.array([[1.0], [3.0]]), True)
        >>> y, state = layer.apply(params, state, jnp.array([[3.0], [5.0]]), True)
        >>> print(y.ravel().round(2), state.mean)
        [0. 2.] [3.]

    Attributes:
        bn: The settings of the layer.

    Raises:
        TypeError: bn is not a `BatchNorm`.
        ValueError: bn debiases, or is cumulative.

    Differs from `BatchNorm` in what training normalizes with; inference is the same.
    """

    bn: BatchNorm = _DEFAULT

    def __post_init__(self):
        if not isinstance(self.bn, BatchNorm):
            raise TypeError(
                f"EmaBatchNorm.bn must be a BatchNorm, got {type(self.bn).__name__}. "
                "Pass one with the settings of the layer."
            )
        if self.bn.debias or self.bn.momentum is None:
            raise ValueError(
                f"EmaBatchNorm tracks a plain average that the first batch starts, got "
                f"{self.bn}. Leave out debias and momentum=None."
            )

    def init(
        self, num_features: int | tuple[int, ...], **options: Any
    ) -> tuple[BatchNormParams, BatchStats]:
        """Returns the params and the state; takes the keywords of `BatchNorm.init`.

        The weight of the state is 0 before the first batch, and 1 after it.
        """
        params, state = self.bn.init(num_features, **options)
        return params, state._replace(weight=jnp.zeros_like(state.var))

    def apply(
        self,
        params: BatchNormParams,
        state: BatchStats,
        x: Array,
        training: bool | Array,
        *,
        weights: Array | None = None,
        residual: Array | None = None,
        momentum: float | Array | None = None,
    ) -> tuple[Array, BatchStats]:
        """Returns the normalized `x` and the state after it, as `BatchNorm.apply` does.

        Args:
            params: As `init` returned them, or trained since.
            state: As `init` or the last call returned it.
            x: Floating, of rank 2 or more.
            training: A bool, or a boolean scalar array, which may be traced.
            weights: As for `BatchNorm.apply`.
            residual: As for `BatchNorm.apply`.
            momentum: Overrides the momentum of `bn`; may be traced.

        Returns:
            `(y, state)`.

        Raises:
            TypeError: As `BatchNorm.apply` does.
            ValueError: As `BatchNorm.apply` does.
        """
        return apply_layer(
            self,
            params,
            state,
            x,
            training,
            weights=weights,
            residual=residual,
            momentum=momentum,
        )

    def _settings(self) -> BatchNorm:
        return self.bn

    def _stats_fields(self) -> tuple[type, set[str]]:
        return BatchStats, set()

    def _check(self, state: BatchStats, x: Array, tracks: bool, *, momentum: Any = None):
        if tracks:
            check_real(state, x.dtype)
        check_momentum(momentum)

    def _track(
        self, batch: Moments, state: BatchStats, *, momentum: Any = None
    ) -> tuple[Pair, BatchStats]:
        momentum = self.bn.momentum if momentum is None else momentum
        assert momentum is not None
        assert state.weight is not None
        batch = Moments(*(reshard_like(array, state.mean) for array in batch))
        after = tracked(state, batch, momentum, self.bn.ddof)
        assert after.weight is not None
        after = after._replace(weight=jnp.sign(after.weight))
        rate = jnp.where(state.weight > 0, 1 - momentum, 1).astype(batch.var.dtype)
        # The state carries no gradient; what is normalized with has its share of it.
        mean, var = (
            used.astype(new.dtype) + rate * (new - lax.stop_gradient(new))
            for used, new in ((after.mean, batch.mean), (after.var, batch.var))
        )
        scale = jnp.sqrt(var + self.bn.epsilon)
        factor = jnp.sqrt(batch.var + self.bn.epsilon) / scale
        offset = (batch.mean - mean) / scale
        seen = batch.count > 0
        return (jnp.where(seen, factor, 1), jnp.where(seen, offset, 0)), after
