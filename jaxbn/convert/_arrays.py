"""From arrays of any library to params and statistics: their checks and their dtypes."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._dtypes import at_least_float32, widest
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.batch_renorm import RenormStats
from jaxbn._layers.normalizer import Normalizer
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._typing import Array, Axes
from jaxbn.convert._array_names import Part

_NOT_NEGATIVE = ("var", "var_hidden", "hidden_var", "std", "renorm_std")


class Values(NamedTuple):
    """What was read of a layer."""

    bn: Normalizer
    params: BatchNormParams
    state: BatchStats | RenormStats
    notes: tuple[str, ...]


class Checked(NamedTuple):
    """The floating arrays of a layer by their roles, sound and of one shape."""

    arrays: dict[str, np.ndarray]
    features: tuple[int, ...]
    notes: tuple[str, ...]


def checked(part: Part, roles: tuple[str, ...], axes: Axes | None = None) -> Checked:
    """Returns the arrays of those of the roles that are there, or raises.

    Args:
        part: The layer.
        roles: Those of floating arrays.
        axes: Feature axes to which arrays of x's rank are reduced; None to keep shapes.
    """
    arrays, notes = {}, []
    for role in roles:
        array = part.get(role)
        if array is None:
            continue
        name = part.names[role]
        _check_floats(name, array)
        if role in _NOT_NEGATIVE:
            zeros = int((array == 0).sum())
            if (array < 0).any():
                raise ValueError(
                    f"{name} is negative in {_channels(array < 0)}, which no variance is. "
                    "Estimate the statistics anew."
                )
            if zeros and role == "var":
                notes.append(f"{part.tail(role)} is 0 in {_channels(array == 0)}")
        arrays[role] = array if axes is None else _of_features(name, array, axes)
    shapes = {part.names[role]: array.shape for role, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the arrays of one layer must be of one shape, got {shapes}. They are not of "
            "the same layer."
        )
    features = next(iter(shapes.values()), ())
    if () in shapes.values():
        raise ValueError(
            f"{', '.join(shapes)} hold a single number. Statistics have an axis."
        )
    return Checked(arrays, features, tuple(notes))


def _check_floats(name: str, array: np.ndarray) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating, got {array.dtype}. Quantized and complex layers are "
            "not converted."
        )
    if array.dtype.itemsize > (8 if jax.config.read("jax_enable_x64") else 4):
        raise ValueError(
            f"{name} is {array.dtype}, which JAX would round. Set jax_enable_x64, or "
            "convert it yourself: array.astype(np.float32)."
        )
    wrong = ~np.isfinite(array)
    if wrong.any():
        raise ValueError(
            f"{name} is not finite in {_channels(wrong)}. Take an earlier checkpoint, or "
            "estimate the statistics anew (jaxbn.reestimate)."
        )


def _channels(wrong: np.ndarray) -> str:
    flat = wrong.ravel()
    return (
        f"{int(flat.sum())} of {flat.size} channels, the first being {int(flat.argmax())}"
    )


def _of_features(name: str, array: np.ndarray, axes: Axes) -> np.ndarray:
    """Returns an array of x's rank with its axes of size 1 removed, but for `axes`."""
    if isinstance(axes, int):
        features = (max(array.shape, default=1),)
    else:
        ndim = array.ndim
        kept = {axis % ndim for axis in axes if -ndim <= axis < ndim}
        features = tuple(array.shape[axis] for axis in sorted(kept))
    if len(features) != np.size(axes) or array.size != np.prod(features, dtype=int):
        raise ValueError(
            f"{name} has the shape {array.shape}, which is not 1 everywhere but at the "
            f"feature axes {axes}. Pass the axes that the layer was made with."
        )
    return array.reshape(features)


def to_params(read: Checked) -> tuple[BatchNormParams, jnp.dtype]:
    """Returns the params, and their dtype or, without any, that of the statistics."""
    given = [read.arrays[role] for role in ("scale", "bias") if role in read.arrays]
    dtype = widest(*(a.dtype for a in given or read.arrays.values()))
    fields = (read.arrays.get(role) for role in ("scale", "bias"))
    return BatchNormParams(
        *(None if a is None else jnp.asarray(a.astype(dtype)) for a in fields)
    ), dtype


def to_stats(*arrays: np.ndarray) -> list[Array]:
    """Returns running statistics in one dtype, at least float32."""
    dtype = at_least_float32(widest(*(array.dtype for array in arrays)))
    return [jnp.asarray(array.astype(dtype)) for array in arrays]


def plain(bn: Normalizer, library: str) -> BatchNorm:
    """Returns `bn` if it is a BatchNorm, or raises because `library` has no other."""
    if isinstance(bn, BatchNorm):
        return bn
    raise TypeError(
        f"{library} has nothing like {type(bn).__name__}. Pass the BatchNorm in it: its "
        "inference is the same."
    )


def per_feature(params: BatchNormParams, **stats: Array) -> dict[str, np.ndarray]:
    """Returns the arrays of params and of statistics that are there, by their roles."""
    named: Mapping[str, Array | None] = {**params._asdict(), **stats}
    return {role: np.asarray(a) for role, a in named.items() if a is not None}


def expanded(
    arrays: Mapping[str, np.ndarray], axes: Axes, ndim: int | None
) -> dict[str, np.ndarray]:
    """Returns arrays of the features in the rank of x, with ones at its other axes."""
    if ndim is None:
        raise TypeError(
            "the shapes of this layer have the rank of x there, which is not known. Pass "
            "ndim=4 for images, ndim=2 for vectors."
        )
    features = (axes,) if isinstance(axes, int) else axes
    kept = {axis % ndim for axis in features}
    others = tuple(axis for axis in range(ndim) if axis not in kept)
    return {role: np.expand_dims(array, others) for role, array in arrays.items()}
