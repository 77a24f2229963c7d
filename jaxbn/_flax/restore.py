"""Checkpoints: the check that a restored tree is one of this model, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict


def fill(target: dict[Any, Any], saved: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the nested dict `target` with the leaves of `saved`.

    They are of the dtypes and on the devices of the leaves of `target`, which may be
    abstract, from `jax.eval_shape`.

    Raises:
        ValueError: `saved` lacks a leaf, has one more, or one of another shape.
    """
    leaves: dict[Any, Any] = flatten_dict(target, keep_empty_nodes=True)
    # A checkpoint may have turned the numbers of list items into strings.
    wanted, found = _named(leaves), _named(flatten_dict(saved))
    if not wanted.keys() & found.keys():
        # Orbax writes a variable of an `nnx.State` as {"value": array}.
        found = {name.removesuffix("/value"): leaf for name, leaf in found.items()}
    facts = []
    if lacking := sorted(wanted.keys() - found.keys()):
        facts.append(f"lacks {_some(lacking)}")
    if surplus := sorted(found.keys() - wanted.keys()):
        facts.append(f"holds {_some(surplus)}, which the model does not have")
    if facts:
        raise ValueError(
            f"the checkpoint is of another model: it {' and '.join(facts)}. Nothing was "
            "changed. Save params and batch_stats together, and build the model as it was "
            "then."
        )
    different = [
        f"{name} has shape {jnp.shape(found[name])} in the checkpoint and "
        f"{jnp.shape(leaf)} in the model"
        for name, leaf in wanted.items()
        if jnp.shape(leaf) != jnp.shape(found[name])
    ]
    if different:
        raise ValueError(
            f"the checkpoint is of another model: {_some(different, '; ')}. Nothing was "
            "changed. Build the model as it was when the checkpoint was written."
        )
    placed = {name: _placed(found[name], leaf) for name, leaf in wanted.items()}
    return unflatten_dict(
        {path: placed.get(_name(path), leaf) for path, leaf in leaves.items()}
    )


def _named(leaves: dict[Any, Any]) -> dict[str, Any]:
    """Returns the leaves that are there, by their paths as users write them."""
    given = {path: leaf for path, leaf in leaves.items() if leaf is not None}
    return {_name(path): leaf for path, leaf in given.items() if leaf is not empty_node}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _some(facts: list[str], separator: str = ", ") -> str:
    """Returns the first few of what may be hundreds of leaves."""
    more = f"{separator}and {len(facts) - 5} more" if len(facts) > 5 else ""
    return separator.join(facts[:5]) + more


def _placed(found: Any, leaf: Any) -> Any:
    """Returns `found` as the array `leaf` is; what is no array of JAX, as it is."""
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return found
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return found
    # Cast on the host, so that no device holds more than its part of a sharded array.
    found = found if isinstance(found, jax.Array) else np.asarray(found)
    # An array that is not committed to its device stays free to follow others.
    sharding = leaf.sharding if getattr(leaf, "committed", True) else None
    return jax.device_put(found.astype(leaf.dtype), sharding)
