"""A normalizer of a user's own, which no module of jaxbn knows, is a full citizen.

Filter response normalization with running statistics: x over the root of its mean square.
"""

import dataclasses
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx


@jaxbn.register_stats
class PowerStats(NamedTuple):
    mean: jax.Array
    var: jax.Array
    power: jax.Array

    def renewed(self, mean, var):
        return PowerStats(mean, var, mean**2 + var)

    def pooled(self, pool):
        return self.renewed(*pool(self.mean, self.var))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FilterResponseNorm(jaxbn.Normalizer):
    feature_axes: int = -1
    momentum: float = 0.9
    axis_name: str | None = None

    def init(self, num_features):
        one = jnp.ones(num_features)
        return jaxbn.BatchNormParams(one, 0 * one), PowerStats(0 * one, +one, +one)

    def standardize(self, mean, var):
        inverse = jax.lax.rsqrt(mean**2 + var + 1e-6)
        return inverse, mean * inverse

    def track(self, state, batch):
        stats = jaxbn.BatchStats(state.mean, state.var)
        after = jaxbn.update_running(stats, batch, momentum=self.momentum)
        return state.renewed(after.mean, after.var)


RNG = np.random.default_rng(0)
X = jnp.asarray(3 + 2 * RNG.standard_normal((16, 6, 4)), jnp.float32)
NORM = FilterResponseNorm()
PARAMS = jaxbn.BatchNormParams(*jnp.asarray(RNG.standard_normal((2, 4)), jnp.float32))
STATE = NORM.init(4)[1]


def truth(x, scale, bias, power=None):
    """Returns y and the moments of x, in float64, from the paper."""
    x, scale, bias = (np.asarray(array, np.float64) for array in (x, scale, bias))
    own = (x**2).mean((0, 1)) if power is None else np.asarray(power, np.float64)
    return x / np.sqrt(own + 1e-6) * scale + bias, x.mean((0, 1)), x.var((0, 1))


def test_it_trains_and_tracks():
    y, after = jax.jit(NORM.apply, static_argnums=3)(PARAMS, STATE, X, True)
    want, mean, var = truth(X, *PARAMS)
    np.testing.assert_allclose(y, want, atol=2e-6)
    np.testing.assert_allclose(after.mean, 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(after.var, 0.9 + 0.1 * var, rtol=1e-5)
    y, same = NORM.apply(PARAMS, after, X, False)
    np.testing.assert_allclose(y, truth(X, *PARAMS, after.power)[0], atol=2e-6)
    assert same is after


def test_its_gradient_is_that_of_the_paper():
    def loss(x):
        return jnp.sin(NORM.apply(PARAMS, STATE, x, True)[0]).sum()

    along = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)
    got = jnp.vdot(jax.grad(loss)(X), along)
    step = 1e-5 * np.asarray(along, np.float64)
    after, before = (np.sin(truth(X + s, *PARAMS)[0]).sum() for s in (step, -step))
    np.testing.assert_allclose(got, (after - before) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("style", ["pmap", "shard_map", "auto", "explicit"])
def test_a_batch_over_devices_is_the_whole_batch(style):
    mapped = style in ("pmap", "shard_map")
    norm = FilterResponseNorm(axis_name="data" if mapped else None)
    run = lambda x: norm.apply(PARAMS, STATE, x, True)
    if style == "pmap":
        y, after = jax.pmap(run, axis_name="data")(X.reshape(8, 2, 6, 4))
        y, after = y.reshape(X.shape), jax.tree.map(lambda leaf: leaf[0], after)
    else:
        kind = AxisType.Explicit if style == "explicit" else AxisType.Auto
        mesh = jax.make_mesh((8,), ("data",), (kind,))
        data = P("data")
        if style == "shard_map":
            run = jax.shard_map(run, mesh=mesh, in_specs=data, out_specs=(data, P()))
        with jax.set_mesh(mesh):
            y, after = jax.jit(run)(jax.device_put(X, NamedSharding(mesh, data)))
    want, mean, var = truth(X, *PARAMS)
    np.testing.assert_allclose(y, want, atol=2e-6)
    np.testing.assert_allclose(after.power, 0.9 + 0.1 * var + (0.1 * mean) ** 2, rtol=1e-5)


def test_ghost_batches_of_it():
    ghosts = jaxbn.GhostBatchNorm(NORM, 4)
    y, after = ghosts.apply(PARAMS, STATE, X, True)
    want = np.concatenate([truth(X[i : i + 4], *PARAMS)[0] for i in range(0, 16, 4)])
    np.testing.assert_allclose(y, want, atol=2e-6)
    np.testing.assert_allclose(after.mean, 0.1 * truth(X, *PARAMS)[1], rtol=1e-5)


def test_it_is_gathered_and_reestimated():
    layer = jaxbn.Gather(NORM)
    state = jaxbn.gather(STATE)
    for part in X.reshape(4, 4, 6, 4):
        _, state = layer.apply(PARAMS, state, part, True)
    _, mean, var = truth(X, *PARAMS)
    np.testing.assert_allclose(jaxbn.track_gathered(state).mean, 0.1 * mean, rtol=1e-5)
    step = lambda state, x: layer.apply(PARAMS, state, x, True)[1]
    state = jaxbn.reestimate(step, STATE, X.reshape(4, 4, 6, 4))
    assert isinstance(state, PowerStats)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.power, var + mean**2, rtol=1e-6)


