"""TensorFlow 1 spoken in JAX: its arguments, its variables and its numbers.

For code and checkpoints that were written for TensorFlow 1. Everything keeps the name and
the arguments that it had there, and gives the numbers of TensorFlow 1.15.5, up to rounding;
what was a variable is an entry of a dict that goes in and comes out.

Example:
    >>> import jax.numpy as jnp
    >>> from jaxbn import tf1
    >>> layer = tf1.batch_normalization(momentum=0.9)
    >>> params, state = layer.init((8, 3))
    >>> y, state = layer.apply(params, state, jnp.ones((8, 3)), training=True)
"""

from jaxbn.tf1._batch_norm import UPDATE_OPS, batch_norm
from jaxbn.tf1._batch_normalization import batch_normalization
from jaxbn.tf1._dropout import dropout
from jaxbn.tf1._layer import Layer
from jaxbn.tf1._moments import (
    moments,
    normalize_moments,
    sufficient_statistics,
    weighted_moments,
)
from jaxbn.tf1._moving_averages import (
    ExponentialMovingAverage,
    MovingAverage,
    assign_moving_average,
)
from jaxbn.tf1._normalization import fused_batch_norm, nn_batch_normalization

__all__ = [
    "UPDATE_OPS",
    "ExponentialMovingAverage",
    "Layer",
    "MovingAverage",
    "assign_moving_average",
    "batch_norm",
    "batch_normalization",
    "dropout",
    "fused_batch_norm",
    "moments",
    "nn_batch_normalization",
    "normalize_moments",
    "sufficient_statistics",
    "weighted_moments",
]

# Pickles and tracebacks then name the public module, whichever file defines a class.
for _name in __all__:
    if hasattr(_value := globals()[_name], "__module__"):
        _value.__module__ = __name__
