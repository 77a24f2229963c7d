"""Checkpoints: the check that a restored tree is one of this model, leaf by leaf."""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from jaxbn._compat import concrete_mesh
from jaxbn._dtypes import at_least_float32


class Left(NamedTuple):
    """What a partial restore left alone, by the paths of the leaves.

    Attributes:
        kept: Leaves of the model that kept what they were.
        unused: Leaves of the checkpoint that the model has no use for.
    """

    kept: tuple[str, ...]
    unused: tuple[str, ...]


def read(saved: Any) -> Any:
    """Returns the tree of `saved`, which may be what `flax.serialization` wrote."""
    if isinstance(saved, (bytes, bytearray)):
        saved = serialization.msgpack_restore(bytes(saved))
    if saved is None or isinstance(saved, (str, int, float)):
        raise TypeError(
            f"saved must be the tree of a checkpoint, got {saved!r}. Pass what Orbax "
            "restored, the tree that was saved, or the bytes of flax.serialization."
        )
    return saved


def fill(
    target: Mapping[Any, Any],
    saved: Mapping[Any, Any],
    *,
    strict: bool,
    is_statistic: Callable[[tuple[Any, ...]], bool],
) -> tuple[dict[Any, Any], Left]:
    """Returns the nested dict `target` with the leaves of `saved`, and what was left.

    They are of the dtypes and on the devices of the leaves of `target`, which may be
    abstract, from `jax.eval_shape`. Running statistics are float32 or wider.

    Raises:
        ValueError: `saved` lacks a leaf, has one more, or one of another shape, and
            `strict`; or a value does not fit the dtype of its leaf.
    """
    leaves: dict[Any, Any] = flatten_dict(target, keep_empty_nodes=True)
    given: dict[Any, Any] = flatten_dict(saved)
    paths = _by_name(leaves)
    wanted = {name: leaves[path] for name, path in paths.items()}
    found = {name: given[path] for name, path in _by_name(given).items()}
    for name in wanted.keys() & found.keys():
        found[name] = _as_key(found[name], wanted[name])
    lacking = sorted(wanted.keys() - found.keys())
    surplus = sorted(found.keys() - wanted.keys())
    different = sorted(
        name
        for name in wanted.keys() & found.keys()
        if jnp.shape(wanted[name]) != jnp.shape(found[name])
    )
    if strict:
        _check_same_model(wanted, found, lacking, surplus, different)
    used = wanted.keys() - {*lacking, *different}
    if not used and wanted:
        raise ValueError(
            f"the checkpoint is of another model: it holds {_some(surplus) or 'nothing'}, "
            f"of which the model has no leaf. Its leaves are {_some(sorted(wanted))}."
        )
    for name in sorted(used):
        value = _placed(name, found[name], wanted[name], is_statistic(paths[name]))
        leaves[paths[name]] = value
    left = Left((*lacking, *different), (*surplus, *different))
    return unflatten_dict(leaves), left


def _check_same_model(
    wanted: dict[str, Any],
    found: dict[str, Any],
    lacking: list[str],
    surplus: list[str],
    different: list[str],
) -> None:
    facts = []
    if lacking:
        facts.append(f"lacks {_some(lacking)}")
    if surplus:
        facts.append(f"holds {_some(surplus)}, which the model does not have")
    if facts:
        raise ValueError(
            f"the checkpoint is of another model: it {' and '.join(facts)}. Nothing was "
            "changed. Save params and batch_stats together, and build the model as it was "
            "then; strict=False restores what both have."
        )
    shapes = [
        f"{name} has shape {jnp.shape(found[name])} in the checkpoint and "
        f"{jnp.shape(wanted[name])} in the model"
        for name in different
    ]
    if shapes:
        raise ValueError(
            f"the checkpoint is of another model: {_some(shapes, '; ')}. Nothing was "
            "changed. Build the model as it was when the checkpoint was written; "
            "strict=False leaves these out."
        )


