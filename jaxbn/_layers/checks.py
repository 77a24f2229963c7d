"""What is checked of the arguments of `apply` before any arithmetic."""

import functools
import inspect
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._layers.foreign_words import answer_to
from jaxbn._typing import Array, ArrayLike, PairLike, Shape

T = TypeVar("T")


def in_our_words(function: T) -> T:
    """Decorates a function, or a class for its constructor, to answer foreign words."""
    if isinstance(function, type):
        function.__init__ = in_our_words(function.__init__)
        return function
    inside: Any = function

    @functools.wraps(inside)
    def call(*args, **kwargs):
        try:
            return inside(*args, **kwargs)
        except TypeError as error:
            answer = answer_to(inside, error, args, kwargs)
            if answer is None:
                raise
            raise TypeError(answer) from None

    return call  # pyright: ignore[reportReturnType]


def unanswered(normalizer: Any, name: str) -> TypeError:
    """Returns the error of a normalizer without a method that Normalizer only declares."""
    return TypeError(
        f"{type(normalizer).__name__} does not answer {name}, which this needs. Write the "
        f"method `{signature_of(type(normalizer), name)}`."
    )


def signature_of(owner: type, name: str) -> str:
    """Returns the head of the method `name` of a class, as it is written."""
    whole = inspect.signature(getattr(owner, name))
    shown = [p for p in whole.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    return f"def {name}{whole.replace(parameters=shown)}"


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
    """Raises unless params and state are of the types and shapes that `init` makes.

    Params may also be of the rank of x and broadcast to it: another scale for each example.
    """
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
        if name == "params" and want is not None and _broadcasts(got, shape):
            continue
        if want != got:
            axis = axis_of(got, want, shape)
            hint = "Take params and state from init() of this layer"
            if axis is not None:
                hint = (
                    f"Write feature_axes={axis}, an axis of x of this size, or take both "
                )
                hint += "from init()"
            raise ValueError(
                f"{name}.{field} must have shape {want} for x of shape {shape}, got {got}. "
                f"{hint}, called with the number of features of x."
            )


def axis_of(got: Shape | None, want: Shape | None, shape: Shape) -> int | None:
    """Returns the axis of x, of `shape`, whose size `got` is instead of `want`, or None."""
    if got is None or want is None or len(got) != 1 or len(want) != 1:
        return None
    # Features are rarely on the axis of the batch, which may have their number by chance.
    return next((axis for axis in range(1, len(shape)) if shape[axis] == got[0]), None)


def check_adjustment(adjustment: PairLike, features: Shape, shape: Shape) -> None:
    """Raises unless `adjustment` is a pair of arrays that fit the features or x."""
    if not isinstance(adjustment, (tuple, list)) or len(adjustment) != 2:
        raise TypeError(
            f"adjustment must be a pair (scale, offset), got {type(adjustment).__name__}. "
            "Pass two arrays, each of the shape of the features or broadcastable to x."
        )
    for array in adjustment:
        got = jnp.shape(array)
        if got != features and not _broadcasts(got, shape):
            raise ValueError(
                f"adjustment of shape {got} fits neither the features {features} nor x of "
                f"shape {shape}. Give it one of these shapes."
            )


def _broadcasts(got: Shape | None, shape: Shape) -> bool:
    """Tells whether an array of shape `got` has the rank of x, and broadcasts to it."""
    return (
        got is not None
        and len(got) == len(shape)
        and all(have in (1, want) for have, want in zip(got, shape, strict=True))
    )


def check_residual(residual: ArrayLike, shape: Shape) -> None:
    """Raises unless `residual` is of the shape of x."""
    if jnp.shape(residual) != shape:
        raise ValueError(
            f"residual must have the shape {shape} of x, got {jnp.shape(residual)}. "
            "Broadcast it first: jnp.broadcast_to(residual, x.shape)."
        )
