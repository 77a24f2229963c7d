"""Converts the arrays of a layer to params and statistics, and checks them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._dtypes import at_least_float32, widest
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._state import BatchNormParams
from jaxbn._typing import Array, Axes
from jaxbn.convert._array_names import LayerArrays

# PyTorch cannot convert these dtypes to NumPy, so their bits are read as integers.
_BITS = {
    "torch.bfloat16": ("int16", jnp.bfloat16),
    "torch.float8_e4m3fn": ("int8", jnp.float8_e4m3fn),
    "torch.float8_e5m2": ("int8", jnp.float8_e5m2),
}
_NOT_NEGATIVE = ("var", "var_hidden", "hidden_var", "std", "renorm_std")


def as_numpy(name: str, leaf: Any) -> np.ndarray:
    """Returns a copy of an array, a tensor or a variable."""
    if type(leaf).__module__.split(".")[0] == "torch":
        return from_tensor(name, leaf)
    if not hasattr(leaf, "dtype"):
        raise TypeError(
            f"{name} must be an array, got {type(leaf).__name__}. Pass dicts of arrays."
        )
    return np.array(leaf)


def from_tensor(name: str, tensor: Any) -> np.ndarray:
    """Returns a copy of the values of a tensor, in its dtype."""
    import torch  # pyright: ignore[reportMissingImports]

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{name!r} is a sparse, quantized or empty tensor")
    tensor = tensor.detach().cpu()
    bits = _BITS.get(str(tensor.dtype))
    if bits is None:
        return np.array(tensor.resolve_conj().resolve_neg().numpy())
    integer, dtype = bits
    return np.array(tensor.contiguous().view(getattr(torch, integer)).numpy()).view(dtype)


class Checked(NamedTuple):
    """The floating arrays of a layer by their roles, sound and of one shape."""

    arrays: dict[str, np.ndarray]
    features: tuple[int, ...]
    notes: tuple[str, ...]


def checked(
    found: LayerArrays, roles: tuple[str, ...], axes: Axes | None = None
) -> Checked:
    """Returns the arrays of those of the roles that are there, or raises.

    Args:
        found: The layer.
        roles: Those of floating arrays.
        axes: Feature axes to which arrays of x's rank are reduced; None to keep shapes.
    """
    arrays, notes = {}, []
    for role in roles:
        array = found.arrays.get(role)
        if array is None:
            continue
        name = found.names[role]
        _check_floats(name, array)
        if role in _NOT_NEGATIVE:
            zeros = int((array == 0).sum())
            if (array < 0).any():
                raise ValueError(
                    f"{name} is negative in {_channels(array < 0)}, which no variance is. "
                    "Estimate the statistics anew."
                )
            if zeros and role == "var":
                notes.append(f"{found.tail(role)} is 0 in {_channels(array == 0)}")
        if role not in ("scale", "bias") and array.dtype.itemsize < 4:
            notes.append(f"{found.tail(role)} widened from {array.dtype} to float32")
        arrays[role] = array if axes is None else _of_features(name, array, axes)
    shapes = {found.names[role]: array.shape for role, array in arrays.items()}
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


def to_layer(read: Checked, **settings: Any) -> tuple[BatchNorm, BatchNormParams]:
    """Returns a layer with these settings and its params.

    Without params, `param_dtype` is the dtype of the statistics.
    """
    given = [read.arrays[role] for role in ("scale", "bias") if role in read.arrays]
    dtype = widest(*(a.dtype for a in given or read.arrays.values()))
    fields = (read.arrays.get(role) for role in ("scale", "bias"))
    params = BatchNormParams(
        *(None if a is None else jnp.asarray(a.astype(dtype)) for a in fields)
    )
    scaled, shifted = params.scale is not None, params.bias is not None
    bn = BatchNorm(use_scale=scaled, use_bias=shifted, param_dtype=dtype, **settings)
    return bn, params


def to_stats(*arrays: np.ndarray) -> list[Array]:
    """Returns running statistics in one dtype, at least float32."""
    dtype = at_least_float32(widest(*(array.dtype for array in arrays)))
    return [jnp.asarray(array.astype(dtype)) for array in arrays]


def plain(bn: Any, library: str) -> BatchNorm:
    """Returns `bn`, or raises if it is none of the plain layers that `library` has."""
    # A normalizer that wraps another in its field `bn` trains differently from it.
    if not hasattr(bn, "bn") and hasattr(bn, "momentum") and hasattr(bn, "epsilon"):
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


def share(decay: float, steps: int) -> Any:
    """Returns 1 - decay^steps as float32 has it, as a scalar of NumPy."""
    # Haiku and Equinox compute this in float32.
    return np.float32(1) - np.power(np.float32(decay), np.float32(steps))


def steps_of(bn: BatchNorm, state: Any, counted: int | None, library: str) -> int:
    """Returns the number of steps after which an average has the weight of `state`.

    Where it no longer tells, as without debiasing, so many that nothing is left to debias;
    or `counted`, the number that came with the layer, if that is more.
    """
    if bn.momentum is None or bn.momentum >= 1:
        raise ValueError(
            f"{library} averages with a fixed decay below 1, got momentum={bn.momentum}. "
            "Write the layer with the decay that training goes on with."
        )
    if bn.momentum == 0:
        enough = 1
    else:
        enough = math.ceil(math.log(2.0**-26) / math.log(bn.momentum))
    weight = getattr(state, "weight", None)
    weight = None if weight is None else float(np.max(weight))
    if weight == 0:
        return 0
    if weight is not None and weight < 1 and bn.momentum > 0:
        return max(1, min(enough, round(math.log1p(-weight) / math.log(bn.momentum))))
    return max(enough, counted or 0)
