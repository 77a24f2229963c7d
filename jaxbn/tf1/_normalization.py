"""TensorFlow's functions that normalize a tensor by given moments."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._dtypes import as_float
from jaxbn._kernels.normalize import normalize_aligned
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._typing import Array
from jaxbn._values.canonical import as_number
from jaxbn.tf1._arguments import DataFormat, feature_axis, of_rank
from jaxbn.tf1._implementation import Implementation, refuse_wide


def nn_batch_normalization(
    x: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    offset: ArrayLike | None,
    scale: ArrayLike | None,
    variance_epsilon: float,
    name: str | None = None,
) -> Array:
    r"""`tf.nn.batch_normalization`: normalizes by the moments that it is given.

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    TensorFlow computed x times a factor plus an offset in the dtype of x, and lost digits
    where the mean is large; here they are kept.

    Args:
        x: Floating, of any shape.
        mean: Of a shape that broadcasts against x, as are the others.
        variance: Likewise, non-negative.
        offset: Likewise, beta; None for 0.
        scale: Likewise, gamma; None for 1.
        variance_epsilon: Added to the variance inside the square root.
        name: No effect: it named operations of the graph.

    Returns:
        An array of the dtype of x.

    Raises:
        TypeError: x is not floating.
        ValueError: The shapes do not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> x, mean, variance = jnp.array([1.0, 3.0]), jnp.array(2.0), jnp.array(1.0)
        >>> print(tf1.nn_batch_normalization(x, mean, variance, None, None, 1e-12))
        [-1.  1.]
    """
    x = as_float(x)
    epsilon = as_number("variance_epsilon", variance_epsilon, "0.001 is usual.")
    given = (None if a is None else jnp.asarray(a) for a in (mean, variance, scale, offset))
    arrays = tuple(given)
    shapes = [x.shape, *(a.shape for a in arrays if a is not None)]
    try:
        shape = jnp.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            f"x, the moments and the parameters do not broadcast, got shapes {shapes}. "
            "Keep the reduced dimensions: tf1.moments(x, axes, keep_dims=True)."
        ) from None
    x = jnp.broadcast_to(x, shape)
    aligned = (None if a is None else of_rank(a, len(shape)) for a in arrays)
    return normalize_aligned(x, *aligned, epsilon=epsilon, dtype=None)


def fused_batch_norm(
    x: ArrayLike,
    scale: ArrayLike,
    offset: ArrayLike,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float = 0.001,
    data_format: DataFormat = "NHWC",
    is_training: bool = True,
    name: str | None = None,
) -> tuple[Array, Array, Array]:
    """`tf.nn.fused_batch_norm`: batch normalization of images in one kernel.

    It raised epsilon to 1.001e-5, and returned the unbiased variance although it normalizes
    with the biased one. No gradient flows through the moments that it returns.

    Args:
        x: Of rank 4, floating but not float64.
        scale: Gamma, of the shape (C,) of the channels.
        offset: Beta, likewise.
        mean: Likewise, the mean to normalize with; None in training.
        variance: Likewise.
        epsilon: Added to the variance inside the square root.
        data_format: "NHWC" or "NCHW".
        is_training: Whether to normalize with the moments of x.
        name: No effect: it named operations of the graph.

    Returns:
        `(y, batch_mean, batch_var)`. In inference the last two are `mean` and `variance`,
        where TensorFlow left them undefined.

    Raises:
        TypeError: x is float64 or not floating; is_training is not a bool.
        ValueError: x is not of rank 4; data_format is unknown; the moments are given in
            training, or missing in inference; a shape is not (C,).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> x = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
        >>> y, mean, variance = tf1.fused_batch_norm(x, jnp.ones(1), jnp.zeros(1))
        >>> print(mean, variance)
        [2.] [2.]
    """
    x = as_float(x)
    refuse_wide(x.dtype, "Use nn_batch_normalization, which takes any.")
    axis = feature_axis(data_format)
    if x.ndim != 4:
        raise ValueError(
            f"fused_batch_norm takes images of rank 4, got x of shape {x.shape}. Use "
            "moments and nn_batch_normalization for other ranks."
        )
    if (
        (mean is not None or variance is not None)
        if is_training
        else (mean is None or variance is None)
    ):
        raise ValueError(
            f"mean and variance must be {'None' if is_training else 'given'} with "
            f"is_training={is_training}. Training takes the moments of x, inference those "
            "that it is given."
        )
    epsilon = as_number("epsilon", epsilon, "0.001 is usual.")
    kernel = Implementation(fused=True, layer_class=False)
    # With momentum 0 the new state equals the moments of the batch.
    bn = BatchNorm(feature_axes=axis, momentum=0.0, epsilon=kernel.floor(epsilon), ddof=1)
    start = jnp.zeros(x.shape[axis])
    moments = BatchStats(
        *(start if a is None else jnp.asarray(a) for a in (mean, variance))
    )
    params = BatchNormParams(jnp.asarray(scale), jnp.asarray(offset))
    y, moments = bn.apply(params, moments, x, is_training)
    return y, moments.mean, moments.var