def test_replicas_that_tracked_alone_are_pooled():
    parts = X.reshape(8, 2, 6, 4)
    step = lambda state, x: jaxbn.Gather(NORM).apply(PARAMS, state, x, True)[1]
    states = [jaxbn.reestimate(step, STATE, [part]) for part in parts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    pooled = jax.vmap(lambda s: jaxbn.sync_state(s, "d"), axis_name="d")(stacked)
    _, mean, var = truth(X, *PARAMS)
    np.testing.assert_allclose(pooled.mean[3], mean, rtol=1e-5)
    np.testing.assert_allclose(pooled.power[3], var + mean**2, rtol=1e-5)


def test_it_is_folded():
    _, state = NORM.apply(PARAMS, STATE, X, True)
    affine = jaxbn.as_affine(PARAMS, state, NORM)
    want, _ = NORM.apply(PARAMS, state, X, False)
    np.testing.assert_allclose(X * affine.scale + affine.bias, want, atol=2e-6)
    kernel = jnp.asarray(RNG.standard_normal((5, 4)), jnp.float32)
    folded, bias = jaxbn.fold(kernel, None, affine)
    x = jnp.asarray(RNG.standard_normal((3, 5)), jnp.float32)
    want, _ = NORM.apply(PARAMS, state, x @ kernel, False)
    np.testing.assert_allclose(x @ folded + bias, want, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="dense")(x)
        norm = jaxbn.linen.Norm(NORM, use_running_average=not train, name="norm")
        return norm(x)


def test_it_is_a_linen_module_that_is_reestimated():
    model = Model()
    variables = model.init(jax.random.key(0), X, False)
    y, updates = model.apply(variables, X, True, mutable=["batch_stats"])
    assert set(updates["batch_stats"]["norm"]) == {"mean", "var", "power"}
    before = nn.Dense(4).apply({"params": variables["params"]["dense"]}, X)
    np.testing.assert_allclose(y, truth(before, np.ones(4), np.zeros(4))[0], atol=1e-5)
    stats = jaxbn.linen.reestimate(model.apply, variables, [X[:4], X[4:]], train=True)
    _, mean, var = truth(before, np.ones(4), np.zeros(4))
    np.testing.assert_allclose(stats["norm"]["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["norm"]["power"], var + mean**2, rtol=1e-4)


def test_it_is_an_nnx_module():
    layer = jaxbn.nnx.Norm(NORM, 4)
    y = layer(X)
    np.testing.assert_allclose(y, truth(X, np.ones(4), np.zeros(4))[0], atol=2e-6)
    layer = jaxbn.nnx.reestimate(layer, [X[:4], X[4:]])
    _, mean, var = truth(X, *PARAMS)
    np.testing.assert_allclose(layer.power[...], var + mean**2, rtol=1e-5)
    assert isinstance(layer.power, nnx.BatchStat)


class Lacking:
    def init(self, num_features):
        return (), ()

    def apply(self, params, state, x, training):
        return x, state


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (lambda: jaxbn.Gather(Lacking()), "def standardize(self, mean"),
        (lambda: jaxbn.GhostBatchNorm(Lacking(), 2), "def standardize(self, mean"),
        (lambda: jaxbn.as_affine((), (), Lacking()), "def running(self, state"),
        (lambda: jaxbn.register_stats(tuple), "mean: jax.Array"),
    ],
)
def test_what_it_lacks_is_named_with_its_signature(use, line):
    with pytest.raises(TypeError, match=re.escape(line)):
        use()
