"""Batch normalization for Haiku: change the import, keep everything else."""

from collections.abc import Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._dtypes import at_least_float32, real_part
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.counted_batch_norm import CountedBatchNorm, CountedStats
from jaxbn._modules.inputs import (
    as_inexact,
    batch_norm,
    dtype_of_all,
    feature_axes,
    positive,
    with_lone_axis,
)
from jaxbn._sharding import reshard_like
from jaxbn._state import BatchNormParams
from jaxbn._statistics.named_axes import as_groups
from jaxbn._typing import Array, Shape
from jaxbn.haiku._arguments import (
    check_decay,
    check_initializer,
    check_not_created,
    training_of,
)
from jaxbn.haiku._state import Average, check_stats, missing_stats

Initializer = hk.initializers.Initializer


@in_our_words
class BatchNorm(hk.Module):
    """Batch normalization with the arguments, the call and the trees of Haiku's layer.

    Params and states of `hk.BatchNorm` load into this layer, and the other way round.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jaxbn.haiku
        >>> @hk.transform_with_state
        ... def model(x, is_training):
        ...     return jaxbn.haiku.BatchNorm(True, True, 0.9)(x, is_training)
        ...
        >>> x = jnp.array([[1.0], [3.0]])
        >>> params, state = model.init(jax.random.key(0), x, True)
        >>> y, state = model.apply(params, state, None, x, True)
        >>> print(y.round(3).ravel(), state["batch_norm/~/mean_ema"]["average"])
        [-1.  1.] [[2.]]

    Args:
        create_scale: Whether there is a trained scale.
        create_offset: Whether there is a trained offset.
        decay_rate: The decay of the running statistics, which may be traced.
        eps: Added to the variance inside the square root.
        scale_init: The initializer of the scale, ones by default.
        offset_init: The initializer of the offset, zeros by default.
        axis: The axes that are averaged over; None for all but the channels.
        cross_replica_axis: The name of the axis, or the names of the axes, over whose
            devices the batch is spread, under `jax.pmap`, `jax.shard_map` or `jax.vmap`.
        cross_replica_axis_index_groups: Groups of devices that share statistics.
        data_format: `channels_last`, `channels_first`, `N...C`, `NC...` or the like.
        name: The name of the module.

    Raises:
        ValueError: An initializer is given for what is not created; groups are given
            without an axis; decay_rate lies outside [0, 1].

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", 2015. Haiku, `hk.BatchNorm`.

    Differs from Haiku on purpose in this: the variance keeps its digits when the mean is
    large and is never negative, where Haiku's channels become NaN; the averages are
    float32 or wider whatever x is; they start at mean 0 and variance 1, not at the
    statistics of the batch that `init` saw, and `init` runs with is_training=False too,
    and without the mapped axis; a batch that is not finite leaves them as they were, and
    no gradient flows into them; is_training may be traced. Haiku counts the updates of all
    features together: one that a batch left alone counts as if it had seen its average.
    """

    def __init__(
        self,
        create_scale: bool,
        create_offset: bool,
        decay_rate: float | Array,
        eps: float = 1e-5,
        scale_init: Initializer | None = None,
        offset_init: Initializer | None = None,
        axis: Sequence[int] | None = None,
        cross_replica_axis: str | Sequence[str] | None = None,
        cross_replica_axis_index_groups: Sequence[Sequence[int]] | None = None,
        data_format: str = "channels_last",
        name: str | None = None,
    ):
        super().__init__(name=name)
        check_initializer("scale", create_scale, scale_init)
        check_initializer("offset", create_offset, offset_init)
        if isinstance(cross_replica_axis, list):
            cross_replica_axis = tuple(cross_replica_axis)
        groups = as_groups(cross_replica_axis, cross_replica_axis_index_groups)
        check_decay(decay_rate)
        self.create_scale = create_scale
        self.create_offset = create_offset
        self.decay_rate = decay_rate
        self.eps = eps
        self.scale_init = scale_init or jnp.ones
        self.offset_init = offset_init or jnp.zeros
        self.axis = axis
        self.cross_replica_axis = cross_replica_axis
        self.cross_replica_axis_index_groups = groups
        self.channel_index = hk.get_channel_index(data_format)
        self.mean_ema = Average(decay_rate, name="mean_ema")
        self.var_ema = Average(decay_rate, name="var_ema")

    @in_our_words
    def __call__(
        self,
        inputs: ArrayLike,
        is_training: bool | Array,
        test_local_stats: bool = False,
        scale: ArrayLike | None = None,
        offset: ArrayLike | None = None,
        *,
        weights: ArrayLike | None = None,
        update_stats: bool = True,
    ) -> Array:
        """Returns the normalized `inputs`, and updates the running statistics in training.

        Args:
            inputs: Of any rank; integers are read as float32.
            is_training: Whether to normalize with the statistics of the batch and track
                them; may be traced.
            test_local_stats: Whether to normalize with those of the batch in any case.
            scale: What the normalized inputs are multiplied by, of any shape that
                broadcasts to them; without create_scale only.
            offset: What is added last, likewise.
            weights: A boolean mask or non-negative weights, as `jaxbn.BatchNorm.apply`
                takes them.
            update_stats: False to leave the running statistics alone, as for the second
                pass of SAM, or a discriminator that looks at generated images.

        Returns:
            An array of the shape of inputs, in the dtype of inputs, scale and offset.

        Raises:
            TypeError: is_training is no boolean.
            ValueError: There are no statistics in the state, or those of another layer;
                scale or offset is given besides a created one.
        """
        check_not_created("scale", self.create_scale, scale)
        check_not_created("offset", self.create_offset, offset)
        training = training_of(is_training)
        x = as_inexact(inputs)
        axes = self._feature_axes(x.ndim)
        shape = tuple(n if i in axes else 1 for i, n in enumerate(x.shape))
        # Haiku's params keep the sizes of axes that `axis` counts from the end.
        whole = shape if self.axis is None else x.shape
        sizes = [1 if i in (self.axis or ()) else n for i, n in enumerate(whole)]
        if self.create_scale:
            scale = hk.get_parameter("scale", sizes, x.dtype, self.scale_init)
        if self.create_offset:
            offset = hk.get_parameter("offset", sizes, x.dtype, self.offset_init)
        params = BatchNormParams(*(_of_rank(a, x.ndim) for a in (scale, offset)))
        mode = True if test_local_stats else training
        before = self._read(x, shape, axes, creates=training is not False)
        y, after = self._apply(params, before, x, mode, axes, weights)
        if training is not False and update_stats:
            if mode is not training:
                after = jax.tree.map(
                    lambda new, old: jnp.where(training, new, old), after, before
                )
            self._write(before, after, axes, x.ndim)
        return y

    def _apply(
        self,
        params: BatchNormParams,
        state: CountedStats,
        x: Array,
        training: bool | Array,
        axes: tuple[int, ...],
        weights: ArrayLike | None,
    ) -> tuple[Array, CountedStats]:
        dtype = dtype_of_all(x, *params)
        lone = len(axes) == x.ndim
        if lone:
            x, axes, weights = with_lone_axis(x, axes, weights)
            params = jax.tree.map(lambda leaf: leaf[None], params)
        # While the variables are made, there may be no mapped axis yet.
        axis_name = None if hk.running_init() else self.cross_replica_axis
        # A number is a setting of the layer; a traced one, or an array, goes to the call.
        by_call = isinstance(self.decay_rate, jax.Array)
        settings: Any = {} if by_call else {"momentum": self.decay_rate}
        bn = batch_norm(
            feature_axes=axes,
            epsilon=positive(self.eps),
            use_scale=params.scale is not None,
            use_bias=params.bias is not None,
            axis_name=axis_name,
            axis_index_groups=axis_name and self.cross_replica_axis_index_groups,
            dtype=dtype,
            **settings,
        )
        options = {"momentum": self.decay_rate} if by_call else {}
        y, state = CountedBatchNorm(bn).apply(
            params, state, x, training, weights=weights, **options
        )
        return y[0] if lone else y, state

    def _feature_axes(self, ndim: int) -> tuple[int, ...]:
        if self.axis is None:
            return feature_axes(self.channel_index, ndim) if ndim else ()
        reduced = feature_axes(tuple(self.axis), ndim)
        return tuple(axis for axis in range(ndim) if axis not in reduced)

    def _read(
        self, x: Array, shape: Shape, axes: tuple[int, ...], *, creates: bool
    ) -> CountedStats:
        """Returns the state of the core's layer, of the shape of the features."""
        if not creates and not hk.running_init() and not self.mean_ema.exists():
            raise missing_stats(self)
        dtype = at_least_float32(x.dtype)
        mean, counter = self.mean_ema.read(shape, dtype, jnp.zeros)
        var, _ = self.var_ema.read(shape, real_part(dtype), jnp.ones)
        for average in (mean, var):
            check_stats(self, average.shape, shape, x.shape)
        others = tuple(axis for axis in range(x.ndim) if axis not in axes)
        mean, var = jnp.squeeze(mean, others), jnp.squeeze(var, others)
        batches = jnp.broadcast_to(counter.astype(var.dtype), var.shape)
        return CountedStats(mean, var, reshard_like(batches, var))

    def _write(
        self, before: CountedStats, after: CountedStats, axes: tuple[int, ...], ndim: int
    ) -> None:
        """Sets the state, with one more update if any feature has been updated."""
        counter = self.mean_ema.counter
        counter += (after.batches > before.batches).any().astype(counter.dtype)
        batches = jnp.broadcast_to(counter.astype(after.var.dtype), after.var.shape)
        hidden = after._replace(batches=batches).hidden(self.decay_rate)
        others = tuple(axis for axis in range(ndim) if axis not in axes)
        averages = zip((self.mean_ema, self.var_ema), after[:2], hidden, strict=True)
        for module, *arrays in averages:
            module.write(*(jnp.expand_dims(array, others) for array in arrays), counter)


def _of_rank(array: ArrayLike | None, ndim: int) -> Array | None:
    """Returns a scale or an offset in the rank of x, to which it broadcasts."""
    if array is None:
        return None
    array = as_inexact(array)
    return jnp.expand_dims(array, tuple(range(ndim - array.ndim)))
