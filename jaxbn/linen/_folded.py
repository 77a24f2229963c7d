"""What a linen layer does after `fold_tree` has folded it into its neighbour."""

import flax.linen as nn
import jax.numpy as jnp

from jaxbn._fold.affine import shifted
from jaxbn._typing import Array, Axes, DTypeLike


def is_folded(module: nn.Module) -> bool:
    """Tells whether the arrays of the layer went into the linear layer beside it."""
    return module.has_variable("batch_stats", "folded")


def call_folded(
    module: nn.Module, x: Array, training: bool | Array, axes: Axes, dtype: DTypeLike
) -> Array:
    """Returns `x` as it is, or with the bias that the linear layer could not take."""
    if training is not False:
        raise ValueError(
            f"the layer at /{'/'.join(module.path)} is folded into its neighbour and "
            "cannot train. Call the model in inference, or train with the variables from "
            "before fold_tree."
        )
    bias = None
    if module.has_variable("params", "bias"):
        bias = jnp.asarray(module.get_variable("params", "bias"))
    return shifted(x, bias, axes, dtype)
