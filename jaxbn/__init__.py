"""Batch normalization for JAX: pure functions over explicit params and state.

Example:
    >>> import jax.numpy as jnp, jaxbn
    >>> bn = jaxbn.BatchNorm(momentum=0.9)
    >>> params, state = bn.init(3)
    >>> y, state = bn.apply(params, state, jnp.ones((8, 3)), training=True)
"""

import lazy_loader

__version__ = "0.1.0"

# A room is loaded when one of its names is used first: `import jaxbn` takes no time.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
