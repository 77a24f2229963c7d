"""Translates between TensorFlow's variables and the NamedTuples of the core."""

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxbn._norm_names import TENSORFLOW
from jaxbn._typing import Array, DTypeLike, Initializer, Shape

Variables: TypeAlias = dict[str, Array]

BIASED, LOCAL_STEP = "moving_mean/biased", "moving_mean/local_step"


def variable_shape(shape: Shape, axes: tuple[int, ...], virtual: bool) -> Shape:
    """Returns the shape that TensorFlow gave the variables of inputs of `shape`."""
    if len(axes) == 1 and not virtual:
        return (shape[axes[0]],)
    sizes = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
    return (1, *sizes) if virtual else sizes


def to_fields(kind: Any, variables: Mapping[str, Array], features: Shape) -> Any:
    """Returns the NamedTuple `kind` of the core that holds `variables`."""
    found = (variables.get(TENSORFLOW.get(field, "")) for field in kind._fields)
    return kind(*(None if v is None else jnp.asarray(v).reshape(features) for v in found))


def to_variables(fields: Any, shape: Shape, dtype: DTypeLike) -> Variables:
    """Returns the arrays of a NamedTuple of the core under TensorFlow's names."""
    present = {k: array for k, array in fields._asdict().items() if array is not None}
    return {
        TENSORFLOW[k]: array.reshape(shape).astype(dtype) for k, array in present.items()
    }


def in_shape(initializer: Initializer, shape: Shape) -> Initializer:
    """Returns an initializer that draws in `shape`, whatever shape of that size is asked.

    So that one which looks at the shape, or holds an array, meets TensorFlow's.
    """

    @functools.wraps(initializer)
    def draw(key: Any, wanted: Shape, dtype: Any) -> Array:
        return jnp.reshape(jnp.asarray(initializer(key, shape, dtype)), wanted)

    return draw


def check_variables(
    what: str, variables: Mapping[str, Array], shapes: Mapping[str, Shape]
) -> None:
    """Raises unless `variables` are those of `shapes`, no more and no less."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"{what} must be a dict of arrays under TensorFlow's names, got "
            f"{type(variables).__name__}. Take it from init() of this layer."
        )
    got = {name: jnp.shape(array) for name, array in variables.items()}
    if got != dict(shapes):
        raise ValueError(
            f"{what} must hold variables of the shapes {dict(shapes)} for this layer and "
            f"input, got {got}. Take them from init() of the same layer, called with the "
            "shape of the input, or from a checkpoint of the same layer."
        )
