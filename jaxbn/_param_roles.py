"""Tells what each array of a model is for: the scale of a norm, a bias, a statistic."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._norm_names import NORM_LAYERS, names_of_role
from jaxbn._state import BatchNormParams
from jaxbn._typing import PyTree

# Haiku's linear layers and convolutions call theirs w and b.
_SCALES = {*names_of_role("scale"), "w"}
# A kernel is never called so.
_SURE_SCALES = {"scale", "gamma"}
_BIASES = {*names_of_role("bias"), "b"}
_STATS = {*names_of_role("mean"), *names_of_role("var")}
_NORM_NAME = re.compile(rf"{NORM_LAYERS}|(?<![a-z])(ln|gn|rms)(?![a-z])", re.IGNORECASE)
# Wrappers of other layers, whose arrays are the kernels of these.
_NO_NORM = re.compile(r"weight_?norm|spectral_?norm", re.IGNORECASE)


def map_roles(function: Callable[..., Any], params: PyTree, *rest: PyTree) -> PyTree:
    """Maps `function(role, leaf, ...)` over the leaves of `params`.

    A role is scale, norm bias, bias, stat, lone scale (that of no norm) or other.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(params)
    ours = {
        names_of(path)
        for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_ours)
        if _is_ours(node)
    }
    if len(pairs) == 1 and not pairs[0][0]:
        raise TypeError(
            "params must be a tree, got a single array, whose role nothing tells. Pass the "
            "params of the model, with their names."
        )
    names = [names_of(path) for path, _ in pairs]
    layers: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, (_, leaf) in zip(names, pairs, strict=True):
        layers.setdefault(name[:-1], {})[name[-1]] = leaf
    leaves = zip(*map(jax.tree.leaves, (params, *rest)), strict=True)
    return jax.tree.unflatten(
        structure,
        [
            function(_role(name, layers[name[:-1]], name[:-1] in ours), *parts)
            for name, parts in zip(names, leaves, strict=True)
        ],
    )


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the names along a path of a pytree, without those that NNX adds."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    # A variable of NNX is a node of the path, below which its array lies.
    while len(names) > 1 and names[-1] in ("value", "raw_value"):
        names.pop()
    return tuple(names)


def _is_ours(node: Any) -> bool:
    return isinstance(node, BatchNormParams)


def _role(name: tuple[str, ...], layer: dict[str, Any], ours: bool) -> str:
    last = name[-1]
    if _tracked(layer) and last in _STATS:
        return "stat"
    if last not in _SCALES | _BIASES:
        return "other"
    if ours or _is_norm(name[:-1], layer):
        return "scale" if last in _SCALES else "norm bias"
    if last in _SURE_SCALES and layer.keys() <= _SURE_SCALES:
        return "lone scale"
    return "bias" if last in _BIASES else "other"


def _is_norm(path: tuple[str, ...], layer: dict[str, Any]) -> bool:
    """Tells whether the arrays of one node of the tree are those of a norm."""
    if not layer.keys() <= _SCALES | _BIASES | _STATS:
        return False
    # A scale with nothing beside it may be a LayerScale, a temperature or a gate.
    if _tracked(layer) or (layer.keys() & _SURE_SCALES and layer.keys() & _BIASES):
        return True
    named = path[-1] if path else ""
    if _NORM_NAME.search(named) and not _NO_NORM.search(named):
        return True
    scales = [layer[key] for key in ("weight", "w") if key in layer]
    biases = [layer[key] for key in _BIASES if key in layer]
    return bool(scales and biases) and jnp.shape(scales[0]) == jnp.shape(biases[0])


def _tracked(layer: dict[str, Any]) -> bool:
    """Tells whether a node holds a running mean and variance."""
    return len(layer.keys() & _STATS) >= 2
