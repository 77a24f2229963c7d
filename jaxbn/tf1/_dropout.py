"""TensorFlow's dropout: the survivors are divided by the probability to survive."""

from collections.abc import Sequence

from jax.typing import ArrayLike

from jaxbn._dtypes import as_float
from jaxbn._layers.dropout import dropout as core_dropout
from jaxbn._typing import Array, Key, Shape
from jaxbn._values.canonical import as_settled, known


def dropout(
    key: Key,
    x: ArrayLike,
    keep_prob: float | Array | None = None,
    noise_shape: Sequence[int | None] | None = None,
    seed: object = None,
    name: str | None = None,
    rate: float | Array | None = None,
) -> Array:
    """`tf.nn.dropout`: drops elements at random, and divides the others by keep_prob.

    TensorFlow had no flag for the mode: it drops whenever it is called, so leave the call
    out to predict, or feed keep_prob = 1.

    Args:
        key: A key that is used nowhere else; in place of the seed.
        x: Floating, of any shape.
        keep_prob: The probability in (0, 1] of an element to be kept; may be traced.
        noise_shape: The shape of the random mask, 1 along the axes that are kept or
            dropped as a whole and that of x, or None, elsewhere.
        seed: No effect: the key decides what is dropped.
        name: No effect: it named operations of the graph.
        rate: 1 - keep_prob, the newer spelling; give exactly one of the two.

    Returns:
        An array of the shape and dtype of x.

    Raises:
        TypeError: x is not floating.
        ValueError: Both or neither of keep_prob and rate are given; keep_prob lies outside
            (0, 1], or rate outside [0, 1); noise_shape does not broadcast to x.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> y = tf1.dropout(jax.random.key(0), jnp.ones(1000), keep_prob=0.8)
        >>> print(sorted(set(y.tolist())))
        [0.0, 1.25]
    """
    x = as_float(x)
    if (keep_prob is None) == (rate is None):
        raise ValueError(
            f"dropout needs either keep_prob or rate, got keep_prob={keep_prob} and "
            f"rate={rate}. They are 1 minus each other; give one."
        )
    if rate is None:
        kept = as_settled("keep_prob", keep_prob, "It is the share that is kept.")
        value = known(kept)
        if value is not None and not 0 < value <= 1:
            raise ValueError(
                f"keep_prob must lie in (0, 1], got {keep_prob}. It is the share "
                "that is kept; the share that is dropped is the rate."
            )
        rate = 1 - kept
    assert rate is not None
    return core_dropout(key, x, rate, True, broadcast_axes=_shared(noise_shape, x.shape))


def _shared(noise_shape: Sequence[int | None] | None, shape: Shape) -> tuple[int, ...]:
    """Returns the axes along which one draw decides for all."""
    if noise_shape is None:
        return ()
    if len(noise_shape) != len(shape) or any(
        noise not in (None, 1, size) for noise, size in zip(noise_shape, shape, strict=True)
    ):
        raise ValueError(
            f"noise_shape {tuple(noise_shape)} does not broadcast to x of shape {shape}. "
            "Give it x's rank, with 1 or the size of x along each axis."
        )
    return tuple(axis for axis, noise in enumerate(noise_shape) if noise == 1)
