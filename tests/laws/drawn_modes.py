"""The ways to run what is drawn: on one device, as an ensemble, over devices, on meshes.

A mode is a function `(run, made, state, inputs) -> (ys, states)`. It takes some steps of
`run(state, x, flag, weights, residual) -> (y, state)`; `inputs` are stacked along them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.laws.drawn import DEVICES
from tests.laws.mistakes import STEPS


def looped(run, state, inputs):
    ys, states = [], [state]
    for i in range(STEPS):
        y, state = run(state, *at(inputs, i))
        ys.append(y)
        states.append(state)
    return ys, states


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def eager(run, made, state, inputs):
    return looped(run, state, inputs)


def jit(run, made, state, inputs):
    return looped(jax.jit(run), state, inputs)


def remat(run, made, state, inputs):
    return looped(jax.checkpoint(run), state, inputs)


def scan(run, made, state, inputs):
    def body(state, inputs):
        y, after = run(state, *inputs)
        return after, (y, after)

    _, (ys, states) = jax.lax.scan(body, state, inputs)
    return list(ys), [state, *(at(states, i) for i in range(STEPS))]


def vmap(run, made, state, inputs):
    """Runs an ensemble of two, of which the second sees other data and is thrown away."""

    def paired(state, x, *others):
        pair = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf, leaf]))
        both = jax.vmap(run)(pair(state), jnp.stack([x, x[::-1]]), *pair(others))
        return at(both, 0)

    return looped(paired, state, inputs)


def by_rows(mapped):
    """Returns a step whose x, weights and residual are split over devices by rows."""

    def part(leaf):
        return leaf.reshape(DEVICES, leaf.shape[0] // DEVICES, *leaf.shape[1:])

    def spread(state, x, flag, *others):
        state, flag = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), (state, flag))
        y, after = mapped(state, part(x), flag, *jax.tree.map(part, others))
        after = jax.tree.map(np.asarray, after)
        for leaf in jax.tree.leaves(after):
            np.testing.assert_array_equal(leaf[0], leaf[1])
        return np.asarray(y).reshape(x.shape), at(after, 0)

    return spread


def pmap(run, made, state, inputs):
    devices = jax.devices()[:DEVICES]
    return looped(by_rows(jax.pmap(run, axis_name="d", devices=devices)), state, inputs)


def named_vmap(run, made, state, inputs):
    return looped(by_rows(jax.vmap(run, axis_name="d")), state, inputs)


def shard_map(run, made, state, inputs):
    (mesh, _), rows = meshes(AxisType.Auto), P("d")
    specs = {"in_specs": (P(), rows, P(), rows, rows), "out_specs": (rows, P())}
    return looped(jax.jit(jax.shard_map(run, mesh=mesh, **specs)), state, inputs)


@functools.cache
def meshes(kind):
    """Returns a mesh of one axis, and one of two."""
    devices = jax.devices()
    return (
        jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,), devices=devices[:DEVICES]),
        jax.make_mesh((2, 2), ("d", "m"), axis_types=(kind, kind), devices=devices[:4]),
    )


def by_mesh(kind, run, made, state, inputs):
    """Splits x by rows or by features or both, where their sizes allow it."""
    x, *others = inputs
    mesh, axis = meshes(kind)[1], np.atleast_1d(made.settings["feature_axes"])[0]
    spec = [None] * (x.ndim - 1)
    if made.spread[0] and x.shape[1] % 2 == 0:
        spec[0] = "d"
    if made.spread[1] and x.shape[1:][axis] % 2 == 0:
        spec[axis] = "m"
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P(None, *spec)))
        return looped(jax.jit(run), state, (x, *others))


OVER_DEVICES = {f.__name__: f for f in (pmap, named_vmap, shard_map)}
MODES = {f.__name__: f for f in (eager, jit, remat, scan, vmap)} | OVER_DEVICES
MODES["auto_jit"] = functools.partial(by_mesh, AxisType.Auto)
MODES["explicit_jit"] = functools.partial(by_mesh, AxisType.Explicit)
