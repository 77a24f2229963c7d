"""Variables of linen models drawn by NumPy: JAX would compile for each shape."""

import jax
import jax.numpy as jnp
import numpy as np


def draw_variables(model, *arguments, seed=0, **options):
    """Returns what `model.init` makes, its kernels from another generator."""
    rng = np.random.default_rng(seed)
    kinds = jax.eval_shape(
        lambda key: model.init(key, *arguments, **options), jax.random.key(0)
    )

    def draw(path, kind):
        name = path[-1].key
        if name != "kernel":
            return jnp.full(kind.shape, float(name in ("scale", "var")), kind.dtype)
        fan_in = np.prod(kind.shape[:-1])
        return jnp.asarray(rng.normal(size=kind.shape) / np.sqrt(fan_in), kind.dtype)

    return jax.tree.map_with_path(draw, kinds)
