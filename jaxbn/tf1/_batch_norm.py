"""`tf.contrib.layers.batch_norm`, argument for argument."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import ArrayLike

from jaxbn._typing import Array, Initializer, Shape
from jaxbn._values.canonical import as_flag
from jaxbn.tf1._arguments import DataFormat, check_decay, feature_axis, to_limits
from jaxbn.tf1._implementation import Settings
from jaxbn.tf1._layer import Layer, Regularizer

UPDATE_OPS = "update_ops"


def batch_norm(
    *,
    decay: float | Array = 0.999,
    center: bool = True,
    scale: bool = False,
    epsilon: float = 0.001,
    activation_fn: Callable[[Array], Array] | None = None,
    param_initializers: Mapping[str, Initializer] | None = None,
    param_regularizers: Mapping[str, Regularizer] | None = None,
    updates_collections: str | None = UPDATE_OPS,
    is_training: bool | Array = True,
    reuse: bool | None = None,
    variables_collections: Any = None,
    outputs_collections: Any = None,
    trainable: bool = True,
    batch_weights: ArrayLike | None = None,
    fused: bool | None = None,
    data_format: DataFormat = "NHWC",
    zero_debias_moving_mean: bool = False,
    scope: Any = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_decay: float = 0.99,
    adjustment: Callable[[Shape], tuple[Array, Array]] | None = None,
) -> Layer:
    """Returns the layer that `tf.contrib.layers.batch_norm` applied to its inputs.

    TensorFlow had three paths through it, with different numbers:

    * fused: inputs of rank 2, with nothing else said, and inputs of rank 4 with
      zero_debias_moving_mean or other updates_collections. Unbiased moving variance,
      epsilon at least 1.001e-5, no float64. For fused=None and True, without
      batch_weights, renorm and adjustment.
    * that of `batch_normalization`, with its rules: otherwise, without batch_weights,
      zero_debias_moving_mean and other updates_collections.
    * legacy: otherwise. Biased moving variance, variables in the dtype of the inputs;
      param_regularizers and adjustment were silently ignored, and are.

    Args:
        decay: The decay of the moving statistics; may be traced.
        center: Whether there is a beta, which is added.
        scale: Whether there is a gamma, which is multiplied by. Off by default.
        epsilon: Added to the variance inside the square root.
        activation_fn: Applied last.
        param_initializers: A dict of initializers `(key, shape, dtype) -> array` for
            "beta", "gamma", "moving_mean" and "moving_variance".
        param_regularizers: A dict of functions from "beta" or "gamma" to its loss, for
            `Layer.penalty`.
        updates_collections: Not where the updates go, as there is no graph: take the new
            state of `Layer.apply` to update at once, as None did, or call
            `Layer.run_updates` later. It decides the path.
        is_training: Whether to normalize with the moments of the batch; may be traced.
            `Layer.apply` takes it as well.
        reuse: No effect: to share variables, apply one layer to them twice.
        variables_collections: No effect: variables live in the dicts of the caller.
        outputs_collections: No effect: the output is returned.
        trainable: Only on the path of `batch_normalization`, False freezes the moving
            statistics, as it does there; the others track them all the same.
        batch_weights: Weights of the rows, of shape (N,); may be traced. They act on the
            moments in training; all rows are normalized.
        fused: False for the plain computation.
        data_format: "NHWC" for features along the last axis, "NCHW" for axis 1, at any
            rank.
        zero_debias_moving_mean: Whether the moving mean is an average from zero divided by
            1 - decay ** steps. It forgets its initial value; the variance does not.
        scope: No effect: variables live in the dicts of the caller, under its keys.
        renorm: As for `batch_normalization`.
        renorm_clipping: As for `batch_normalization`.
        renorm_decay: The decay of the statistics of renorm.
        adjustment: As for `batch_normalization`.

    Returns:
        A `Layer`.

    Raises:
        ValueError: decay lies outside [0, 1]; data_format is unknown; renorm comes with
            batch_weights, other updates_collections or zero_debias_moving_mean;
            renorm_clipping is not as `batch_normalization` needs it.

    Warns:
        UserWarning: param_regularizers or adjustment are given for the legacy path.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> layer = tf1.batch_norm(decay=0.9, activation_fn=jax.nn.relu)
        >>> params, state = layer.init((8, 3))
        >>> y, state = layer.apply(params, state, jnp.arange(24.0).reshape(8, 3))
        >>> print(sorted(params), float(y.min()))
        ['beta'] 0.0
    """
    decay = check_decay("decay", decay)
    check_decay("renorm_decay", renorm_decay)
    renorm, trainable = as_flag("renorm", renorm), as_flag("trainable", trainable)
    fused = None if fused is None else as_flag("fused", fused)
    name = "zero_debias_moving_mean"
    zero_debias_moving_mean = as_flag(name, zero_debias_moving_mean)
    lacking = {
        "batch_weights": batch_weights is not None,
        "updates_collections": updates_collections != UPDATE_OPS,
        "zero_debias_moving_mean": zero_debias_moving_mean,
    }
    given = [name for name, is_given in lacking.items() if is_given]
    if renorm and given:
        raise ValueError(
            f"renorm=True comes with {' and '.join(given)}, which TensorFlow did not "
            "combine. Drop renorm, or leave these at their defaults."
        )
    limits = to_limits(renorm_clipping) if renorm else None
    fusable = not renorm and batch_weights is None and adjustment is None
    settings = Settings(
        axes=feature_axis(data_format),
        epsilon=epsilon,
        center=center,
        scale=scale,
        fused=fused is not False and fusable,
        renorm_decay=renorm_decay if renorm else None,
        contrib=True,
        class_suffices=not given,
        zero_debias=zero_debias_moving_mean,
    )
    if settings.implementation(2).legacy:
        _warn_of_dropped(param_regularizers=param_regularizers, adjustment=adjustment)
    return Layer(
        settings=settings,
        decay=decay,
        training=is_training,
        trainable=trainable,
        limits=limits,
        initializers=dict(param_initializers or {}),
        regularizers=dict(param_regularizers or {}),
        adjustment=adjustment,
        batch_weights=batch_weights,
        activation_fn=activation_fn,
    )


def _warn_of_dropped(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if argument:
            warnings.warn(
                f"{name} has no effect, as in TensorFlow, which ignored it with "
                "batch_weights, and with fused=False or an adjustment beside other "
                "updates_collections or zero_debias_moving_mean. Drop it, or these.",
                UserWarning,
                stacklevel=3,
            )
