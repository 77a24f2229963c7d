"""Batch normalization for Flax linen: change the import, keep everything else."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import ArrayLike

from jaxbn._flax.core_call import call_batch_norm, check_settings, stats_dtype, zero_stats
from jaxbn._flax.gathered_leaves import gathered_like
from jaxbn._layers.checks import in_our_words
from jaxbn._modules.inputs import as_inexact, variable_shape
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._typing import Array, Axes, DTypeLike, Initializer, Shape
from jaxbn.linen._variables import FeaturesError, gathering, statistic, tracks, training_of


@in_our_words
class BatchNorm(nn.Module):
    """Batch normalization with the fields, variables and behaviour of Flax's linen layer.

    Checkpoints of `flax.linen.BatchNorm` load into this layer, and the other way round.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn.linen
        >>> layer = jaxbn.linen.BatchNorm(momentum=0.9)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> y, updates = layer.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"]
        ... )
        >>> print(y.round(3).ravel(), updates["batch_stats"]["mean"].round(3))
        [-1.  1.] [0.2]

    Attributes:
        use_running_average: Whether x is normalized with the running statistics instead
            of those of the batch. Given here or in the call, exactly once; in the call,
            it may be traced.
        axis: The feature axis or axes of x.
        momentum: The decay of the running statistics.
        epsilon: Added to the variance inside the square root.
        dtype: The dtype of the result; None for that of x and the params together, so
            float32 for a bfloat16 x and float32 params.
        param_dtype: The dtype of scale and bias.
        use_bias: Whether a trained bias is added.
        use_scale: Whether the result is multiplied by a trained scale.
        bias_init: The initializer of the bias.
        scale_init: The initializer of the scale.
        axis_name: The name of the axis, or the names of the axes, over whose devices the
            batch is spread, under `jax.pmap`, `jax.shard_map` or `jax.vmap`.
        axis_index_groups: Groups of devices that share statistics.
        use_fast_variance: Accepted and without effect: the variance is always stable.
        force_float32_reductions: Sums are float32 or wider in any case. False stores the
            running statistics in `param_dtype`, as Flax does.

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", 2015.

    Differs from Flax on purpose in this: the variance keeps its digits when the mean is
    large; a batch that is not finite, empty or fully masked leaves the running
    statistics as they were; no gradient flows into them; a mask over several devices
    counts what it selects on all of them, instead of averaging averages; the running
    statistics of float64 and complex inputs have from the start the dtype that Flax's
    get with the first update. Where nothing is selected, a feature is normalized with
    its running statistics.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    def __post_init__(self):
        check_settings(self.use_running_average, self.dtype, self.param_dtype)
        super().__post_init__()

    @nn.compact
    @in_our_words
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        update_stats: bool = True,
    ) -> Array:
        """Returns the normalized `x`, and updates the running statistics in training.

        While the variables are made, nothing is tracked and no collective runs.

        Args:
            x: Of any rank; integers are read as float32.
            use_running_average: As the field of that name.
            mask: Boolean, broadcastable to x: what the batch statistics are taken over.
            weights: Non-negative weights instead of a mask, as `jaxbn.BatchNorm.apply`
                takes them: of x's rank, or (N,) for rows, or (N, H, W) for positions.
            update_stats: False to leave the running statistics alone, as for the second
                pass of SAM, one of the branches of a siamese network, or a
                discriminator that looks at generated images.

        Returns:
            An array of the shape of x.

        Raises:
            ValueError: use_running_average is given nowhere or twice; batch_stats are
                missing, or not mutable in training; mask or weights do not fit x.
        """
        return call_in_linen(
            self,
            self,
            x,
            use_running_average,
            mask=mask,
            weights=weights,
            update_stats=update_stats,
        )


def call_in_linen(
    module: nn.Module,
    settings: BatchNorm,
    x: ArrayLike,
    use_running_average: bool | Array | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
) -> Array:
    """Returns what `settings` makes of `x` with the variables of `module`."""
    training = training_of(module, settings.use_running_average, use_running_average)
    x = as_inexact(x, settings.dtype)
    features = variable_shape(settings.axis, x.shape)
    mean, var = _stats(module, settings, features, x.dtype)
    if mean.value.shape != features:
        raise FeaturesError("/".join(module.path), mean.value.shape, features, x.shape)
    scale = bias = None
    if settings.use_scale:
        scale = module.param("scale", settings.scale_init, features, settings.param_dtype)
    if settings.use_bias:
        bias = module.param("bias", settings.bias_init, features, settings.param_dtype)
    tracking = tracks(module, training, update_stats)
    more = gathering(module, ("mean", "var"), update_stats)
    stats = BatchStats(mean.value, var.value)
    y, state = call_batch_norm(
        settings,
        BatchNormParams(scale, bias),
        gathered_like(stats, [variable.value for variable in more]),
        x,
        training,
        mask=mask,
        weights=weights,
        synchronize=not module.is_initializing(),
    )
    if tracking or more:
        for variable, leaf in zip((mean, var, *more), jax.tree.leaves(state), strict=True):
            # Flax keeps the statistics in half precision where this field asks for it.
            half = not settings.force_float32_reductions
            variable.value = leaf.astype(variable.value.dtype) if half else leaf
    return y


def _stats(
    module: nn.Module, settings: BatchNorm, features: Shape, dtype: DTypeLike
) -> tuple[nn.Variable, nn.Variable]:
    """Returns the running mean and variance for inputs of `dtype`."""
    if settings.force_float32_reductions:
        dtype = stats_dtype(dtype if settings.dtype is None else settings.dtype)
    else:
        dtype = jnp.dtype(settings.param_dtype)
    mean = statistic(module, "mean", lambda: zero_stats(features, dtype).mean)
    return mean, statistic(module, "var", lambda: zero_stats(features, dtype).var)
