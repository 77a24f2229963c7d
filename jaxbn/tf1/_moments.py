"""TensorFlow's moments of tensors, and the sums from which they follow."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._dtypes import as_float
from jaxbn._statistics.moments import batch_moments
from jaxbn._statistics.weights import prepare_weights
from jaxbn._typing import Array
from jaxbn.tf1._arguments import ReducedAxes, axes_to_reduce, of_rank


def moments(
    x: ArrayLike,
    axes: ReducedAxes,
    shift: ArrayLike | None = None,
    name: str | None = None,
    keep_dims: bool | None = None,
    keepdims: bool | None = None,
) -> tuple[Array, Array]:
    """`tf.nn.moments`: the mean and the biased variance of `x` over `axes`.

    Args:
        x: Floating, of any shape.
        axes: The axis or axes to average over.
        shift: No effect, as in TensorFlow 1.15. The variance is taken around the mean, so
            that a shift has nothing to improve.
        name: No effect: it named operations of the graph.
        keep_dims: Whether the results keep the axes, with size 1; False if not given.
        keepdims: The newer spelling; give at most one of the two.

    Returns:
        `(mean, variance)` in the dtype of x, computed at least in float32.

    Raises:
        TypeError: x is not floating; axes are not ints.
        ValueError: An axis is out of range or named twice; both spellings are given.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> mean, variance = tf1.moments(jnp.array([[1.0], [3.0]]), [0])
        >>> print(mean, variance)
        [2.] [1.]
    """
    return _moments(as_float(x), None, axes, _kept(keep_dims, keepdims))


def weighted_moments(
    x: ArrayLike,
    axes: ReducedAxes,
    frequency_weights: ArrayLike,
    name: str | None = None,
    keep_dims: bool | None = None,
    keepdims: bool | None = None,
) -> tuple[Array, Array]:
    """`tf.nn.weighted_moments`: the mean and the variance of `x` under weights.

    TensorFlow gave NaN where all weights are 0; here, mean and variance are 0 there.

    Args:
        x: Floating, of any shape.
        axes: The axis or axes to average over.
        frequency_weights: Non-negative; broadcast against x. Only their ratios matter.
        name: No effect: it named operations of the graph.
        keep_dims: Whether the results keep the axes, with size 1; False if not given.
        keepdims: The newer spelling; give at most one of the two.

    Returns:
        `(mean, variance)` in the dtype of x, computed at least in float32.

    Raises:
        TypeError: x is not floating; axes are not ints.
        ValueError: An axis is out of range or named twice; a weight is negative, or the
            weights do not broadcast; both spellings are given.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> weights = jnp.array([[1.0], [3.0]])
        >>> print(tf1.weighted_moments(jnp.array([[0.0], [4.0]]), [0], weights))
        (Array([3.], dtype=float32), Array([3.], dtype=float32))
    """
    x, weights = as_float(x), jnp.asarray(frequency_weights)
    x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, weights.shape))
    return _moments(x, of_rank(weights, x.ndim), axes, _kept(keep_dims, keepdims))


def _kept(keep_dims: bool | None, keepdims: bool | None) -> bool:
    if keep_dims is not None and keepdims is not None:
        raise ValueError(
            f"keep_dims={keep_dims} and keepdims={keepdims} are two spellings of one "
            "argument. Give one."
        )
    return bool(keep_dims or keepdims)


def _moments(
    x: Array, weights: Array | None, axes: ReducedAxes, keep_dims: bool
) -> tuple[Array, Array]:
    axes = axes_to_reduce(axes, x.ndim)
    weights = prepare_weights(weights, x, axes)
    mean, var, _ = batch_moments(x, weights, axes)
    if keep_dims:
        mean, var = jnp.expand_dims(mean, axes), jnp.expand_dims(var, axes)
    return mean.astype(x.dtype), var.astype(x.dtype)


def sufficient_statistics(
    x: ArrayLike,
    axes: ReducedAxes,
    shift: ArrayLike | None = None,
    keep_dims: bool | None = None,
    name: str | None = None,
    keepdims: bool | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """`tf.nn.sufficient_statistics`: the count and the sums that moments follow from.

    Unlike `moments`, it uses the shift, and needs one near the mean to keep the digits of
    the variance.

    Args:
        x: Floating, of any shape.
        axes: The axis or axes to sum over.
        shift: Subtracted from x first; broadcast against x. None for 0.
        keep_dims: Whether the sums keep the axes, with size 1; False if not given.
        name: No effect: it named operations of the graph.
        keepdims: The newer spelling of keep_dims; give at most one of the two.

    Returns:
        `(count, mean_ss, var_ss, shift)`: the number of elements of each sum, the sums of
        x - shift and of its square, and the shift.

    Raises:
        TypeError: x is not floating; axes are not ints.
        ValueError: An axis is out of range or named twice; both spellings are given.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> x = jnp.array([[1.0], [3.0]])
        >>> print(*tf1.sufficient_statistics(x, [0]))
        2.0 [4.] [10.] None
    """
    x, kept = as_float(x), _kept(keep_dims, keepdims)
    axes = axes_to_reduce(axes, x.ndim)
    count = jnp.asarray(math.prod(x.shape[axis] for axis in axes), x.dtype)
    if shift is not None:
        shift = jnp.asarray(shift).astype(x.dtype)
        x = x - of_rank(shift, x.ndim)
    mean_ss = jnp.sum(x, axes, keepdims=kept)
    return count, mean_ss, jnp.sum(jnp.square(x), axes, keepdims=kept), shift


def normalize_moments(
    counts: ArrayLike,
    mean_ss: ArrayLike,
    variance_ss: ArrayLike,
    shift: ArrayLike | None,
    name: str | None = None,
) -> tuple[Array, Array]:
    """`tf.nn.normalize_moments`: the moments from what `sufficient_statistics` returned.

    Args:
        counts: The number of elements of each sum.
        mean_ss: The sum of x - shift.
        variance_ss: The sum of its square.
        shift: What was subtracted; None for nothing.
        name: No effect: it named operations of the graph.

    Returns:
        `(mean, variance)`. The variance is a difference of two numbers, which may come out
        negative where the shift is far from the mean.

    Raises:
        TypeError: The sums are of different dtypes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> print(tf1.normalize_moments(2.0, jnp.array(4.0), jnp.array(10.0), None))
        (Array(2., dtype=float32), Array(1., dtype=float32))
    """
    mean_ss, variance_ss = jnp.asarray(mean_ss), jnp.asarray(variance_ss)
    share = 1 / of_rank(jnp.asarray(counts).astype(mean_ss.dtype), mean_ss.ndim)
    shifted = mean_ss * share
    variance = variance_ss * share - jnp.square(shifted)
    if shift is None:
        return shifted, variance
    shift = jnp.asarray(shift).astype(mean_ss.dtype)
    ndim = max(shift.ndim, shifted.ndim)
    return of_rank(shifted, ndim) + of_rank(shift, ndim), variance
