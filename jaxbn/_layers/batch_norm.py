"""The layer: a value of hyperparameters with two pure functions, `init` and `apply`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbn._axes import as_axes, feature_sizes
from jaxbn._dtypes import as_dtype, at_least_float32, real_part
from jaxbn._kernels.affine_map import inverse_deviation
from jaxbn._kernels.normalize import check_epsilon
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.normalizer import Normalizer, apply_normalizer
from jaxbn._state import BatchNormParams, BatchStats, draw
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.named_axes import as_groups
from jaxbn._statistics.running import check_ddof, check_momentum, check_real, updated_stats
from jaxbn._typing import (
    Array,
    ArrayLike,
    Axes,
    AxisGroups,
    AxisName,
    DTypeLike,
    Initializer,
    Key,
    PairLike,
)
from jaxbn._values.canonical import as_flag, as_number
from jaxbn._values.journeys import Value, as_function


@jax.tree_util.register_static
@in_our_words
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class BatchNorm(Value, Normalizer[BatchNormParams, BatchStats]):
    r"""Batch normalization.

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    with the mean and the biased variance of the batch in training, and the running ones
    otherwise. A frozen value: it prints, compares, hashes, pickles and does not retrace.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> bn = jaxbn.BatchNorm(momentum=0.5)
        >>> params, state = bn.init(1)
        >>> y, state = bn.apply(params, state, jnp.array([[1.0], [3.0]]), training=True)
        >>> print(y.round(3).ravel(), state.mean, state.var)
        [-1.  1.] [1.] [1.]

    Attributes:
        feature_axes: The axis or axes that keep statistics of their own: -1 for channels
            last, 1 for channels first.
        momentum: The decay m of the running statistics, new = m old + (1 - m) batch; None
            for the mean of all batches so far. They need some 3 / (1 - m) steps to forget
            their initial values: in short trainings use 0.9, or `debias`.
        epsilon: Added to the variance inside the square root.
        use_scale: Whether the result is multiplied by a trained scale.
        use_bias: Whether a trained bias is added.
        ddof: 0 to track the biased variance, 1 for the unbiased one.
        debias: Whether the running statistics forget their initial value from the first
            batch on, instead of at the rate of the momentum.
        activation: Applied last, such as `jax.nn.relu`; None for none.
        axis_name: A mapped axis of `pmap`, `shard_map` or `vmap`, or a tuple of them, over
            which a batch is spread: its statistics are then those of all devices. Not
            wanted under plain `jit`, where they are in any case.
        axis_index_groups: Groups of device indices that share statistics, see
            `axis_groups`; None for one group of all.
        dtype: The dtype of the result; None for that of x.
        param_dtype: The dtype of scale and bias. The running statistics have it too, but
            at least float32.

    Raises:
        TypeError: A hyperparameter is of the wrong type.
        ValueError: A hyperparameter is out of its range.

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", 2015.

    Differs from Flax in the dtype of the result, x's unless asked otherwise. Differs from
    PyTorch in `momentum`, which is one minus PyTorch's, and `ddof`, which is 1 there.
    """

    feature_axes: Axes = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    ddof: int = 0
    debias: bool = False
    activation: Callable[[Array], Array] | None = None
    axis_name: AxisName | None = None
    axis_index_groups: AxisGroups | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        # Canonical, so that equal settings compare and hash as equal.
        if self.momentum is not None:
            remedy = "Write 0.99 or the like; a schedule goes to apply(..., momentum=...)."
            momentum = as_number("BatchNorm.momentum", self.momentum, remedy)
            object.__setattr__(self, "momentum", momentum)
        check_momentum(self.momentum)
        settled = {
            "feature_axes": as_axes(self.feature_axes),
            "epsilon": check_epsilon(self.epsilon),
            "ddof": check_ddof(self.ddof),
            "axis_index_groups": as_groups(self.axis_name, self.axis_index_groups),
            "activation": as_function("activation", self.activation),
            "dtype": as_dtype(self.dtype),
            "param_dtype": as_dtype(self.param_dtype),
        }
        flags = "use_scale", "use_bias", "debias"
        settled |= {n: as_flag(f"BatchNorm.{n}", getattr(self, n)) for n in flags}
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        if self.debias and self.momentum is None:
            raise ValueError(
                "debias=True needs a momentum, got momentum=None, whose cumulative mean "
                "forgets its initial value anyway. Drop one of the two."
            )

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
    ) -> tuple[BatchNormParams, BatchStats]:
        """Returns the params and the state before training.

        Args:
            num_features: The size of the feature axis; with several, a tuple of their
                sizes in ascending order of axis.
            scale_init: An initializer `(key, shape, dtype) -> array`, as `jax.nn` has
                them; likewise the three others.
            bias_init: The initializer of the bias.
            mean_init: The initializer of the running mean.
            var_init: The initializer of the running variance.
            key: A key for initializers that draw random numbers.

        Returns:
            `(BatchNormParams, BatchStats)`.

        Raises:
            TypeError: num_features is not made of ints; an initializer needs a key.
            ValueError: num_features is negative or fits no input with these feature_axes.
        """
        features = feature_sizes(num_features, self.feature_axes)
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        stats_dtype = at_least_float32(self.param_dtype)
        var_dtype = real_part(stats_dtype)
        scale = draw(scale_init, keys[0], features, self.param_dtype)
        bias = draw(bias_init, keys[1], features, self.param_dtype)
        mean = draw(mean_init, keys[2], features, stats_dtype)
        var = draw(var_init, keys[3], features, var_dtype)
        has_weight = self.debias or self.momentum is None
        weight = jnp.zeros_like(var) if has_weight else None
        params = BatchNormParams(
            scale if self.use_scale else None, bias if self.use_bias else None
        )
        return params, BatchStats(mean, var, weight)

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
        adjustment: PairLike | None = None,
        momentum: float | Array | None = None,
    ) -> tuple[Array, BatchStats]:
        """Returns the normalized `x` and the state after it.

        Inference returns the state unchanged: a frozen layer is `training=False`. To
        normalize with batch statistics without tracking, drop the returned state.

        A feature of which the batch holds nothing (an empty batch, or weights that are
        all 0) is normalized with its running statistics. A feature that holds a single
        value, or is constant, comes out as exactly the bias. A feature whose batch
        statistics are not finite comes out so, and keeps its state.

        Args:
            params: As `init` returned them, or trained since; conditional ones are of x's
                rank and broadcast to x.
            state: As `init` or the last call returned it.
            x: Floating or complex, of rank 2 or more. Of the features' rank alone, it is
                one example: for inference, or of a batch along the axis `axis_name`.
            training: A bool, or a boolean scalar: one program for both modes if traced.
            weights: None, or a boolean mask or non-negative sample weights: of x's rank
                and broadcastable to x, or of lower rank and aligned from the left with
                the axes that are averaged over: (N,) weighs rows, (N, T) or (N, H, W)
                positions. They act on the statistics; all of x is normalized. What has
                weight 0 may hold NaN or infinity, and is read as 0 there.
            residual: Added to the result before the activation; of the shape of x.
            adjustment: A pair (s, o) of arrays, each of the shape of the features or of
                x's rank and broadcastable to x, for noise that the caller draws: in
                training, the normalized x becomes s x + o before scale and bias.
            momentum: Overrides the momentum of the layer, for schedules; may be traced.

        Returns:
            `(y, state)`: an array of the shape of x, in `dtype` or x's dtype, and a state
            of the structure, shapes and dtypes of the one passed in.

        Raises:
            TypeError: x is not floating or complex; training is not a boolean; params or
                state are not of the types that `init` returns; x is complex and the state
                real.
            ValueError: The features of x, params and state differ, or x has no axis to
                average over; weights do not fit x; momentum lies outside [0, 1].
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
        )

    def standardize(self, mean: Array, var: Array) -> tuple[Array, Array | None]:
        """Returns one over the standard deviation, and no offset."""
        return inverse_deviation(var, jnp.asarray(self.epsilon, var.dtype)), None

    def track(
        self, state: BatchStats, batch: Moments, *, momentum: float | Array | None = None
    ) -> BatchStats:
        """Returns the state after one update, as `update_running` tells."""
        momentum = self.momentum if momentum is None else momentum
        return updated_stats(state, batch, momentum, self.ddof)

    def check(
        self, state: BatchStats, x: Array, tracks: bool, *, momentum: Any = None
    ) -> None:
        """Raises if x is complex and the state real, or for a momentum out of range."""
        if tracks and jnp.iscomplexobj(x):
            check_real(state, x.dtype)
        if momentum is not None:
            check_momentum(momentum)
