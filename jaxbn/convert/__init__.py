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

from jaxbn._layers.ema_batch_norm import EmaBatchNorm as EmaBatchNorm
from jaxbn.convert._converted import Converted as Converted
from jaxbn.convert._equinox import find_equinox as find_equinox
from jaxbn.convert._equinox import from_equinox as from_equinox
from jaxbn.convert._equinox import to_equinox as to_equinox
from jaxbn.convert._files import CheckpointError as CheckpointError
from jaxbn.convert._files import load as load
from jaxbn.convert._files import save as save
from jaxbn.convert._flax import find_flax as find_flax
from jaxbn.convert._flax import from_flax as from_flax
from jaxbn.convert._flax import to_flax as to_flax
from jaxbn.convert._haiku import find_haiku as find_haiku
from jaxbn.convert._haiku import from_haiku as from_haiku
from jaxbn.convert._haiku import to_haiku as to_haiku
from jaxbn.convert._keras import find_keras as find_keras
from jaxbn.convert._keras import from_keras as from_keras
from jaxbn.convert._keras import to_keras as to_keras
from jaxbn.convert._tf1 import find_tf1 as find_tf1
from jaxbn.convert._tf1 import from_tf1 as from_tf1
from jaxbn.convert._tf1 import to_tf1 as to_tf1
from jaxbn.convert._torch import find_torch as find_torch
from jaxbn.convert._torch import from_torch as from_torch
from jaxbn.convert._torch import to_torch as to_torch
from jaxbn.convert._whole_model import Found as Found
