"""Sums over tiles: their values, the modes they run in, and where they are taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._kernels import tiles as _tiles

OPTIMIZED = True
SHAPE = 40, 6, 10, 8


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((300, 64), (0,)),
        ((301, 64), (0,)),
        ((301, 64), (0, 1)),
        ((9, 7, 11, 24), (0, 1, 2)),
        ((4099, 3), (0,)),
        ((4096, 3), (0,)),
        ((6, 900, 8), (1,)),
        ((9, 7, 150), (0, 2)),
        ((6, 16, 300), (0, 2)),
        ((7, 3, 5, 40, 30), (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_sums_are_those_over_axes(shape, axes, dtype, small_tiles):
    rng = np.random.default_rng(0)
    x, d = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    features = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    vector = jnp.asarray(rng.standard_normal(features), jnp.float32)

    def products(x, d, vector):
        wide = d.astype(jnp.float32)
        return wide * (x.astype(jnp.float32) - vector), wide

    cut = _tiles.cut_of(shape, axes, 2)
    assert cut is not None
    got = jax.jit(lambda *arrays: _tiles.sums(products, cut, arrays, (vector,)))(x, d)
    x, d, vector = (np.asarray(array, np.float64) for array in (x, d, vector))
    want = (d * (x - vector)).sum(axes, keepdims=True), d.sum(axes, keepdims=True)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-3)


def truth(x, d, scale, bias, epsilon):
    """Returns the gradients of the layer and its ReLU, in float64, from the paper."""
    x, d, scale, bias = (np.asarray(array, np.float64) for array in (x, d, scale, bias))
    axes = 0, 1, 2
    inverse = 1 / np.sqrt(x.var(axes) + epsilon)
    normalized = (x - x.mean(axes)) * inverse
    d = d * (normalized * scale + bias > 0)
    by_scale, by_bias = (d * normalized).sum(axes), d.sum(axes)
    count = x.size / x.shape[-1]
    dx = scale * inverse * (d - by_bias / count - normalized * by_scale / count)
    return dx, by_scale, by_bias


def plain(gradients, x, d):
    return gradients(x, d)


def pair(gradients, x, d):
    stacked = jax.vmap(gradients)(jnp.stack([x, 2 * x + 1]), jnp.stack([d, -d]))
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def scan(gradients, x, d):
    _, stacked = jax.lax.scan(lambda c, xd: (c, gradients(*xd)), 0, (x[None], d[None]))
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def pmap(gradients, x, d):
    stacked = jax.pmap(gradients)(x[None], d[None])
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def shard_map(gradients, x, d):
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    data = P("data")
    mapped = jax.shard_map(
        gradients, mesh=mesh, in_specs=(data, data), out_specs=(data, P(), P())
    )
    return mapped(x, d)


@pytest.mark.parametrize("mode", [plain, pair, scan, pmap, shard_map])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_layer_in_every_mode(mode, remat, dtype, small_tiles):
    rng = np.random.default_rng(1)
    x = jnp.asarray(3 + 2 * rng.standard_normal(SHAPE), dtype)
    d = jnp.asarray(rng.standard_normal(SHAPE), dtype)
    bn = jaxbn.BatchNorm(
        activation=jax.nn.relu, axis_name="data" if mode is shard_map else None
    )
    _, state = bn.init(8)
    scale, bias = (jnp.asarray(rng.standard_normal(8), jnp.float32) for _ in range(2))

    def gradients(x, d):
        def loss(x, scale, bias):
            y, _ = bn.apply(jaxbn.BatchNormParams(scale, bias), state, x, True)
            return (y.astype(jnp.float32) * d.astype(jnp.float32)).sum()

        loss = jax.checkpoint(loss) if remat else loss
        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    program = jax.jit(lambda *xd: mode(gradients, *xd)).lower(x, d)
    # The older pmap makes a program of several devices, also of one.
    if mode is not pmap or jax.__version_info__ >= (0, 8):
        assert program.as_text().count("stablehlo.while") > (mode is scan)
    got = program.compile()(x, d)
    want = truth(x, d, scale, bias, bn.epsilon)
    near = 1e-3 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(got[0], want[0], rtol=near, atol=near)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_second_derivative_of_a_linear_loss(small_tiles):
    # Its first gradient is the same everywhere, so that nothing but x varies.
    rng = np.random.default_rng(2)
    x, d, along = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(3))
    bn = jaxbn.BatchNorm()
    params, state = bn.init(8)
    gradient = jax.grad(lambda x: jnp.vdot(bn.apply(params, state, x, True)[0], d))
    got = jax.jit(jax.grad(lambda x: jnp.vdot(gradient(x), along)))(x)
    step = 1e-4 * np.asarray(along, np.float64)
    ones = np.ones(8)
    # A bias this large leaves the ReLU open.
    after, before = (truth(x + s, d, ones, 99 * ones, bn.epsilon)[0] for s in (step, -step))
    np.testing.assert_allclose(got, (after - before) / 2e-4, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_program_for_one_device_reads_large_arrays_once(activation, dtype, devices):
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
    x = jnp.ones((64, 32, 32, 64), dtype)
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    bn = jaxbn.BatchNorm(activation=activation)
    params, state = bn.init(64)

    def gradient(params, x, d):
        apply = lambda params, x: bn.apply(params, state, x, True)
        y, pull, _ = jax.vjp(apply, params, x, has_aux=True)
        return y, pull(d)

    program = jax.jit(gradient).lower(params, x, x).compile()
    tiles = devices == 1 and (dtype, 2) in _tiles.LARGE
    assert (" while(" in program.as_text()) == tiles
    fuses_sums = jax.__version_info__ >= (0, 10) and dtype != "float16"
    if tiles or (fuses_sums and activation is None):
        assert program.memory_analysis().temp_size_in_bytes <= 0.04 * x.nbytes / devices


def test_weighted_sums_are_those_of_float64(small_tiles):
    rng = np.random.default_rng(3)
    x, t = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(2))
    w = jnp.asarray(rng.integers(0, 3, SHAPE[:3]), jnp.float32)
    moments = jax.jit(lambda x: jaxbn.moments(x, weights=w)[:2])
    (mean, var), (mean_t, var_t) = jax.jvp(moments, (x,), (t,))
    x, t, w = (np.asarray(array, np.float64) for array in (x, t, w))
    share = w[..., None] / w.sum()
    total = lambda values: (share * values).sum((0, 1, 2))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    near(mean, total(x))
    near(var, total((x - total(x)) ** 2))
    near(mean_t, total(t))
    near(var_t, 2 * total((x - total(x)) * t))
