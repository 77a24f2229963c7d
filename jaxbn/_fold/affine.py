"""What a trained norm is in inference: an affine map of every feature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._axes import as_axes, expand, reduction_axes
from jaxbn._compat import is_traced
from jaxbn._dtypes import widest
from jaxbn._kernels.normalize import normalize
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.normalizer import Normalizer
from jaxbn._typing import Array, Axes, DTypeLike

_DEFAULT = BatchNorm()


class Affine(NamedTuple):
    """What a norm is in inference: y = scale x + bias, for each feature.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> affine = jaxbn.Affine(jnp.array([2.0]), jnp.array([1.0]))
        >>> print(jnp.array([3.0]) * affine.scale + affine.bias)
        [7.]

    Attributes:
        scale: What x is multiplied by, of the shape of the features.
        bias: What is added, likewise.
    """

    scale: Array
    bias: Array


def as_affine(params: Any, state: Any, normalizer: Normalizer = _DEFAULT) -> Affine:
    r"""Returns the affine map that a norm is in inference.

    .. math::
        y = a x + c, \quad
        a = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \quad
        c = \beta - a \mu

    Args:
        params: The trained params of the norm.
        state: Its running statistics.
        normalizer: A `BatchNorm`, or a `GhostBatchNorm` or `BatchRenorm`, which are the
            same in inference.

    Returns:
        `Affine`, in float32, or in the dtype of params and state where that is wider.

    Raises:
        TypeError: The normalizer is of another kind.
        ValueError: It has an activation; an array has not the shape of the others, holds
            NaN or infinity; a variance is not positive.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> bn = jaxbn.BatchNorm(epsilon=1.0)
        >>> params, state = bn.init(1)
        >>> state = state._replace(mean=jnp.array([2.0]), var=jnp.array([3.0]))
        >>> print(*jaxbn.as_affine(params, state, bn))
        [0.5] [-1.]
    """
    bn = settings_of(normalizer)
    return affine_of(state.mean, state.var, *params, epsilon=bn.epsilon)


def settings_of(normalizer: Normalizer) -> BatchNorm:
    """Returns the `BatchNorm` that a normalizer is in inference, if that is affine."""
    bn: Any = normalizer
    while hasattr(bn, "wrapped"):
        bn = bn.wrapped
    if bn.activation is not None:
        name = getattr(bn.activation, "__name__", bn.activation)
        raise ValueError(
            f"a norm with the activation {name} is no affine map, and cannot be "
            "folded. Apply the activation outside: BatchNorm(activation=None)."
        )
    return bn


def affine_of(
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    *,
    epsilon: float,
    name: str = "the norm",
) -> Affine:
    """Returns the affine map of the arrays of a norm, which `name` names in errors."""
    arrays = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    arrays = {key: jnp.asarray(a) for key, a in arrays.items() if a is not None}
    for key, array in arrays.items():
        if array.shape != jnp.shape(mean):
            raise ValueError(
                f"{name} has {key} of shape {array.shape} but mean of shape "
                f"{jnp.shape(mean)}. Take all arrays from the same layer."
            )
        if not is_traced(array):
            _check_values(name, key, array)
    wide = widest(jnp.dtype(jnp.float32), *(array.dtype for array in arrays.values()))
    axes = tuple(range(1, jnp.ndim(mean) + 1))

    def inference(x: Array) -> Array:
        return normalize(x, **arrays, feature_axes=axes, epsilon=epsilon, dtype=wide)

    # An affine map is its value at 0 and its derivative.
    zero = jnp.zeros((1, *jnp.shape(mean)), wide)
    at_zero, slope = jax.jvp(inference, (zero,), (jnp.ones_like(zero),))
    return Affine(slope[0], at_zero[0])


def _check_values(name: str, key: str, array: Array) -> None:
    # In NumPy, so that arrays whose values are known are checked inside jit too.
    values = np.asarray(array)
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(
            f"{name} has {key}={values[tuple(where)]} at feature {where}. Fold a norm "
            "whose arrays are finite; jaxbn.reestimate makes new statistics."
        )
    if key == "var" and not (values >= 0).all():
        where = np.argwhere(values < 0)[0].tolist()
        raise ValueError(
            f"{name} has var={values[tuple(where)]} at feature {where}, which must not be "
            "negative. Re-estimate the statistics: jaxbn.reestimate."
        )


def shifted(x: Array, bias: Array | None, feature_axes: Axes, dtype: DTypeLike) -> Array:
    """Returns what a folded norm makes of `x`: x, or x and what was left of the norm."""
    if bias is None:
        return x.astype(dtype)
    wide = widest(x.dtype, bias.dtype)
    axes = reduction_axes(as_axes(feature_axes), x.shape)
    return (x.astype(wide) + expand(bias, axes).astype(wide)).astype(dtype)
