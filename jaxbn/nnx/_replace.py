"""NNX models that others wrote: their norms become those of jaxbn, in place."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._flax.changed import (
    SETTINGS,
    Changed,
    NormChange,
    check_settings_known,
    fits,
    nothing_found,
    shown,
)
from jaxbn._flax.core_call import positive
from jaxbn._flax.gathered_leaves import is_gathering
from jaxbn._layers import batch_norm
from jaxbn._layers.functions import InitApply
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._norm import Norm, assign, trees_of

Make = Callable[[batch_norm.BatchNorm], InitApply[Any, Any]]


def replace(
    model: nnx.Module, make: Make | None = None, *, only: Any = None, **changes: Any
) -> Changed:
    """Makes the norms of a model those of jaxbn, in place, with their variables.

    Every `flax.nnx.BatchNorm` becomes a `jaxbn.nnx.BatchNorm`, or, with `make`, a
    `jaxbn.nnx.Norm` of any normalizer. The layers stay the objects that they are, wherever
    the model holds them, and scale, bias and running statistics stay the same variables.

    Args:
        model: A module with norms of Flax or jaxbn.
        make: Returns the normalizer of a layer, given the `jaxbn.BatchNorm` with its
            settings: `jaxbn.BatchRenorm`, or `lambda bn: jaxbn.GhostBatchNorm(bn, 32)`. Its
            other statistics begin as after a data set of the layer's mean and variance.
        only: A pattern of the paths of the norms that are meant, such as `"encoder/*"`, or
            a filter of NNX for modules, such as `nnx.PathContains("encoder")`; None for
            all. A norm that is shared has the first of its paths.
        **changes: `momentum`, `epsilon`, `dtype`, `axis_name` or `axis_index_groups`, as
            `jaxbn.nnx.BatchNorm` takes them, to be changed.

    Returns:
        The norms that were changed, as a list that prints: where each is, what it was, and
        what it is.

    Raises:
        TypeError: A change is no such setting; make returns no normalizer.
        ValueError: There are no norms, or none that is meant; a norm gathers; a normalizer
            has no place for a scale or a bias of the layer, or a stack of layers would be
            given one. The model is untouched then.

    Example:
        >>> import jaxbn.nnx
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        >>> jaxbn.nnx.replace(model, axis_name="data")
        layers/1: flax.BatchNorm(momentum=0.99, epsilon=1e-05) ->
        jaxbn.BatchNorm(momentum=0.99, epsilon=1e-05, axis_name='data')
    """
    check_settings_known("replace", changes)
    norms = meant(model, only)
    made = [(path, old, _successor(old, make, changes)) for path, old in norms]
    changed = Changed()
    for path, old, new in made:
        now = shown(new) if isinstance(new, BatchNorm) else f"jaxbn.Norm({new.normalizer})"
        changed.append(NormChange(path, shown(old), now))
        become(old, new)
    return changed


def meant(model: nnx.Module, only: Any, more: tuple[type, ...] = ()) -> list[Any]:
    """Returns the batch norms of a model, and modules of `more`, once with their paths."""
    norms = list(_norms(model, more))
    if only is None:
        found = norms
    elif isinstance(only, str):
        found = [norm for norm in norms if fits(only, "/".join(map(str, norm[0])))]
    else:
        filtered = nnx.filterlib.to_predicate(only)
        found = [norm for norm in norms if filtered(*norm)]
    named = [("/".join(map(str, path)) or "the model", layer) for path, layer in found]
    if not named:
        raise nothing_found(("/".join(map(str, path)) for path, _ in norms), only)
    for path, layer in named:
        if is_gathering(functools.partial(hasattr, layer)):
            raise ValueError(
                f"the norm at {path} gathers, and would lose what it has gathered. Call "
                "jaxbn.nnx.track_gathered(model) first."
            )
    return named


def _norms(model: nnx.Module, more: tuple[type, ...]) -> Iterator[tuple[Any, Any]]:
    for path, node in nnx.iter_graph(model):
        # A subclass that computes something else is not replaced by what does not.
        ours = isinstance(node, (BatchNorm, *more))
        flax = isinstance(node, nnx.BatchNorm)
        if ours or (flax and type(node).__call__ is nnx.BatchNorm.__call__):
            yield path, node


def become(old: Any, new: nnx.Module) -> None:
    """Makes a layer another one without changing which object it is.

    Whatever refers to it then has the new layer: all modules that share it, lists, tuples.
    """
    vars(old).clear()
    vars(old).update(vars(new))
    object.__setattr__(old, "__class__", type(new))


def in_jaxbn(old: Any, **changes: Any) -> BatchNorm:
    """Returns a layer of jaxbn with the variables and the settings of a batch norm."""
    kept = "axis", "use_scale", "use_bias", "param_dtype", "use_running_average"
    settings = {name: getattr(old, name) for name in (*kept, *SETTINGS)}
    if hasattr(old, "promote_dtype"):
        settings["promote_dtype"] = old.promote_dtype
    new = BatchNorm(old.num_features, **{**settings, **changes}, rngs=nnx.Rngs(0))
    for name in ("mean", "var", "scale", "bias"):
        if getattr(old, name) is not None:
            setattr(new, name, getattr(old, name))
    if getattr(old, "frozen", False):
        new.frozen = True
    return new


def _successor(old: Any, make: Make | None, changes: dict[str, Any]) -> BatchNorm | Norm:
    layer = in_jaxbn(old, **changes)
    if make is None:
        return layer
    if not (callable(make) and (isinstance(make, type) or not hasattr(make, "init"))):
        raise TypeError(
            f"make must be a function of the settings of a norm, got {make}. Write "
            "lambda bn: ..., which returns a normalizer, or jaxbn.BatchRenorm."
        )
    normalizer = make(
        batch_norm.BatchNorm(
            feature_axes=layer.axis,
            momentum=layer.momentum,
            epsilon=positive(layer.epsilon),
            use_scale=layer.scale is not None,
            use_bias=layer.bias is not None,
            axis_name=layer.axis_name,
            axis_index_groups=layer.axis_index_groups,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
        )
    )
    _check_single(layer)
    new = Norm(
        normalizer, layer.num_features, use_running_average=layer.use_running_average
    )
    for name in ("scale", "bias"):
        _hand_on(getattr(layer, name), new, name)
    _, state, names = trees_of(new)
    if hasattr(state, "renewed"):
        # A bank of statistics begins with those of the layer in each of its domains.
        mean, var = (
            jnp.broadcast_to(variable[...], like.shape).astype(like.dtype)
            for variable, like in ((layer.mean, state.mean), (layer.var, state.var))
        )
        state = state.renewed(mean, var)
        for name, leaf in zip(names, jax.tree.leaves(state), strict=True):
            assign(getattr(new, name), leaf)
    for name in ("mean", "var"):
        _hand_on(getattr(layer, name), new, name)
    if layer.frozen:
        new.frozen = True
    return new


def _check_single(layer: BatchNorm) -> None:
    features = layer.num_features
    shape = layer.mean[...].shape
    if shape != (tuple(features) if isinstance(features, Sequence) else (features,)):
        raise ValueError(
            f"make does not know how norms under nnx.vmap are stacked: num_features is "
            f"{features}, and the mean has the shape {shape}. Call replace in the function "
            "that makes the layer, before nnx.vmap stacks it."
        )


def _hand_on(variable: Any, new: Norm, name: str) -> None:
    """Gives a module the variable itself, or, if its own is larger, copies of the array."""
    if variable is None:
        return
    if not hasattr(new, name):
        raise ValueError(
            f"the norm has a {name}, for which {new.normalizer} has no place. Make one "
            f"with a leaf called {name}."
        )
    own = getattr(new, name)
    if own[...].shape == variable[...].shape:
        setattr(new, name, variable)
    else:
        assign(own, jnp.broadcast_to(variable[...], own[...].shape).astype(own[...].dtype))
