"""What the layers for Flax's two APIs share: a call of the core in Flax's terms."""

from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from jax.typing import ArrayLike

from jaxbn._accumulation.gather import Gather
from jaxbn._accumulation.state import Gathered
from jaxbn._dtypes import as_dtype, at_least_float32, widest
from jaxbn._layers.checks import axis_of
from jaxbn._modules.inputs import batch_norm, feature_axes, positive, with_lone_axis
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._statistics.named_axes import as_groups
from jaxbn._typing import Array, DTypeLike, Shape

_FLOAT32 = jnp.dtype(jnp.float32)


def as_training(use_running_average: bool | Array) -> bool | Array:
    """Returns the opposite, of a traced flag too."""
    check_mode(use_running_average)
    if isinstance(use_running_average, jax.Array):
        return jnp.logical_not(use_running_average)
    return not use_running_average


def check_mode(use_running_average: Any) -> None:
    """Raises unless a mode is None, a bool, or an array."""
    if isinstance(use_running_average, (NoneType, bool, np.bool_, np.ndarray, jax.Array)):
        return
    # A number would count as True: as inference for ever.
    raise TypeError(
        f"use_running_average must be a bool, got {use_running_average!r}. Write "
        "use_running_average=False for training and True for inference; a number of "
        "features is not given to a layer of linen, which takes it from x."
    )


def check_settings(use_running_average: Any, *dtypes: DTypeLike | None) -> None:
    """Raises unless the mode and the dtypes of a layer are such."""
    check_mode(use_running_average)
    for dtype in dtypes:
        as_dtype(dtype)


def axis_remedy(got: Shape, want: Shape, shape: Shape) -> str:
    """Returns what to write where x, of `shape`, has `want` features instead of `got`."""
    axis = axis_of(got, want, shape)
    if axis is None:
        return "set axis to the feature axis of x"
    return f"write axis={axis}, since that axis of x has the size of the layer"


def zero_stats(shape: Shape, dtype: DTypeLike) -> BatchStats:
    """Returns the statistics before training in `dtype`, of which the variance is real."""
    return BatchStats(jnp.zeros(shape, dtype), jnp.ones(shape, jnp.finfo(dtype).dtype))


def stats_dtype(*dtypes: DTypeLike | None) -> jnp.dtype:
    """Returns the dtype in which statistics of arrays of `dtypes` lose nothing."""
    kinds = {jnp.dtype(dtype) for dtype in dtypes if dtype is not None}
    # Type promotion takes longer than all else here, and this is the usual case.
    if kinds == {_FLOAT32}:
        return _FLOAT32
    return at_least_float32(widest(*kinds))


def call_batch_norm(
    layer: Any,
    params: BatchNormParams,
    state: BatchStats | Gathered,
    x: Array,
    training: bool | Array,
    *,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    synchronize: bool = True,
    together: tuple[Array, ...] = (),
) -> tuple[Array, BatchStats | Gathered]:
    """Calls the core for a layer that has the fields of Flax's BatchNorm.

    `synchronize` is False while the variables are made: then there is no named axis yet.
    The result has the dtype of x, the params and the arrays `together`.
    """
    if layer.momentum is None:
        raise TypeError(
            "momentum must be a number, got None. For the mean of all batches so far, "
            "which needs one more leaf, write Norm(jaxbn.BatchNorm(momentum=None), ...)."
        )
    axes = feature_axes(layer.axis, x.ndim)
    weighting = _merge_mask(mask, weights, x.ndim)
    lone = len(axes) == x.ndim
    if lone:
        x, axes, weighting = with_lone_axis(x, axes, weighting)
    axis_name = layer.axis_name if synchronize else None
    groups = None if axis_name is None else as_groups(axis_name, layer.axis_index_groups)
    bn = batch_norm(
        feature_axes=axes,
        epsilon=positive(layer.epsilon),
        use_scale=params.scale is not None,
        use_bias=params.bias is not None,
        axis_name=axis_name,
        axis_index_groups=groups,
        dtype=result_dtype(layer.dtype, x, *params, *together),
    )
    if not isinstance(state, Gathered):
        wider = x.dtype if jnp.iscomplexobj(x) else None
        mean = state.mean.astype(stats_dtype(state.mean.dtype, wider))
        state = state._replace(
            mean=mean, var=state.var.astype(stats_dtype(state.var.dtype))
        )
    y, state = Gather(bn).apply(
        params, state, x, training, weights=weighting, momentum=layer.momentum
    )
    return y[0] if lone else y, state


def result_dtype(dtype: DTypeLike | None, *arrays: Array | None) -> jnp.dtype:
    """Returns `dtype`, or the one that holds all of `arrays`, as Flax resolves it."""
    kinds = {array.dtype for array in arrays if array is not None}
    if dtype is None and len(kinds) == 1:
        return kinds.pop()
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(canonicalize_dtype(*arrays, dtype=dtype))


def _merge_mask(mask: ArrayLike | None, weights: Any, ndim: int) -> Any:
    """Returns what the core calls weights; Flax's mask broadcasts to x as NumPy does."""
    if mask is None:
        return weights
    if weights is not None:
        raise ValueError(
            "both mask and weights were given, but they say the same thing. Pass one: "
            "weights=weights * mask."
        )
    mask = jnp.asarray(mask, bool)
    return jnp.expand_dims(mask, tuple(range(ndim - mask.ndim)))
