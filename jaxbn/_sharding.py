"""Where values live on a mesh, as far as their types tell: varying axes and shardings."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._compat import (
    cast_to_varying,
    is_traced,
    traced_kind,
    varying_axes,
    varying_axes_of,
)
from jaxbn._typing import Array

Tree = TypeVar("Tree")


def vary_over(x: Array, axes: frozenset[str]) -> Array:
    """Returns `x` typed as varying over `axes` too; the transpose is one sum over them."""
    missing = tuple(axes - varying_axes(x))
    return cast_to_varying(x, missing) if missing else x


def vary_together(tree: Tree) -> Tree:
    """Returns a tree of arrays, each typed as varying over what any of them varies over."""
    every = [varying_axes(leaf) for leaf in jax.tree.leaves(tree)]
    axes = frozenset().union(*every)
    if all(varying == axes for varying in every):
        return tree
    return jax.tree.map(lambda leaf: vary_over(leaf, axes), tree)


def vary_alike(x: Array, other: Any) -> Array:
    """Returns `x` typed as varying over what `other`, or its type, varies over too."""
    return vary_over(x, varying_axes(other))


def closed(
    function: Callable[[Array], Array], x: Array, dtype: Any, others: Any
) -> tuple[Callable[..., Array], list[Any]]:
    """Returns a `function` of arrays like `x`, of `dtype`, and what it has captured.

    The returned function takes that too, so that it can be differentiated. Its argument may
    vary over what any of `others` does: constants within must be typed so.
    """
    every = [varying_axes(leaf) for leaf in jax.tree.leaves((x, others))]
    axes = frozenset().union(*every)
    converted, captured = jax.closure_convert(
        function, traced_kind(vary_over(x, axes), dtype)
    )
    if not axes:
        return converted, captured
    return lambda y, *captured: converted(vary_over(y, axes), *captured), captured


def reshard_like(x: Array, other: Array) -> Array:
    """Returns `x` with the sharding in the type of `other`, an array of its shape.

    Only meshes of explicit axes have shardings in types; there, types that should agree
    must be made to. An array from before the mesh has no sharding: it agrees with one that
    is the same on all devices.
    """
    return _resharded(x, jax.typeof(other).sharding)


def _resharded(x: Array, wanted: Any) -> Array:
    have = jax.typeof(x).sharding
    if have == wanted or not (any(have.spec) or any(wanted.spec)):
        return x
    if have.mesh.empty and jax.sharding.get_abstract_mesh().empty and not is_traced(x):
        return x  # JAX can move it inside `jax.set_mesh` or `jax.jit` only
    if wanted.mesh.empty:
        wanted = have.update(spec=(None,) * x.ndim)
    return jax.sharding.reshard(x, wanted)


def split_like(x: Array, tree: Tree, axes: tuple[int, ...] = ()) -> Tree:
    """Returns arrays split over devices as `x` is, along each axis that they share with it.

    They are of x's rank, and broadcast to it, or have its axes without `axes`; whatever
    has neither, such as a scalar, stays as it is. Where x came before the mesh, they become
    the same on all devices.
    """
    wanted = jax.typeof(x).sharding
    every = tuple(range(x.ndim))
    features = tuple(axis for axis in every if axis not in axes)

    def split(array: Array) -> Array:
        mine = every if array.ndim == x.ndim else features
        if array.ndim != len(mine):
            return array
        pairs = zip(array.shape, mine, strict=True)
        shared = ((n != 1 and n == x.shape[axis], axis) for n, axis in pairs)
        spec = (wanted.spec[axis] if same else None for same, axis in shared)
        return _resharded(array, wanted.update(spec=tuple(spec)))

    return jax.tree.map(split, tree)


def split_like_any(leaves: Any, tree: Tree) -> Tree:
    """Returns arrays split over devices as the first of `leaves` of their shape is."""

    def split(array: Array) -> Array:
        alike = (a for a in jax.tree.leaves(leaves) if a.shape == array.shape)
        return reshard_like(array, next(alike, array))

    return jax.tree.map(split, tree)


def where_alike(condition: Array | None, new: Array, old: Any) -> Array:
    """Returns `jnp.where` of arrays whose shardings are made to agree.

    `new` alone where the condition is None, and so known to hold.
    """
    if condition is None:
        return new
    old = jnp.asarray(old, new.dtype)
    if old.shape == new.shape:
        old = reshard_like(old, new)
    if condition.shape == new.shape:
        condition = reshard_like(condition, new)
    return jnp.where(condition, new, old)


def zeros_like_result(function: Callable[[], Tree]) -> Tree:
    """Returns zeros of the types that `function()` has, varying axes and shardings too."""

    def zeros(kind: Any) -> Array:
        array = vary_over(jnp.zeros(kind.shape, kind.dtype), varying_axes_of(kind))
        return _resharded(array, kind.sharding)

    # `jax.eval_shape` leaves shardings out where some axes of the mesh are not explicit.
    traced, structure = jax.make_jaxpr(function, return_shape=True)()
    kinds = jax.tree.unflatten(jax.tree.structure(structure), traced.out_avals)
    return jax.tree.map(zeros, kinds)


def explicit_axes(x: Array) -> bool:
    """Tells whether the type of `x` names a mesh axis that one of its own is split over."""
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def broadcast_like(x: Array, other: Array) -> Array:
    """Returns `x`, of the rank of `other`, in its shape, with the sharding of its type."""
    sharding = jax.typeof(other).sharding if explicit_axes(other) else None
    dimensions = tuple(range(other.ndim))
    return lax.broadcast_in_dim(x, other.shape, dimensions, out_sharding=sharding)


def may_be_split(x: Array, axes: tuple[int, ...]) -> bool:
    """Tells whether one of `axes` may be split over devices, as far as x's type tells."""
    spec = jax.typeof(x).sharding.spec
    return not any(spec) or any(spec[axis] is not None for axis in axes)


def split_axis(x: Array, sizes: tuple[int, int]) -> Array:
    """Returns `x` with its first axis divided into two of `sizes`, the first slower."""
    shape = (*sizes, *x.shape[1:])
    sharding = jax.typeof(x).sharding
    if not explicit_axes(x):
        return x.reshape(shape)
    # The devices of the first axis go to the part of it that they divide evenly. The type
    # is given in any case, since JAX finds none for a reshape of an empty array.
    names, *others = sharding.spec
    count = 1
    for name in names if isinstance(names, tuple) else (names,):
        count *= 1 if name is None else sharding.mesh.shape[name]
    parts = [names if size % count == 0 else None for size in sizes]
    spec = (parts[0], None if parts[0] else parts[1], *others)
    return lax.reshape(x, shape, out_sharding=sharding.update(spec=spec))


def join_axes(x: Array, like: Array) -> Array:
    """Undoes `split_axis` of `like`."""
    if not explicit_axes(like):
        return x.reshape(like.shape)
    return lax.reshape(x, like.shape, out_sharding=jax.typeof(like).sharding)
