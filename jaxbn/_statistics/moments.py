"""Mean, variance and count of a batch, and how those of two batches merge."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._axes import as_axes, reduction_axes
from jaxbn._compat import exported
from jaxbn._dtypes import as_float
from jaxbn._kernels.accelerator import divisor
from jaxbn._kernels.compensated import two_sum
from jaxbn._kernels.reduction import ExactMoments, exact_moments, hide_unweighted
from jaxbn._sharding import reshard_like, split_like
from jaxbn._statistics.weights import prepare_weights
from jaxbn._typing import Array, ArrayLike, Axes


@exported
class Moments(NamedTuple):
    """The moments of a batch, each of the shape of the features.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> batch = jaxbn.moments(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
        >>> print(batch.mean, batch.var, batch.count)
        [2. 0.] [1. 0.] [2. 2.]

    Attributes:
        mean: Weighted mean; 0 where `count` is 0.
        var: Weighted variance around `mean`, divided by `count` (biased), real and never
            negative; 0 where `count` is 0.
        count: Total weight: the number of elements where no weights are given.
    """

    mean: Array
    var: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]


def moments(
    x: ArrayLike, *, feature_axes: Axes = -1, weights: ArrayLike | None = None
) -> Moments:
    r"""Returns the mean, biased variance and count of every feature of `x`.

    .. math::
        n = \sum_i w_i, \quad
        \mu = \frac{1}{n} \sum_i w_i x_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i w_i |x_i - \mu|^2

    The sums accumulate in float32, or in x's dtype where that is wider. The variance is
    taken around the mean, so it keeps its digits when the mean is large: within 1e-5 of
    the exact value at mean / standard deviation = 1e4 in float32.

    Args:
        x: Floating or complex, of rank 2 or more.
        feature_axes: The axis or axes that keep statistics of their own.
        weights: None, or a boolean mask or non-negative sample weights: of x's rank and
            broadcastable to x, or of lower rank and aligned from the left with the axes
            that are averaged over. What has weight 0 may hold NaN or infinity.

    Returns:
        `Moments`, each array of the sizes of x's feature axes, in ascending order of axis.

    Raises:
        TypeError: x is of an integer or boolean dtype.
        ValueError: An axis is out of range or named twice, or no axis is left to average
            over; weights do not fit x, or are known to be negative.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.array([[1.0], [3.0], [jnp.nan]])
        >>> print(jaxbn.moments(x, weights=jnp.array([True, True, False])).mean)
        [2.]

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.

    Differs from Flax in the variance: Flax's default, E[x^2] - E[x]^2, is off by a factor
    of 23 at mean / standard deviation = 1e4. Differs from `tf.nn.weighted_moments` in
    that elements of weight 0 may be NaN.
    """
    x = as_float(x)
    axes = reduction_axes(as_axes(feature_axes), x.shape)
    return batch_moments(x, prepare_weights(weights, x, axes), axes)


@functools.partial(jax.jit, static_argnums=2)
def batch_moments(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Returns the moments of `x` over `axes`, given prepared weights."""
    weights = split_like(x, weights)
    x = x if weights is None else hide_unweighted(x, weights)
    batch = exact_moments(x, weights, axes)
    return Moments(*(jnp.squeeze(array, axes) for array in batch[:3]))


def as_exact(batch: Any) -> ExactMoments:
    """Returns `Moments`, or exact ones, as exact ones."""
    rest = batch.rest if hasattr(batch, "rest") else jnp.zeros_like(batch.mean)
    return ExactMoments(batch.mean, batch.var, batch.count, rest)


def pool_moments(parts: ExactMoments, *, averaged: bool = False) -> ExactMoments:
    """Returns the moments of all batches whose moments lie along the first axis.

    With `averaged`, the plain averages of the means and the variances, which leaves out how
    far the means lie apart.
    """
    count = parts.count.sum(0)
    share = parts.count / divisor(count)[None]
    if averaged:
        used = (parts.count > 0).astype(parts.count.dtype)
        share = used / jnp.maximum(used.sum(0), 1)[None]
        count = (share * parts.count).sum(0)
    # Around the rounded mean of all, so that what rounding left out of each is not lost.
    mixed = share.astype(parts.mean.dtype)
    around = (mixed * parts.mean).sum(0)
    apart = (parts.mean - around[None]) + parts.rest
    slip = (mixed * apart).sum(0)
    var = parts.var if averaged else parts.var + jnp.square(jnp.abs(apart))
    var = (share * var).sum(0)
    if not averaged:
        var = jnp.maximum(var - jnp.square(jnp.abs(slip)), 0)
    mean, rest = two_sum(around, slip)
    return ExactMoments(mean, var, count, rest)


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""Returns the moments of two batches taken as one.

    .. math::
        n = n_a + n_b, \quad
        \mu = \mu_a + \frac{n_b}{n} (\mu_b - \mu_a), \quad
        \sigma^2 = \frac{n_a}{n} \sigma_a^2 + \frac{n_b}{n} \sigma_b^2
            + \frac{n_a n_b}{n^2} |\mu_b - \mu_a|^2

    Associative and commutative up to rounding; a batch of count 0 changes nothing.

    Args:
        a: Moments of one batch.
        b: Moments of another, of the same shapes.

    Returns:
        `Moments` of all elements of both.

    Raises:
        ValueError: The two describe different numbers of features.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> halves = jaxbn.moments(x[:2]), jaxbn.moments(x[2:])
        >>> print(jaxbn.merge_moments(*halves).var, jaxbn.moments(x).var)
        [5. 5.] [5. 5.]

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.
    """
    if jnp.shape(a.mean) != jnp.shape(b.mean):
        raise ValueError(
            f"cannot merge moments of features {jnp.shape(a.mean)} with moments of "
            f"features {jnp.shape(b.mean)}. Take both from inputs with the same features."
        )
    b = Moments(
        *(reshard_like(jnp.asarray(new), old) for new, old in zip(b, a, strict=True))
    )
    count = a.count + b.count
    part = b.count / divisor(count)
    apart = b.mean - a.mean
    between = part * (1 - part) * jnp.square(jnp.abs(apart))
    mean = a.mean + part.astype(apart.dtype) * apart
    return Moments(mean, (1 - part) * a.var + part * b.var + between, count)
