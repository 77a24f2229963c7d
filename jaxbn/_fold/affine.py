"""What a trained norm is in inference: an affine map of every feature."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn._compat import exported
from jaxbn._dtypes import real_part, widest
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.normalizer import Normalizer
from jaxbn._layers.required import require
from jaxbn._typing import Array
from jaxbn._values.canonical import known

_DEFAULT = BatchNorm()


@exported
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


def refused(why: str) -> ValueError:
    """Returns the error of what cannot be folded, with the way to prove what can."""
    return ValueError(f"{why} jaxbn.check_fold proves a fold on data.")


def as_affine(
    params: Any, state: Any, normalizer: Normalizer[Any, Any] = _DEFAULT
) -> Affine:
    r"""Returns the affine map that a norm is in inference.

    .. math::
        y = a x + c, \quad
        a = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \quad
        c = \beta - a \mu

    Args:
        params: The trained params of the norm.
        state: Its running statistics.
        normalizer: A `BatchNorm`, what wraps one, or one of your own with the methods
            `running`, `standardize` and `scale_and_bias`.

    Returns:
        `Affine`, in float32, or in the dtype of params and state where that is wider.

    Raises:
        TypeError: The normalizer lacks one of the methods.
        ValueError: It has an activation; an array has not the shape of the others, holds
            NaN or infinity; a variance is negative.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> bn = jaxbn.BatchNorm(epsilon=1.0)
        >>> params, state = bn.init(1)
        >>> state = state._replace(mean=jnp.array([2.0]), var=jnp.array([3.0]))
        >>> print(*jaxbn.as_affine(params, state, bn))
        [0.5] [-1.]
    """
    _check_affine(normalizer)
    mean, var = normalizer.running(state)
    scale, bias = normalizer.scale_and_bias(params)
    arrays = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    arrays = {key: jnp.asarray(a) for key, a in arrays.items() if a is not None}
    for key, array in arrays.items():
        if array.shape != jnp.shape(mean):
            raise refused(
                f"the norm has {key} of shape {array.shape} but mean of shape "
                f"{jnp.shape(mean)}. Take all arrays from the same layer."
            )
        if (values := known(array)) is not None:
            _check_values(key, values)
    wide = widest(jnp.dtype(jnp.float32), *(array.dtype for array in arrays.values()))
    mean, var = arrays["mean"].astype(wide), arrays["var"].astype(real_part(wide))
    slope, offset = normalizer.standardize(mean, var)
    slope = slope.astype(wide)
    offset = -mean * slope if offset is None else offset.astype(wide) - mean * slope
    if scale is not None:
        slope, offset = (part * arrays["scale"].astype(wide) for part in (slope, offset))
    if bias is not None:
        offset = offset + arrays["bias"].astype(wide)
    return Affine(slope, offset)


def _check_affine(normalizer: Normalizer[Any, Any]) -> None:
    """Raises unless a normalizer tells what affine map it is in inference."""
    require("as_affine", normalizer, "running", "standardize", "scale_and_bias")
    if getattr(normalizer, "bank", None) is not None:
        raise ValueError(
            f"{type(normalizer).__name__} is another affine map for each domain. Choose "
            "one: as_affine(*normalizer.of_domain(params, state, domain), normalizer.bn)."
        )
    activation = getattr(normalizer, "activation", None)
    if activation is not None:
        raise refused(
            f"a norm with the activation {getattr(activation, '__name__', activation)} is "
            "no affine map, and cannot be folded. Apply the activation outside: "
            "BatchNorm(activation=None)."
        )


def _check_values(key: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise refused(
            f"the norm has {key}={values[tuple(where)]} at feature {where}. Fold a norm "
            "whose arrays are finite; jaxbn.reestimate makes new statistics."
        )
    if key == "var" and not (values >= 0).all():
        where = np.argwhere(values < 0)[0].tolist()
        raise refused(
            f"the norm has var={values[tuple(where)]} at feature {where}, which must not "
            "be negative. Re-estimate the statistics: jaxbn.reestimate."
        )
