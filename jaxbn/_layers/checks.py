"""What is checked of the arguments of `apply` before any arithmetic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._typing import Array, ArrayLike, PairLike, Shape


def split_mode(training: bool | Array) -> tuple[bool | None, Array | None]:
    """Returns `training` as a Python bool, or as an array where it is one."""
    if isinstance(training, (bool, np.bool_)):
        return bool(training), None
    if isinstance(training, (jax.Array, np.ndarray)):
        if training.dtype == jnp.bool_ and training.ndim == 0:
            return None, jnp.asarray(training)
        got = f"an array of dtype {training.dtype} and shape {training.shape}"
    else:
        got = repr(training)
    raise TypeError(
        f"training must be a bool or a boolean scalar array, got {got}. Pass True to "
        "normalize with the statistics of the batch, False for the running ones."
    )


@functools.lru_cache(maxsize=1024)
def _made_by(layer: Any, features: Shape) -> tuple[Any, Any] | None:
    """Returns the types of params and state that `init` makes; None if it needs a key."""
    sizes = features if len(features) != 1 else features[0]
    try:
        return jax.eval_shape(lambda: layer.init(sizes))
    except TypeError:
        return None


def check_made_by(
    layer: Any, params: Any, state: Any, features: Shape, shape: Shape
) -> None:
    """Raises unless params and state are of the types and shapes that `init` makes."""
    made = _made_by(layer, features)
    for name, value, kind in zip(
        ("params", "state"), (params, state), made or (), strict=False
    ):
        _check_fields(name, value, kind, shape)


def _check_fields(name: str, value: Any, made: Any, shape: Shape) -> None:
    kind = type(made)
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be {kind.__name__}, got {type(value).__name__}. Take it from "
            f"init() of this layer, or build it from its arrays: {kind.__name__}(...)."
        )
    if not hasattr(made, "_fields"):
        return
    for field, want, got in zip(made._fields, made, value, strict=True):
        want, got = (None if a is None else jnp.shape(a) for a in (want, got))
        if want != got:
            raise ValueError(
                f"{name}.{field} must have shape {want} for x of shape {shape}, got {got}. "
                "Take params and state from init() of this layer, called with the number "
                "of features of x."
            )


def check_adjustment(adjustment: PairLike, features: Shape, shape: Shape) -> None:
    """Raises unless `adjustment` is a pair of arrays that fit the features or x."""
    if not isinstance(adjustment, (tuple, list)) or len(adjustment) != 2:
        raise TypeError(
            f"adjustment must be a pair (scale, offset), got {type(adjustment).__name__}. "
            "Pass two arrays, each of the shape of the features or broadcastable to x."
        )
    for array in adjustment:
        got = jnp.shape(array)
        broadcasts = len(got) == len(shape) and all(
            have in (1, want) for have, want in zip(got, shape, strict=True)
        )
        if got != features and not broadcasts:
            raise ValueError(
                f"adjustment of shape {got} fits neither the features {features} nor x of "
                f"shape {shape}. Give it one of these shapes."
            )


def check_residual(residual: ArrayLike, shape: Shape) -> None:
    """Raises unless `residual` is of the shape of x."""
    if jnp.shape(residual) != shape:
        raise ValueError(
            f"residual must have the shape {shape} of x, got {jnp.shape(residual)}. "
            "Broadcast it first: jnp.broadcast_to(residual, x.shape)."
        )
