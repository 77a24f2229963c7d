"""What a framework hands to a layer as x, made what the core takes."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._dtypes import widest
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._typing import Array, Axes, DTypeLike, Shape

# The core's layer is built and checked once for all layers and calls of equal settings.
batch_norm = functools.lru_cache(maxsize=1024)(BatchNorm)


def as_inexact(x: ArrayLike, dtype: DTypeLike | None = None) -> Array:
    """Returns `x` as the core takes it; modules take integers and NumPy arrays too."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.astype(widest(x.dtype, jnp.dtype(dtype)))
    return x


def feature_axes(axis: Axes, ndim: int) -> tuple[int, ...]:
    """Returns `axis` as non-negative feature axes, each once, ascending."""
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


def positive(epsilon: Any) -> float:
    """Returns epsilon as the core takes it: a framework's 0 means as little as possible."""
    if isinstance(epsilon, (jax.Array, np.ndarray)):
        epsilon = epsilon.item()
    return epsilon or float(jnp.finfo(jnp.float32).tiny)


def dtype_of_all(*arrays: Array | None) -> jnp.dtype:
    """Returns the dtype that holds all of `arrays`: that of the result of a layer."""
    return widest(*(array.dtype for array in arrays if array is not None))


def with_lone_axis(
    x: Array, axes: tuple[int, ...], weights: Any
) -> tuple[Array, tuple[int, ...], Any]:
    """Returns x, its feature axes and weights with one more axis to average over.

    Frameworks allow every axis of x to be a feature axis; the core needs one to reduce.
    """
    weights = None if weights is None else jnp.asarray(weights)[None]
    return x[None], tuple(axis + 1 for axis in axes), weights
