"""Batch renormalization: training with what inference will see, up to limits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.normalizer import apply_normalizer
from jaxbn._layers.renorm_limits import RenormLimits, check_limits
from jaxbn._layers.wrapper import Wrapper
from jaxbn._sharding import reshard_like
from jaxbn._state import BatchNormParams, RenormStats
from jaxbn._statistics.moments import Moments, as_exact
from jaxbn._statistics.running import check_momentum, like_state, moved, stored
from jaxbn._typing import Array, ArrayLike, Initializer, Key, Pair, PairLike
from jaxbn._values.canonical import as_number

_DEFAULT, _LIMITS = BatchNorm(), RenormLimits()


@jax.tree_util.register_static
@in_our_words
@dataclasses.dataclass(frozen=True, repr=False)
class BatchRenorm(Wrapper[BatchNormParams, RenormStats]):
    r"""Batch renormalization.

    .. math::
        y = \left(\frac{x - \mu_B}{\sigma_B} r + d\right) \gamma + \beta, \quad
        r = \mathrm{clip}\!\left(\frac{\sigma_B}{\sigma}\right), \quad
        d = \mathrm{clip}\!\left(\frac{\mu_B - \mu}{\sigma}\right)

    with the running mean and standard deviation of the correction as they were before the
    batch, and no gradient through r and d. Where neither is clipped, training computes
    what inference will. Inference is that of `bn`.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> layer = jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.9), momentum=0.9)
        >>> params, state = layer.init(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = layer.apply(params, state, x, training=True)
        >>> print(y.ravel())
        [1. 3.]

    Attributes:
        bn: The normalization that is corrected. Its momentum is that of the statistics
            for inference.
        momentum: The decay of the statistics that the correction is taken from.
        limits: The limits of r and d. The paper recommends a schedule, see
            `renorm_limits`, which is passed to `apply`.

    Raises:
        TypeError: bn is not a `BatchNorm`; momentum or a limit is not a known number.
        ValueError: A hyperparameter is out of its range; bn debiases, is cumulative or has
            a ddof.

    References:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
        Batch-Normalized Models", 2017.

    Differs from Keras and TensorFlow in the limits, which are the paper's final ones
    unless given, and in `momentum`, called renorm_momentum there.
    """

    bn: BatchNorm = _DEFAULT
    _: dataclasses.KW_ONLY
    momentum: float = 0.99
    limits: RenormLimits = _LIMITS

    def __post_init__(self) -> None:
        if not all(hasattr(self.bn, field) for field in ("epsilon", "momentum", "debias")):
            raise TypeError(
                f"BatchRenorm.bn must be a BatchNorm, got {type(self.bn).__name__}. Ghost "
                "batches go around it: GhostBatchNorm(BatchRenorm(bn), ...)."
            )
        if self.bn.debias or self.bn.momentum is None or self.bn.ddof:
            raise ValueError(
                f"BatchRenorm tracks the standard deviation that it normalizes with, got "
                f"{self.bn}. Leave out debias, momentum=None and ddof."
            )
        remedy = "Use 0.99 or the like."
        momentum = as_number("BatchRenorm.momentum", self.momentum, remedy)
        check_momentum(momentum)
        check_limits(self.limits)
        remedy = "Pass limits that change from step to step to apply(..., limits=...)."
        limits = RenormLimits(
            *(
                as_number(f"BatchRenorm.limits.{name}", limit, remedy)
                for name, limit in self.limits._asdict().items()
            )
        )
        object.__setattr__(self, "momentum", momentum)
        object.__setattr__(self, "limits", limits)

    @in_our_words
    def init(
        self,
        num_features: int | tuple[int, ...],
        *,
        scale_init: Initializer = initializers.ones,
        bias_init: Initializer = initializers.zeros,
        mean_init: Initializer = initializers.zeros,
        var_init: Initializer = initializers.ones,
        key: Key | None = None,
    ) -> tuple[BatchNormParams, RenormStats]:
        """Returns the params and the state before training, as `BatchNorm.init` does.

        The standard deviations start at the square root of the initial variance.
        """
        params, stats = self.bn.init(
            num_features,
            scale_init=scale_init,
            bias_init=bias_init,
            mean_init=mean_init,
            var_init=var_init,
            key=key,
        )
        # Copies, since a donated state must not hold one buffer twice.
        std, renorm_std = jnp.sqrt(stats.var), jnp.sqrt(stats.var)
        return params, RenormStats(stats.mean, stats.var, std, stats.mean + 0, renorm_std)

    @in_our_words
    def apply(
        self,
        params: BatchNormParams,
        state: RenormStats,
        x: ArrayLike,
        training: bool | Array,
        *,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        adjustment: PairLike | None = None,
        momentum: float | Array | None = None,
        limits: RenormLimits | None = None,
    ) -> tuple[Array, RenormStats]:
        """Returns the normalized `x` and the state after it, as `BatchNorm.apply` does.

        Args:
            params: As `init` returned them, or trained since.
            state: As `init` or the last call returned it.
            x: As for `BatchNorm.apply`, and real.
            training: A bool, or a boolean scalar array, which may be traced.
            weights: As for `BatchNorm.apply`.
            residual: As for `BatchNorm.apply`.
            adjustment: As for `BatchNorm.apply`; it follows the correction.
            momentum: Overrides the momentum of `bn`; may be traced.
            limits: Overrides the limits of the layer; each may be traced.

        Returns:
            `(y, state)`.

        Raises:
            TypeError: As `BatchNorm.apply` does.
            ValueError: As `BatchNorm.apply` does; a limit is out of its range.
        """
        return apply_normalizer(
            self,
            params,
            state,
            x,
            training,
            weights=weights,
            residual=residual,
            adjustment=adjustment,
            momentum=momentum,
            limits=limits,
        )

    @property
    def wrapped(self) -> BatchNorm:
        """The normalization that is corrected."""
        return self.bn

    def check(
        self,
        state: RenormStats,
        x: Array,
        tracks: bool,
        *,
        momentum: Any = None,
        limits: Any = None,
    ) -> None:
        """Raises for a complex x, or a momentum or limits out of range."""
        if tracks and jnp.iscomplexobj(x):
            raise TypeError(
                f"BatchRenorm clips its correction and needs a real x, got {x.dtype}. Use "
                "BatchNorm, or normalize the real and the imaginary part as two features."
            )
        check_momentum(momentum)
        if limits is not None:
            check_limits(limits)

    def track(
        self,
        state: RenormStats,
        batch: Moments,
        *,
        momentum: float | Array | None = None,
        limits: RenormLimits | None = None,
    ) -> RenormStats:
        """Returns the state after one update; the limits play no part in it."""
        state, batch = lax.stop_gradient((state, batch))
        batch = like_state(batch, state.mean)
        epsilon = self.bn.epsilon
        std = jnp.sqrt(batch.var + epsilon)
        momentum = self.bn.momentum if momentum is None else momentum
        assert momentum is not None
        rate = 1 - momentum
        slow = 1 - self.momentum
        running_std = moved(state.std, std, rate)
        after = RenormStats(
            mean=moved(state.mean, batch.mean, rate),
            var=jnp.maximum(jnp.square(running_std) - epsilon, 0),
            std=running_std,
            renorm_mean=moved(state.renorm_mean, batch.mean, slow),
            renorm_std=moved(state.renorm_std, std, slow),
        )
        return stored(state, after, batch.count)

    def correction(
        self,
        state: RenormStats,
        batch: Moments,
        *,
        momentum: float | Array | None = None,
        limits: RenormLimits | None = None,
    ) -> Pair:
        """Returns r and d, or 1 and 0 for a feature of which the batch holds nothing."""
        state, batch = lax.stop_gradient((state, batch))
        mean, var, count, rest = as_exact(batch)
        std = jnp.sqrt(var + self.bn.epsilon)
        r_min, r_max, d_max = (
            jnp.asarray(limit).astype(std.dtype)
            for limit in (self.limits if limits is None else limits)
        )
        start, scale = (
            reshard_like(a.astype(std.dtype), std)
            for a in (state.renorm_mean, state.renorm_std)
        )
        # The floor is what the standard deviation of a constant feature would be.
        scale = jnp.maximum(scale, jnp.sqrt(self.bn.epsilon))
        r = jnp.clip(std / scale, r_min, r_max)
        d = jnp.clip(((mean - start) + rest) / scale, -d_max, d_max)
        return jnp.where(count > 0, r, 1), jnp.where(count > 0, d, 0)
