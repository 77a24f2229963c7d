"""What normalizers share: the protocol, the checks of arguments, the two modes."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._axes import feature_shape
from jaxbn._dtypes import widest
from jaxbn._moments import Moments
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._typing import Array, Axes


class Normalizer(Protocol):
    """What every kind of normalization is: a value with two pure functions.

    Whatever has these two methods works wherever a `BatchNorm` does. `apply` may take
    further keywords, such as `weights`.

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


def choose(
    mode: bool | None,
    flag: Array | None,
    from_batch: Callable[[], tuple[Array, Array, Any]],
    from_state: Callable[[], tuple[Array, Array, Any]],
) -> tuple[Array, Array, Any]:
    """Returns the mean, the variance and the new state of the mode that holds."""
    if mode is not None:
        return from_batch() if mode else from_state()

    # The branches of one program must agree in dtype, where the batch may be wider.
    wide = [
        widest(a.dtype, b.dtype)
        for a, b in zip(
            jax.eval_shape(from_batch)[:2], jax.eval_shape(from_state)[:2], strict=True
        )
    ]

    def widened(branch):
        mean, var, state = branch()
        return mean.astype(wide[0]), var.astype(wide[1]), state

    return lax.cond(flag, lambda: widened(from_batch), lambda: widened(from_state))


def where_seen(batch: Moments, state: BatchStats) -> tuple[Array, Array]:
    """Returns the statistics of `batch`, or the running ones of features it lacks."""
    seen = batch.count > 0
    mean = jnp.where(seen, batch.mean, state.mean.astype(batch.mean.dtype))
    return mean, jnp.where(seen, batch.var, state.var.astype(batch.var.dtype))


def check_values(
    params: BatchNormParams,
    state: BatchStats,
    x: Array,
    feature_axes: Axes,
    *,
    use_scale: bool,
    use_bias: bool,
    has_weight: bool,
) -> None:
    """Raises unless params and state belong to a layer of these settings and to `x`."""
    for name, value, kind in (
        ("params", params, BatchNormParams),
        ("state", state, BatchStats),
    ):
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be {kind.__name__}, got {type(value).__name__}. Take it from "
                f"init(), or build it from its arrays: {kind.__name__}(...)."
            )
    features = feature_shape(feature_axes, x.shape)
    fields = {
        "params.scale": (params.scale, use_scale),
        "params.bias": (params.bias, use_bias),
        "state.mean": (state.mean, True),
        "state.var": (state.var, True),
        "state.weight": (state.weight, has_weight),
    }
    for name, (value, wanted) in fields.items():
        want = f"shape {features}" if wanted else "None"
        got = "None" if value is None else f"shape {jnp.shape(value)}"
        if want != got:
            raise ValueError(
                f"{name} must be of {want} for x of shape {x.shape} with feature_axes="
                f"{feature_axes}, got {got}. Take params and state from init() of the "
                "same layer, called with the number of features of x."
                if wanted
                else f"{name} must be None in this layer, got an array of {got}. Take "
                "params and state from init() of the same layer."
            )
