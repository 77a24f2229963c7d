"""The leaves of any normalizer under the names of their fields, as modules keep them."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxbn._layers.functions import InitApply
from jaxbn._modules.inputs import variable_shape
from jaxbn._typing import Axes, PyTree, Shape


def feature_axes_of(normalizer: InitApply[Any, Any]) -> Axes:
    """Returns the feature axes of a normalizer, which is free not to name any."""
    return getattr(normalizer, "feature_axes", -1)


def num_features_of(normalizer: InitApply[Any, Any], shape: Shape) -> int | Shape:
    """Returns what `normalizer.init` is to be called with for inputs of `shape`."""
    sizes = variable_shape(feature_axes_of(normalizer), shape)
    return sizes[0] if len(sizes) == 1 else sizes


def kinds_of(
    normalizer: InitApply[Any, Any], num_features: int | Shape, options: Mapping[str, Any]
) -> tuple[PyTree, PyTree]:
    """Returns the shapes of what `normalizer.init` returns, traced once for equal calls."""
    key = normalizer, num_features, tuple(options.items())
    try:
        hash(key)
    except TypeError:
        return _kinds_of.__wrapped__(*key)
    return _kinds_of(*key)


@functools.lru_cache(maxsize=1024)
def _kinds_of(normalizer: Any, num_features: Any, options: tuple[Any, ...]) -> Any:
    return jax.eval_shape(lambda: normalizer.init(num_features, **dict(options)))


def with_leaves(kind: PyTree, leaves: Iterable[Any]) -> Any:
    """Returns a tree of the structure of `kind`."""
    return jax.tree.unflatten(jax.tree.structure(kind), leaves)


def leaf_names(params: PyTree, state: PyTree) -> tuple[list[str], list[str]]:
    """Returns names for the leaves of both trees: their fields, such as scale and mean."""
    names = _names(params, "params"), _names(state, "state")
    every = [*names[0], *names[1]]
    if len(set(every)) != len(every):
        raise ValueError(
            "the params and the state of the normalizer have leaves of the same name: "
            f"{every}. Name the fields of both so that all differ."
        )
    return names


def _names(tree: PyTree, alone: str) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="_") or alone
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