def _by_name(leaves: dict[Any, Any]) -> dict[str, tuple[Any, ...]]:
    """Returns the paths of the leaves that are there, by their names as users write them.

    Orbax writes a variable of an `nnx.State` as {"value": array}, a boxed param of linen is
    written likewise, and the numbers of list items may have become strings.
    """
    there = [
        path for path, leaf in leaves.items() if leaf is not None and leaf is not empty_node
    ]
    sizes = collections.Counter(path[:end] for path in there for end in range(len(path)))

    def bare(path: tuple[Any, ...]) -> tuple[Any, ...]:
        boxed = len(path) > 1 and path[-1] in ("value", "raw_value")
        return bare(path[:-1]) if boxed and sizes[path[:-1]] == 1 else path

    return {"/".join(map(str, bare(path))): path for path in there}


def _some(facts: list[str], separator: str = ", ") -> str:
    """Returns the first few of what may be hundreds of leaves."""
    more = f"{separator}and {len(facts) - 5} more" if len(facts) > 5 else ""
    return separator.join(facts[:5]) + more


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _as_key(found: Any, leaf: Any) -> Any:
    """Returns the numbers of a random key, which not every format keeps, as a key."""
    if not _is_key(leaf) or _is_key(found):
        return found
    impl = jax.random.key_impl(leaf) if isinstance(leaf, jax.Array) else None
    return jax.random.wrap_key_data(jnp.asarray(found), impl=impl)


def _placed(name: str, found: Any, leaf: Any, statistic: bool) -> Any:
    """Returns `found` as the array `leaf` is; what is no array, as it is."""
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray)):
        return jnp.asarray(found) if isinstance(found, np.ndarray) else found
    if _is_key(leaf):
        return found
    dtype = jnp.dtype(leaf.dtype)
    if statistic and jnp.issubdtype(dtype, jnp.inexact):
        # A running average in half precision stalls: its steps are below its last digit.
        dtype = at_least_float32(dtype)
    # Cast on the host, so that no device holds more than its part of a sharded array.
    found = found if isinstance(found, jax.Array) else np.asarray(found)
    return jax.device_put(_cast(name, found, dtype), _sharding_of(name, leaf))


def _cast(name: str, found: Any, dtype: jnp.dtype) -> Any:
    """Returns `found` in `dtype`, or refuses to lose more than digits."""
    if found.dtype == dtype:
        return found
    ranks = jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating
    kinds = [
        next((rank for rank, kind in enumerate(ranks) if jnp.issubdtype(each, kind)), 4)
        for each in (found.dtype, dtype)
    ]
    with np.errstate(over="ignore"):
        cast = found.astype(dtype) if kinds[0] <= kinds[1] else None
    numpy: Any = jnp if isinstance(found, jax.Array) else np
    if cast is not None and kinds[0] < 2:
        fits = (cast.astype(found.dtype) == found).all() if kinds[1] < 2 else True
    elif cast is not None:
        fits = (numpy.isfinite(cast) == numpy.isfinite(found)).all()
    else:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} is {found.dtype} in the checkpoint and {dtype} in the model, in which "
            "its values do not fit. Nothing was changed. Make the model with the dtype of "
            "the checkpoint, or convert the checkpoint first."
        )
    return cast


def _sharding_of(name: str, leaf: Any) -> Any:
    """Returns where an array like `leaf` is to be, or None for wherever JAX puts it."""
    # An array that is not committed to its device stays free to follow others.
    sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
    abstract = getattr(sharding, "mesh", None)
    if not isinstance(abstract, jax.sharding.AbstractMesh):
        return sharding
    # What was traced knows the axes of its mesh, but not the devices.
    mesh = concrete_mesh()
    if mesh is None or mesh.abstract_mesh != abstract:
        raise ValueError(
            f"{name} of the abstract model is sharded over {abstract}, whose devices "
            "nothing tells. Call restore within jax.set_mesh(mesh), or give the leaves "
            "of the model the sharding of a mesh of devices."
        )
    return jax.sharding.NamedSharding(mesh, getattr(sharding, "spec"))  # noqa: B009
