"""Batch norms of other libraries: their arrays and files in, values of jaxbn out, and back.

Example:
    >>> import jax.numpy as jnp, numpy as np
    >>> from jaxbn import convert
    >>> state_dict = {
    ...     "bn1.weight": np.ones(3, np.float32),
    ...     "bn1.bias": np.zeros(3, np.float32),
    ...     "bn1.running_mean": np.zeros(3, np.float32),
    ...     "bn1.running_var": np.ones(3, np.float32),
    ... }
    >>> layer = convert.find_torch(state_dict).layers["bn1"]
    >>> x = jnp.ones((2, 3, 4, 4))
    >>> y, state = layer.bn.apply(layer.params, layer.state, x, training=True)
"""

from jaxbn._layers.ema_batch_norm import EmaBatchNorm
from jaxbn.convert._checkpoint import Checkpoint
from jaxbn.convert._converted import Converted
from jaxbn.convert._equinox import find_equinox, from_equinox, to_equinox
from jaxbn.convert._files import CheckpointError, load, read, save
from jaxbn.convert._flax import find_flax, from_flax, to_flax
from jaxbn.convert._haiku import find_haiku, from_haiku, to_haiku
from jaxbn.convert._keras import find_keras, from_keras, to_keras
from jaxbn.convert._tf1 import find_tf1, from_tf1, to_tf1
from jaxbn.convert._torch import find_torch, from_torch, to_torch
from jaxbn.convert._whole_model import Found

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Converted",
    "EmaBatchNorm",
    "Found",
    "find_equinox",
    "find_flax",
    "find_haiku",
    "find_keras",
    "find_tf1",
    "find_torch",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_tf1",
    "from_torch",
    "load",
    "read",
    "save",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_tf1",
    "to_torch",
]

# Pickles and tracebacks then name the public module, whichever file defines a class.
for _name in __all__:
    globals()[_name].__module__ = __name__
