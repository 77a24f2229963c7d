"""What is trained (`BatchNormParams`) and what is tracked (`BatchStats`)."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxbn._typing import Array, DTypeLike, Initializer, Key, Shape


class BatchNormParams(NamedTuple):
    """The trained scale and bias, each of the shape of the features.

    Example:
        >>> import jaxbn
        >>> params, _ = jaxbn.BatchNorm(use_bias=False).init(3)
        >>> params.scale.shape, params.bias
        ((3,), None)

    Attributes:
        scale: Multiplies the normalized input, or None with `use_scale=False`.
        bias: Added last, or None with `use_bias=False`.
    """

    scale: Array | None
    bias: Array | None


class BatchStats(NamedTuple):
    """The running statistics, each of the shape of the features.

    Structure, shapes and dtypes never change from one step to the next, so the value
    can be carried by `jax.lax.scan`, averaged, checkpointed and donated.

    Example:
        >>> import jaxbn
        >>> _, state = jaxbn.BatchNorm().init(3)
        >>> state.mean.shape, state.var.shape, state.weight
        ((3,), (3,), None)

    Attributes:
        mean: Running mean, at least float32. Starts at 0.
        var: Running variance, real, at least float32. Starts at 1.
        weight: What the averages have seen so far, for each feature: the weight that the
            zeroth value has lost with `debias=True`, the number of batches with
            `momentum=None`. Otherwise None. A float, so that averaging the state over
            devices keeps its dtype.
    """

    mean: Array
    var: Array
    weight: Array | None = None


def draw(
    initializer: Initializer, key: Key | None, shape: Shape, dtype: DTypeLike
) -> Array:
    """Returns what `initializer` draws, or explains that it needs a key or a new shape."""
    try:
        array = jnp.asarray(initializer(key, shape, dtype), dtype)
    except (TypeError, ValueError) as error:
        if key is not None:
            raise
        raise TypeError(
            f"the initializer {initializer} failed without a key: {error}. If it draws "
            "random numbers, pass one: init(..., key=jax.random.key(0))."
        ) from error
    if array.shape != shape:
        raise ValueError(
            f"the initializer {initializer} returned shape {array.shape} where {shape} "
            "was asked for. Let it honour its shape argument."
        )
    return array
