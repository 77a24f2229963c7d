"""Batch normalization for Flax NNX: change the import, keep everything else."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jax.typing import ArrayLike

from jaxbn._flax.core_call import (
    axis_remedy,
    call_batch_norm,
    check_settings,
    stats_dtype,
    zero_stats,
)
from jaxbn._flax.gathered_leaves import gathered_like
from jaxbn._layers.checks import in_our_words
from jaxbn._modules.inputs import as_inexact, variable_shape
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._typing import Array, Axes, DTypeLike, Initializer, Shape
from jaxbn.nnx._norm import Switchable, assign, gathering, training_of

_STATS = ("mean", "var")


@in_our_words
class BatchNorm(Switchable):
    """Batch normalization with the arguments, variables and behaviour of Flax's NNX layer.

    States of `flax.nnx.BatchNorm` load into this layer, and the other way round.

    Example:
        >>> import jax.numpy as jnp, jaxbn.nnx
        >>> from flax import nnx
        >>> layer = jaxbn.nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0], [3.0]]))
        >>> print(y.round(3).ravel(), layer.mean[...].round(3))
        [-1.  1.] [0.2]
        >>> layer.eval()
        >>> print(layer(jnp.array([[1.2]])).round(3))
        [[1.]]

    Args:
        num_features: The size of the feature axis of x; with several, a tuple of their
            sizes in ascending order of axis.
        use_running_average: Whether x is normalized with the running statistics instead
            of those of the batch; `train()`, `eval()` and `nnx.view` change it. The call
            may override it, also by a traced boolean.
        axis: The feature axis or axes of x.
        momentum: The decay of the running statistics.
        epsilon: Added to the variance inside the square root.
        dtype: The dtype of the result; None for that of x, the params and the running
            statistics together, so float32 for a bfloat16 x.
        param_dtype: The dtype of scale and bias.
        use_bias: Whether a trained bias is added.
        use_scale: Whether the result is multiplied by a trained scale.
        bias_init: The initializer of the bias.
        scale_init: The initializer of the scale.
        axis_name: The name of the axis, or the names of the axes, over whose devices the
            batch is spread, under `jax.pmap`, `jax.shard_map` or `jax.vmap`.
        axis_index_groups: Groups of devices that share statistics.
        use_fast_variance: Accepted and without effect: the variance is always stable.
        promote_dtype: Flax's own, the default, is not called: sums are float32 or wider,
            and the result is rounded once. Another one is called as Flax does, with
            `(x, mean, var, scale, bias)`, and decides about x, scale and bias.
        rngs: For the initializers.
        bias_metadata: Metadata of the variable of the bias.
        scale_metadata: Metadata of the variable of the scale.

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", 2015.

    Differs from Flax on purpose in this: the running statistics are never cast to
    `dtype`, so a bfloat16 layer keeps them in float32 and reads them so; the variance
    keeps its digits when the mean is large; a batch that is not finite, empty or fully
    masked leaves the running statistics as they were; no gradient flows into them; a
    mask over several devices counts what it selects on all of them, instead of averaging
    averages; several feature axes work; the running statistics hold float64 and complex
    numbers where dtype or param_dtype does.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: str | tuple[str, ...] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        check_settings(use_running_average, dtype, param_dtype)
        shape = _as_shape(num_features)
        stats = zero_stats(shape, stats_dtype(dtype, param_dtype))
        self.mean: nnx.BatchStat[Array] = nnx.BatchStat(stats.mean)
        self.var: nnx.BatchStat[Array] = nnx.BatchStat(stats.var)
        # The scale comes before the bias, so that equal keys give the same layer as Flax's.
        self.scale: nnx.Param[Array] | None = nnx.data(None)
        if use_scale:
            scale = scale_init(rngs.params(), shape, param_dtype)
            self.scale = nnx.Param(scale, **scale_metadata)
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), shape, param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)

        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

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

        Args:
            x: Of any rank; integers are read as float32.
            use_running_average: Overrides the attribute of that name; may be traced.
            mask: Boolean, broadcastable to x: what the batch statistics are taken over.
            weights: Non-negative weights instead of a mask, as `jaxbn.BatchNorm.apply`
                takes them: of x's rank, or (N,) for rows, or (N, H, W) for positions.
            update_stats: False to leave the running statistics alone, as for the second
                pass of SAM, one of the branches of a siamese network, or a
                discriminator that looks at generated images.

        Returns:
            An array of the shape of x.

        Raises:
            ValueError: use_running_average is given nowhere; the features of x are not
                those of the layer; mask or weights do not fit x.
        """
        training = training_of(self, use_running_average)
        x = as_inexact(x, self.dtype)
        features = variable_shape(self.axis, x.shape)
        if features != _as_shape(self.num_features):
            raise ValueError(
                f"x of shape {x.shape} has {_as_number(features)} features on "
                f"axis={self.axis}, but the layer was made for {self.num_features}. Write "
                f"BatchNorm({_as_number(features)}, ...), or "
                f"{axis_remedy(_as_shape(self.num_features), features, x.shape)}."
            )
        mean, var = self.mean[...], self.var[...]
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        together = (mean,)
        if self.promote_dtype is not dtypes.promote_dtype:
            together = ()
            everything = x, mean, var, scale, bias
            promoted = self.promote_dtype(everything, dtype=self.dtype)
            x, scale, bias = jnp.asarray(promoted[0]), *promoted[3:]
        more = gathering(self, _STATS, update_stats)
        gathered = [getattr(self, name)[...] for name in more]
        y, state = call_batch_norm(
            self,
            BatchNormParams(scale, bias),
            gathered_like(BatchStats(mean, var), gathered),
            x,
            training,
            mask=mask,
            weights=weights,
            together=together,
        )
        if more or (training is not False and update_stats):
            for name, leaf in zip((*_STATS, *more), jax.tree.leaves(state), strict=True):
                assign(getattr(self, name), leaf)
        return y


def _as_shape(num_features: int | Shape) -> Shape:
    return num_features if isinstance(num_features, tuple) else (num_features,)


def _as_number(features: Shape) -> int | Shape:
    return features[0] if len(features) == 1 else features
