"""What the layers for Flax's two APIs share: a call of the core in Flax's terms."""

import functools
from collections.abc import Iterable, Mapping
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
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.checks import axis_of
from jaxbn._layers.functions import InitApply
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._statistics.named_axes import as_groups
from jaxbn._typing import Array, Axes, DTypeLike, PyTree, Shape

_FLOAT32 = jnp.dtype(jnp.float32)


def as_inexact(x: ArrayLike, dtype: DTypeLike | None) -> Array:
    """Returns `x` as the core takes it; Flax takes integers and NumPy arrays too."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.astype(widest(x.dtype, jnp.dtype(dtype)))
    return x


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


def feature_axes(axis: Axes, ndim: int) -> tuple[int, ...]:
    """Returns Flax's `axis` as non-negative feature axes, each once, ascending."""
    axes = axis if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({int(a) + ndim if a < 0 else int(a) for a in axes}))


def variable_shape(axis: Axes, shape: Shape) -> Shape:
    """Returns the shape of the variables of a layer for inputs of `shape`."""
    axes = feature_axes(axis, len(shape))
    if not all(0 <= a < len(shape) for a in axes):
        raise ValueError(
            f"axis={axis} is out of range for x of shape {shape}, which has rank "
            f"{len(shape)}. Name the feature axes of x: axis=-1 for channels last."
        )
    return tuple(shape[a] for a in axes)


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
    # Flax allows every axis to be a feature axis; the core needs one to reduce, so add an
    # axis of size 1.
    lone = len(axes) == x.ndim
    if lone:
        x, axes = x[None], tuple(axis + 1 for axis in axes)
        weighting = None if weighting is None else weighting[None]
    axis_name = layer.axis_name if synchronize else None
    groups = None if axis_name is None else as_groups(axis_name, layer.axis_index_groups)
    bn = _batch_norm(
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


# The core's layer is built and checked once for all layers and calls of equal settings.
_batch_norm = functools.lru_cache(maxsize=1024)(BatchNorm)


def positive(epsilon: Any) -> float:
    """Returns epsilon as the core takes it: Flax's 0 means as little as possible."""
    if isinstance(epsilon, (jax.Array, np.ndarray)):
        epsilon = epsilon.item()
    return epsilon or float(jnp.finfo(jnp.float32).tiny)


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


def feature_axes_of(normalizer: InitApply[Any, Any]) -> Axes:
    """Returns the feature axes of a normalizer, which is free not to name any."""
    return getattr(normalizer, "feature_axes", -1)


def num_features_of(normalizer: InitApply[Any, Any], shape: Shape) -> int | Shape:
    """Returns what `normalizer.init` is to be called with for inputs of `shape`."""
    sizes = variable_shape(feature_axes_of(normalizer), shape)
    return sizes[0] if len(sizes) == 1 else sizes


def kinds_of(
    normalizer: InitApply[Any, Any], num_features: int | Shape, options: Mapping[str, Any]
) -> tuple[PyTree, PyTree]:
    """Returns the shapes of what `normalizer.init` returns, traced once for equal calls."""
    key = normalizer, num_features, tuple(options.items())
    try:
        hash(key)
    except TypeError:
        return _kinds_of.__wrapped__(*key)
    return _kinds_of(*key)


@functools.lru_cache(maxsize=1024)
def _kinds_of(normalizer: Any, num_features: Any, options: tuple[Any, ...]) -> Any:
    return jax.eval_shape(lambda: normalizer.init(num_features, **dict(options)))


def with_leaves(kind: PyTree, leaves: Iterable[Any]) -> Any:
    """Returns a tree of the structure of `kind`."""
    return jax.tree.unflatten(jax.tree.structure(kind), leaves)


def leaf_names(params: PyTree, state: PyTree) -> tuple[list[str], list[str]]:
    """Returns names for the leaves of both trees: their fields, such as scale and mean."""
    names = _names(params, "params"), _names(state, "state")
    every = [*names[0], *names[1]]
    if len(set(every)) != len(every):
        raise ValueError(
            "the params and the state of the normalizer have leaves of the same name: "
            f"{every}. Name the fields of both so that all differ."
        )
    return names


def _names(tree: PyTree, alone: str) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="_") or alone
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
