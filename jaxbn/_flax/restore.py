"""Checkpoints: the check that a restored tree is one of this model, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from jaxbn._typing import Array


def fill(target: dict[Any, Any], saved: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the nested dict `target` with the leaves of `saved`, in target's dtypes.

    Raises:
        ValueError: `saved` lacks a leaf, has one more, or one of another shape.
    """
    leaves: dict[Any, Any] = flatten_dict(target, keep_empty_nodes=True)
    # A checkpoint may have turned the numbers of list items into strings.
    found: dict[str, Any] = {
        _name(path): leaf for path, leaf in flatten_dict(saved).items()
    }
    wanted = {_name(path) for path, leaf in leaves.items() if _is_leaf(leaf)}
    present = {name for name, leaf in found.items() if _is_leaf(leaf)}
    _check_names(wanted, present)
    different = [
        f"{_name(path)} has shape {jnp.shape(found[_name(path)])} in the checkpoint and "
        f"{jnp.shape(leaf)} in the model"
        for path, leaf in leaves.items()
        if _is_leaf(leaf) and jnp.shape(leaf) != jnp.shape(found[_name(path)])
    ]
    if different:
        raise ValueError(
            f"the checkpoint is of another model: {_some(different, '; ')}. Nothing was "
            "changed. Build the model as it was when the checkpoint was written."
        )
    return unflatten_dict(
        {
            path: _like(leaf, found[_name(path)]) if _is_leaf(leaf) else leaf
            for path, leaf in leaves.items()
        }
    )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _is_leaf(leaf: object) -> bool:
    return leaf is not None and leaf is not empty_node


def _check_names(wanted: set[str], present: set[str]) -> None:
    lacking, surplus = sorted(wanted - present), sorted(present - wanted)
    if not lacking and not surplus:
        return
    facts = []
    if lacking:
        facts.append(f"lacks {_some(lacking)}")
    if surplus:
        facts.append(f"holds {_some(surplus)}, which the model does not have")
    raise ValueError(
        f"the checkpoint is of another model: it {' and '.join(facts)}. Nothing was "
        "changed. Save params and batch_stats together, and build the model as it was then."
    )


def _some(facts: list[str], separator: str = ", ") -> str:
    """Returns the first few of what may be hundreds of leaves."""
    more = f"{separator}and {len(facts) - 5} more" if len(facts) > 5 else ""
    return separator.join(facts[:5]) + more


def _like(leaf: Any, found: Any) -> Array | Any:
    """Returns `found` in the dtype of the array `leaf`; other values as they are."""
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return found
    return jnp.asarray(found).astype(leaf.dtype)
