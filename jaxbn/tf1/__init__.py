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

from jaxbn.tf1._batch_norm import UPDATE_OPS as UPDATE_OPS
from jaxbn.tf1._batch_norm import batch_norm as batch_norm
from jaxbn.tf1._batch_normalization import batch_normalization as batch_normalization
from jaxbn.tf1._dropout import dropout as dropout
from jaxbn.tf1._layer import Layer as Layer
from jaxbn.tf1._moments import moments as moments
from jaxbn.tf1._moments import normalize_moments as normalize_moments
from jaxbn.tf1._moments import sufficient_statistics as sufficient_statistics
from jaxbn.tf1._moments import weighted_moments as weighted_moments
from jaxbn.tf1._moving_averages import ExponentialMovingAverage as ExponentialMovingAverage
from jaxbn.tf1._moving_averages import MovingAverage as MovingAverage
from jaxbn.tf1._moving_averages import assign_moving_average as assign_moving_average
from jaxbn.tf1._normalization import fused_batch_norm as fused_batch_norm
from jaxbn.tf1._normalization import nn_batch_normalization as nn_batch_normalization
