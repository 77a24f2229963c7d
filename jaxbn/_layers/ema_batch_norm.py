"""A batch norm that trains on its running statistics, as Equinox's older mode does."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.normalizer import apply_normalizer
from jaxbn._layers.wrapper import Wrapper
from jaxbn._sharding import reshard_like
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._statistics.moments import Moments, as_exact
from jaxbn._statistics.running import updated_stats
from jaxbn._typing import Array, ArrayLike, Pair

_DEFAULT = BatchNorm()


@jax.tree_util.register_static
@in_our_words
@dataclasses.dataclass(frozen=True, repr=False)
class EmaBatchNorm(Wrapper[BatchNormParams, BatchStats]):
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

    def __post_init__(self) -> None:
        if not all(hasattr(self.bn, field) for field in ("epsilon", "momentum", "debias")):
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

    @in_our_words
    def apply(
        self,
        params: BatchNormParams,
        state: BatchStats,
        x: ArrayLike,
        training: bool | Array,
        *,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
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
        return apply_normalizer(
            self,
            params,
            state,
            x,
            training,
            weights=weights,
            residual=residual,
            momentum=momentum,
        )

    @property
    def wrapped(self) -> BatchNorm:
        """The settings of the layer."""
        return self.bn

    def track(
        self, state: BatchStats, batch: Moments, *, momentum: float | Array | None = None
    ) -> BatchStats:
        """Returns the state after one update, which the first batch starts."""
        kept = self._kept(state, momentum)
        after = updated_stats(state, batch, kept, self.bn.ddof)
        assert after.weight is not None
        return after._replace(weight=jnp.sign(after.weight))

    def _kept(self, state: BatchStats, momentum: float | Array | None) -> Array:
        """Returns the share of the state that is kept: none before a first batch."""
        momentum = self.bn.momentum if momentum is None else momentum
        assert momentum is not None
        assert state.weight is not None
        return jnp.where(state.weight > 0, momentum, 0)

    def correction(
        self, state: BatchStats, batch: Moments, *, momentum: float | Array | None = None
    ) -> Pair:
        """Returns what makes of the standardized batch one by the running statistics."""
        after = lax.stop_gradient(self.track(state, batch, momentum=momentum))
        own_mean, own_var, count, rest = as_exact(batch)
        rate = (1 - self._kept(state, momentum)).astype(own_var.dtype)
        # The returned state carries no gradient, but the mean and the variance that x is
        # normalized with do: the batch has the share `rate` in them.
        mean, var = (
            reshard_like(used, new).astype(new.dtype)
            + rate * (new - lax.stop_gradient(new))
            for used, new in ((after.mean, own_mean), (after.var, own_var))
        )
        scale = jnp.sqrt(var + self.bn.epsilon)
        factor = jnp.sqrt(own_var + self.bn.epsilon) / scale
        offset = ((own_mean - mean) + rest) / scale
        return jnp.where(count > 0, factor, 1), jnp.where(count > 0, offset, 0)
