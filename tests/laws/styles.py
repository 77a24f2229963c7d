"""The ways to spread a batch over devices: each makes a program of a layer.

A style is a function `layer -> program`, and a program `(params, state, x, weights, dy) ->
(y, state, gradients of sum(y dy) by params, of the whole, and by x)` of arrays with two
leading axes, devices and the rows of each. All programs must give the same arrays.
"""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.laws.test_laws import change

DEVICES = 8


def mesh(shape=(DEVICES,), names=("d",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def value_and_gradients(layer, params, state, x, weights, dy):
    def loss(params, x):
        options = {} if weights is None else {"weights": weights}
        y, after = layer.apply(params, state, x, True, **options)
        return (y * dy).sum(), (y, after)

    (by_params, by_x), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, after, by_params, by_x


def flat(tree):
    """Joins the two leading axes."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def split(tree, parts):
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), tree)


def of_one(y, after, by_params, by_x):
    """Returns results of all devices as those of one: equal states, shared gradients."""
    for leaf in jax.tree.leaves(after):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    after = jax.tree.map(lambda leaf: leaf[0], after)
    return y, after, jax.tree.map(lambda leaf: leaf.sum(0), by_params), by_x


def over(axis_name, layer):
    """Returns `value_and_gradients` of the layer that spreads over the axis."""
    return functools.partial(value_and_gradients, change(layer, axis_name=axis_name))


def by_pmap(layer):
    mapped = jax.pmap(over("d", layer), axis_name="d", in_axes=(None, None, 0, 0, 0))
    return lambda *arguments: of_one(*mapped(*arguments))


def by_vmap(layer):
    @jax.jit
    def program(params, state, *batch):
        run = functools.partial(over("d", layer), params, state)
        # Without a gradient inside, the state is the same for all, and typed so.
        forward = jax.vmap(lambda *batch: run(*batch)[1], axis_name="d", out_axes=None)
        y, _, by_params, by_x = jax.vmap(run, axis_name="d")(*batch)
        total = jax.tree.map(lambda leaf: leaf.sum(0), by_params)
        return y, forward(*batch), total, by_x

    return program


def by_vmap_in_pmap(layer):
    run = over(("d", "v"), layer)
    nested = jax.vmap(run, axis_name="v", in_axes=(None, None, 0, 0, 0))
    mapped = jax.pmap(nested, axis_name="d", in_axes=(None, None, 0, 0, 0))

    def program(params, state, *batch):
        y, *shared, by_x = mapped(params, state, *split(batch, DEVICES // 2))
        return of_one(flat(y), *flat(shared), flat(by_x))

    return program


def by_shard_map(layer, shape=(DEVICES,), names=("d",), manual=None, check_vma=True):
    axes = names if manual is None else manual
    run = over(axes if len(axes) > 1 else axes[0], layer)

    def shard(*arguments):
        y, after, by_params, by_x = run(*arguments)
        if not check_vma:
            by_params = jax.lax.psum(by_params, axes)
        return y, after, by_params, by_x

    return sharded(shard, shape, names, axes, check_vma)


def sharded(shard, shape, names, axes, check_vma=True):
    """Returns the program whose shards run `shard` on their rows, without a device axis."""
    mapped = jax.shard_map(
        shard,
        mesh=mesh(shape, names),
        in_specs=(P(), P(), P(axes), P(axes), P(axes)),
        out_specs=(P(axes), P(), P(), P(axes)),
        axis_names=set(axes),
        check_vma=check_vma,
    )

    @jax.jit
    def program(params, state, *batch):
        y, after, by_params, by_x = mapped(params, state, *flat(batch))
        return y.reshape(batch[0].shape), after, by_params, by_x.reshape(batch[0].shape)

    return program


def by_vmap_in_shard_map(layer):
    run = over(("d", "v"), layer)
    nested = jax.vmap(run, axis_name="v", in_axes=(None, None, 0, 0, 0))

    def shard(params, state, *batch):
        y, after, by_params, by_x = nested(params, state, *split(batch, 2))
        total = jax.tree.map(lambda leaf: jax.lax.psum(leaf.sum(0), "d"), by_params)
        return flat(y), jax.tree.map(lambda leaf: leaf[0], after), total, flat(by_x)

    # JAX has no named vmap inside a checked shard_map.
    return sharded(shard, (DEVICES // 2,), ("d",), ("d",), check_vma=False)


def by_auto_jit(layer, kind=AxisType.Auto):
    grid, traces = mesh(kind=kind), []

    @jax.jit
    def step(*arguments):
        traces.append(arguments)
        return value_and_gradients(layer, *arguments)

    def program(params, state, *batch):
        with jax.set_mesh(grid):
            spread = jax.device_put(flat(batch), NamedSharding(grid, P("d")))
            params, state = jax.device_put((params, state), NamedSharding(grid, P()))
            del traces[:]
            y, after, by_params, by_x = step(params, state, *spread)
            # A second step finds a state of the sharding that the first one found.
            step(params, after, *spread)
            assert len(traces) <= 1
        assert y.sharding.spec[0] == "d"
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(after))
        shape = batch[0].shape
        return np.reshape(y, shape), after, by_params, np.reshape(by_x, shape)

    return program


def by_explicit_jit(layer):
    return by_auto_jit(layer, AxisType.Explicit)


# Each style with the number of the devices that a named axis has; 1 where none is named.
STYLES = {
    "pmap": (by_pmap, 8),
    "vmap": (by_vmap, 8),
    "shard_map": (by_shard_map, 8),
    "unchecked_shard_map": (functools.partial(by_shard_map, check_vma=False), 8),
    "auto_jit": (by_auto_jit, 1),
    "explicit_jit": (by_explicit_jit, 1),
    "two_axes": (functools.partial(by_shard_map, shape=(4, 2), names=("g", "d")), 8),
    "partly_manual": (
        functools.partial(by_shard_map, shape=(4, 2), names=("d", "m"), manual=("d",)),
        4,
    ),
    "vmap_in_pmap": (by_vmap_in_pmap, 8),
    "vmap_in_shard_map": (by_vmap_in_shard_map, 8),
}
PLAIN = "pmap", "vmap", "shard_map", "unchecked_shard_map", "auto_jit", "explicit_jit"
