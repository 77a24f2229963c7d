"""Dropout in both conventions: scaled while training, or scaled at inference."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._dtypes import as_float
from jaxbn._layers.checks import split_mode
from jaxbn._sharding import broadcast_like, split_like
from jaxbn._typing import Array, ArrayLike, Key
from jaxbn._values.canonical import as_settled, known

SCALED_AT = ("training", "inference")


def dropout(
    key: Key,
    x: ArrayLike,
    rate: float | Array,
    training: bool | Array,
    *,
    broadcast_axes: tuple[int, ...] = (),
    scaled_at: Literal["training", "inference"] = "training",
) -> Array:
    r"""Returns `x` with a random part of its elements set to 0 while training.

    .. math::
        y = \frac{m x}{1 - \mathrm{rate}}
        \quad \text{or, scaled at inference,} \quad
        y = m x \text{ while training}, \; y = (1 - \mathrm{rate})\, x \text{ after}

    with m = 1 with probability 1 - rate, else 0. Either way the expectation is the same
    in both modes.

    Args:
        key: A key that is used nowhere else.
        x: Floating or complex.
        rate: The probability in [0, 1) of being dropped; may be traced.
        training: A bool, or a boolean scalar array, which may be traced.
        broadcast_axes: Axes along which elements are dropped together, such as the
            positions (1, 2) of a feature map.
        scaled_at: "training" divides what is kept by 1 - rate in training and leaves
            inference as it is; "inference" does the opposite.

    Returns:
        An array of the shape and dtype of x.

    Raises:
        TypeError: x is not floating or complex; rate is not a scalar; training is not a
            boolean.
        ValueError: rate lies outside [0, 1); an axis is out of range; scaled_at is
            unknown.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> y = jaxbn.dropout(jax.random.key(0), jnp.ones(1000), 0.2, training=True)
        >>> print(sorted(set(y.tolist())), bool(abs(y.mean() - 1) < 0.05))
        [0.0, 1.25] True

    References:
        Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: A Simple
        Way to Prevent Neural Networks from Overfitting", 2014.

    Differs from `flax.linen.Dropout` in the explicit key, the traced `training` and the
    second convention.
    """
    x = as_float(x)
    rate = as_settled("rate", rate, "It is the share that is dropped, such as 0.1.")
    value = known(rate)
    if value is not None and not 0 <= value < 1:
        raise ValueError(
            f"rate must lie in [0, 1), got {rate}. It is the share that is dropped; the "
            "share that is kept, TensorFlow's keep_prob, is 1 - rate."
        )
    if scaled_at not in SCALED_AT:
        raise ValueError(f"unknown scaled_at {scaled_at!r}. Choose one of {SCALED_AT}.")
    for axis in broadcast_axes:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"broadcast axis {axis} is out of range for x of shape {x.shape}. Choose "
                f"axes within [{-x.ndim}, {x.ndim - 1}]."
            )
    together = {axis % x.ndim for axis in broadcast_axes}
    mode, flag = split_mode(training)
    kept = 1 - jnp.asarray(rate, jnp.float32)
    scale = jnp.asarray(1 / kept if scaled_at == "training" else kept, x.dtype)

    def drop() -> Array:
        shape = [1 if axis in together else size for axis, size in enumerate(x.shape)]
        mask = split_like(x, jax.random.bernoulli(key, kept, shape))
        nothing = jnp.zeros((1,) * x.ndim, x.dtype)
        y = lax.select(*(broadcast_like(a, x) for a in (mask, x, nothing)))
        return y * scale if scaled_at == "training" else y

    def keep() -> Array:
        return x * scale if scaled_at == "inference" else x

    if mode is not None:
        return drop() if mode else keep()
    return lax.cond(flag, drop, keep)
