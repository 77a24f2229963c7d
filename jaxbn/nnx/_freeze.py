"""NNX models whose norms are frozen: in inference, whatever mode the model is in."""

from typing import Any

from flax import nnx

from jaxbn._flax.changed import Changed, NormChange
from jaxbn.nnx._norm import Norm, Switchable, told_if_captured
from jaxbn.nnx._replace import become, in_jaxbn, meant


def freeze(model: nnx.Module, only: Any = None) -> Changed:
    """Lets norms of a model normalize with their running statistics and keep those.

    Until `unfreeze`, neither `model.train()`, nor `nnx.view`, nor a mode in the call, nor
    `reestimate` changes that. Scale and bias are trained on, unless the optimizer leaves
    them out. A norm of Flax becomes one of jaxbn first, with the same variables.

    Args:
        model: A module with norms of Flax or jaxbn.
        only: As for `replace`: which norms are meant; None for all.

    Returns:
        The norms that are meant, as a list that prints.

    Raises:
        ValueError: There are no norms, or none that is meant; one gathers.

    Example:
        >>> import jax.numpy as jnp, jaxbn.nnx
        >>> from flax import nnx
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> jaxbn.nnx.freeze(model)
        the model: flax.BatchNorm -> frozen
        >>> model.train()
        >>> y = model(jnp.array([[1.0], [3.0]]))
        >>> print(y.round(2).ravel(), model.mean[...])
        [1. 3.] [0.]

    Differs from `model.eval()`, which the next `model.train()` undoes.
    """
    norms = meant(model, only, (Norm,))
    changed = Changed(NormChange(path, _kind(layer), "frozen") for path, layer in norms)
    for _, layer in norms:
        if not isinstance(layer, Switchable):
            become(layer, in_jaxbn(layer))
        with told_if_captured("a model to freeze"):
            layer.frozen = True
    return changed


def unfreeze(model: nnx.Module, only: Any = None) -> Changed:
    """Undoes `freeze`: norms follow the mode of the model again, in place.

    Args:
        model: A module with frozen norms.
        only: As for `replace`: which norms are meant; None for all.

    Returns:
        The norms that were frozen, as a list that prints.

    Raises:
        ValueError: There are no norms, or none that is meant and frozen.

    Example:
        >>> import jaxbn.nnx
        >>> from flax import nnx
        >>> model = jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> frozen = jaxbn.nnx.freeze(model)
        >>> jaxbn.nnx.unfreeze(model)
        the model: frozen -> jaxbn.BatchNorm
    """
    norms = [
        (path, layer)
        for path, layer in meant(model, only, (Norm,))
        if getattr(layer, "frozen", False)
    ]
    if not norms:
        raise ValueError(
            "none of these norms is frozen. Pass the model that jaxbn.nnx.freeze was "
            "called for, and the filter of that call."
        )
    for _, layer in norms:
        del layer.frozen
    return Changed(NormChange(path, "frozen", _kind(layer)) for path, layer in norms)


def _kind(layer: Any) -> str:
    if getattr(layer, "frozen", False):
        return "frozen"
    return f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}"
