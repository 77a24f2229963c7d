"""What normalizers share before any arithmetic: the protocol and the checks."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._typing import Array, Shape


class Normalizer(Protocol):
    """What every kind of normalization is: a value with two pure functions.

    Whatever has these two methods works wherever a `BatchNorm` does. `apply` may take
    further keywords, such as `weights`. Make it a frozen dataclass, and register it with
    `jax.tree_util.register_static`, if it is to pass through `jax.jit` as BatchNorm does,
    without tracing again for an equal value.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> class Center:
        ...     def init(self, num_features):
        ...         return None, jnp.zeros((1, num_features))
        ...
        ...     def apply(self, params, state, x, training):
        ...         mean = x.mean(0, keepdims=True) if training else state
        ...         return x - mean, 0.9 * state + 0.1 * mean if training else state
        ...
        >>> params, state = jaxbn.init(1, Center())
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = jaxbn.apply(params, state, x, True, Center())
        >>> print(y.ravel(), state.ravel())
        [-1.  1.] [0.2]
    """

    def init(self, num_features: int | tuple[int, ...]) -> tuple[Any, Any]:
        """Returns `(params, state)` for inputs with `num_features` features."""
        ...

    def apply(
        self, params: Any, state: Any, x: Array, training: bool | Array
    ) -> tuple[Array, Any]:
        """Returns the normalized `x` and the state after it."""
        ...


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


def check_fields(
    name: str, value: Any, fields: tuple[type, set[str]], features: Shape, shape: Shape
) -> None:
    """Raises unless `value` is of the type and has the shapes that the layer needs.

    `fields` is the type and the names of those of its fields that are None.
    """
    kind, absent = fields
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be {kind.__name__}, got {type(value).__name__}. Take it from "
            f"init() of this layer, or build it from its arrays: {kind.__name__}(...)."
        )
    for field, array in value._asdict().items():
        want = None if field in absent else features
        got = None if array is None else jnp.shape(array)
        if want != got:
            raise ValueError(
                f"{name}.{field} must have shape {want} for x of shape {shape}, got {got}. "
                "Take params and state from init() of this layer, called with the number "
                "of features of x."
            )


def check_adjustment(
    adjustment: tuple[Array, Array] | None, features: Shape, shape: Shape
) -> None:
    """Raises unless `adjustment` is a pair of arrays that fit the features or x."""
    if adjustment is None:
        return
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


def check_residual(residual: Array | None, shape: Shape) -> None:
    """Raises unless `residual` is None or of the shape of x."""
    if residual is not None and jnp.shape(residual) != shape:
        raise ValueError(
            f"residual must have the shape {shape} of x, got {jnp.shape(residual)}. "
            "Broadcast it first: jnp.broadcast_to(residual, x.shape)."
        )
