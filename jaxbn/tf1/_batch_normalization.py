"""`tf.layers.batch_normalization`, argument for argument."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxbn._typing import Array, Initializer, Shape
from jaxbn._values.canonical import as_flag
from jaxbn.tf1._arguments import check_decay, to_axes, to_limits
from jaxbn.tf1._implementation import Settings
from jaxbn.tf1._layer import Constraint, Layer, Regularizer


def batch_normalization(
    *,
    axis: int | list[int] = -1,
    momentum: float | Array = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Initializer | None = None,
    gamma_initializer: Initializer | None = None,
    moving_mean_initializer: Initializer | None = None,
    moving_variance_initializer: Initializer | None = None,
    beta_regularizer: Regularizer | None = None,
    gamma_regularizer: Regularizer | None = None,
    beta_constraint: Constraint | None = None,
    gamma_constraint: Constraint | None = None,
    training: bool | Array = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: bool | None = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_momentum: float = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Callable[[Shape], tuple[Array, Array]] | None = None,
) -> Layer:
    """Returns the layer that `tf.layers.batch_normalization` applied to its inputs.

    Args:
        axis: The axis of the features, or a list of several; 1 for channels first.
        momentum: The decay of the moving statistics; may be traced.
        epsilon: Added to the variance inside the square root.
        center: Whether there is a beta, which is added.
        scale: Whether there is a gamma, which is multiplied by.
        beta_initializer: `(key, shape, dtype) -> array`, as `jax.nn.initializers` has
            them; None for zeros.
        gamma_initializer: Likewise; None for ones.
        moving_mean_initializer: Likewise; None for zeros.
        moving_variance_initializer: Likewise; None for ones.
        beta_regularizer: A function from beta to its loss, for `Layer.penalty`.
        gamma_regularizer: The same for gamma.
        beta_constraint: A function from beta to its projection, for `Layer.project`.
        gamma_constraint: The same for gamma.
        training: Whether to normalize with the moments of the batch; may be traced, as a
            placeholder was fed. False by default: with it, nothing is learned by the
            moving statistics. `Layer.apply` takes it as well.
        trainable: With False, TensorFlow made no update operations: training still
            normalizes with the moments of the batch, but the moving statistics stay.
        name: No effect: variables live in the dicts of the caller, under its keys.
        reuse: No effect: to share variables, apply one layer to them twice.
        renorm: Whether to correct the batch towards the moving statistics. The first
            statistics count in full, so the first step is not plain normalization.
        renorm_clipping: A dict of "rmax", "rmin" and "dmax", whose values may be traced;
            what is missing does not limit. None limits nothing.
        renorm_momentum: The decay of the statistics of renorm.
        fused: False for the plain computation. Otherwise, inputs of rank 4 with the
            features along axis 1 or 3 went through the fused kernel, unless renorm,
            virtual_batch_size or adjustment was given, even where True asked for it: it
            tracks the unbiased variance, and raises epsilon to 1.001e-5.
        virtual_batch_size: Rows of the ghost batches that are normalized separately. Ghost
            batch j of G holds rows j, j + G, j + 2G, ...; the averages of their moments
            are tracked. It must divide the batch in inference, too.
        adjustment: A function of the shape of the inputs that returns `(scale, bias)`: in
            training, the normalized x becomes x * scale + bias before gamma and beta. The
            shapes broadcast as NumPy's do. It is not called for a constant
            training=False.

    Returns:
        A `Layer`.

    Raises:
        TypeError: axis is neither an int nor a list.
        ValueError: momentum lies outside [0, 1]; renorm_clipping has another key, or a
            limit out of its range: rmax below 1, rmin outside [0, 1], dmax below 0;
            virtual_batch_size is not positive, or comes with an adjustment.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> layer = tf1.batch_normalization(momentum=0.9)
        >>> params, state = layer.init((32, 8, 8, 64))
        >>> x = jnp.ones((32, 8, 8, 64))
        >>> y, state = layer.apply(params, state, x, training=True)
        >>> {name: array.shape for name, array in params.items()}
        {'gamma': (64,), 'beta': (64,)}
    """
    momentum = check_decay("momentum", momentum)
    check_decay("renorm_momentum", renorm_momentum)
    renorm, trainable = as_flag("renorm", renorm), as_flag("trainable", trainable)
    fused = None if fused is None else as_flag("fused", fused)
    if virtual_batch_size is not None and adjustment is not None:
        raise ValueError(
            f"virtual_batch_size={virtual_batch_size} comes with an adjustment, which "
            "TensorFlow did not combine. Drop one of them."
        )
    limits = to_limits(renorm_clipping) if renorm else None
    fusable = not renorm and virtual_batch_size is None and adjustment is None
    settings = Settings(
        axes=to_axes(axis),
        epsilon=epsilon,
        center=center,
        scale=scale,
        fused=fused is not False and fusable,
        renorm_decay=renorm_momentum if renorm else None,
        virtual_batch_size=virtual_batch_size,
    )
    return Layer(
        settings=settings,
        decay=momentum,
        training=training,
        trainable=trainable,
        limits=limits,
        initializers={
            "beta": beta_initializer,
            "gamma": gamma_initializer,
            "moving_mean": moving_mean_initializer,
            "moving_variance": moving_variance_initializer,
        },
        regularizers={"beta": beta_regularizer, "gamma": gamma_regularizer},
        constraints={"beta": beta_constraint, "gamma": gamma_constraint},
        adjustment=adjustment,
    )
