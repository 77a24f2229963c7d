"""What the options and the wrappers of normalization promise beyond the laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import convert

BN = jaxbn.BatchNorm(momentum=0.5)
X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32) * 2 + 1
ADJUSTMENTS = {
    "features": (
        np.array([0.9, 1.1, 1.3], np.float32),
        np.array([0.1, -0.2, 0.3], np.float32),
    ),
    "rows": (
        np.linspace(0.5, 1.5, 12, dtype=np.float32)[:, None],
        np.linspace(-1, 1, 12, dtype=np.float32)[:, None],
    ),
}


def start(layer, features=3):
    params, state = layer.init(features)
    return params._replace(scale=params.scale * 2, bias=params.bias - 1), state


def test_limits_of_one_and_zero_leave_plain_normalization():
    plain = jaxbn.RenormLimits(1.0, 1.0, 0.0)
    layer = jaxbn.BatchRenorm(BN)
    params, state = start(layer)
    y, after = layer.apply(params, state, X, True, limits=plain)
    want, stats = BN.apply(params, BN.init(3)[1], X, True)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    np.testing.assert_allclose(after.mean, stats.mean, rtol=1e-6)


def test_without_limits_training_computes_what_inference_will():
    layer = jaxbn.BatchRenorm(
        BN, momentum=0.5, limits=jaxbn.RenormLimits(0.0, jnp.inf, jnp.inf)
    )
    params, state = start(layer)
    for _ in range(3):
        y, after = layer.apply(params, state, X, True)
        inferred, _ = layer.apply(params, state, X, False)
        state = after
    np.testing.assert_allclose(y, inferred, rtol=1e-4, atol=1e-5)


def test_the_schedule_of_the_paper():
    steps = jnp.array([0, 5_000, 15_000, 25_000, 40_000, 10**6])
    limits = jax.jit(jax.vmap(jaxbn.renorm_limits))(steps)
    np.testing.assert_allclose(limits.r_max, [1, 1, 1 + 4 / 7, 1 + 8 / 7, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(limits.d_max, [0, 0, 2.5, 5, 5, 5], rtol=1e-6)
    np.testing.assert_allclose(limits.r_min, 1 / np.asarray(limits.r_max), rtol=1e-6)


def test_a_schedule_of_limits_compiles_once():
    layer = jaxbn.BatchRenorm(BN)
    params, state = start(layer)
    step = jax.jit(
        lambda n, state: layer.apply(params, state, X, True, limits=jaxbn.renorm_limits(n))[
            1
        ]
    )
    for n in range(0, 30_000, 10_000):
        state = step(n, state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_every_ghost_batch_is_normalized_as_if_alone(layout):
    layer = jaxbn.GhostBatchNorm(BN, 4, layout=layout)
    params, state = start(layer)
    y, after = layer.apply(params, state, X, True)
    for j in range(3):
        rows = slice(4 * j, 4 * j + 4) if layout == "contiguous" else slice(j, None, 3)
        alone, _ = BN.apply(params, state, X[rows], True)
        np.testing.assert_allclose(y[rows], alone, rtol=1e-5, atol=1e-5)
    whole = BN.apply(params, state, X, True)[1]
    np.testing.assert_allclose(after.mean, whole.mean, rtol=1e-5)
    np.testing.assert_allclose(after.var, whole.var, rtol=1e-5)


def test_ghosts_are_off_at_inference_and_need_no_divisible_batch_there():
    layer = jaxbn.GhostBatchNorm(BN, 4)
    params, state = start(layer)
    y, _ = layer.apply(params, state, X[:5], False)
    np.testing.assert_array_equal(y, BN.apply(params, state, X[:5], False)[0])


@pytest.mark.parametrize("kind", ADJUSTMENTS)
@pytest.mark.parametrize("training", [True, False, jnp.array(True), jnp.array(False)])
def test_an_adjustment_touches_the_normalized_batch_in_training_only(kind, training):
    s, o = ADJUSTMENTS[kind]
    params, state = start(BN)
    bare = jaxbn.BatchNorm(momentum=0.5, use_scale=False, use_bias=False)
    normalized, _ = bare.apply(jaxbn.BatchNormParams(None, None), state, X, training)
    y, _ = BN.apply(params, state, X, training, adjustment=(s, o))
    want = np.asarray(normalized) * s + o if bool(training) else np.asarray(normalized)
    np.testing.assert_allclose(y, want * 2 - 1, rtol=1e-5, atol=1e-5)
    y, _ = bare.apply(
        jaxbn.BatchNormParams(None, None), state, X, training, adjustment=(s, o)
    )
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False, jnp.array(True)])
def test_residual_and_activation_follow_the_bias_in_this_order(training):
    layer = jaxbn.BatchNorm(momentum=0.5, activation=jax.nn.relu)
    params, state = start(layer)
    y, _ = layer.apply(params, state, X, training, residual=X)
    plain, _ = BN.apply(params, state, X, training)
    np.testing.assert_allclose(y, np.maximum(plain + X, 0), rtol=1e-6)
    half, _ = layer.apply(params, state, X.astype(jnp.bfloat16), training, residual=X)
    assert half.dtype == jnp.bfloat16


def test_params_of_half_precision():
    layer = jaxbn.BatchNorm(param_dtype=jnp.bfloat16)
    params, state = layer.init(3)
    assert (params.scale.dtype, state.mean.dtype) == (jnp.bfloat16, jnp.float32)
    y, after = layer.apply(params, state, X, True, adjustment=ADJUSTMENTS["features"])
    assert (y.dtype, after.mean.dtype) == (jnp.float32, jnp.float32)
    gradient = jax.grad(lambda p: layer.apply(p, state, X, True)[0].sum())(params)
    assert gradient.scale.dtype == jnp.bfloat16


def test_initializers_draw_from_independent_keys():
    normal = jax.nn.initializers.normal()
    params, state = BN.init(
        4, scale_init=normal, bias_init=normal, mean_init=normal, key=jax.random.key(1)
    )
    drawn = np.stack([params.scale, params.bias, state.mean])
    assert len(np.unique(drawn)) == 12
    again, _ = BN.init(4, scale_init=normal, bias_init=normal, key=jax.random.key(1))
    np.testing.assert_array_equal(again.scale, params.scale)


MAPPED = jaxbn.BatchNorm(axis_name="batch")


@pytest.mark.parametrize(
    ("layer", "whole"),
    [
        (MAPPED, jaxbn.BatchNorm()),
        (jaxbn.BatchNorm(axis_name="batch", feature_axes=0), jaxbn.BatchNorm()),
        (jaxbn.BatchRenorm(MAPPED), jaxbn.BatchRenorm()),
        (jaxbn.Gather(MAPPED), jaxbn.BatchNorm()),
    ],
)
def test_one_example_is_a_batch_of_its_mapped_axis_or_inference(layer, whole):
    x = jnp.arange(12.0).reshape(4, 3) ** 2
    params, state = layer.init(3)

    @functools.partial(jax.vmap, axis_name="batch", out_axes=(0, None))
    def per_example(x, weight):
        return layer.apply(params, state, x, True, weights=weight)

    for weights in (jnp.ones(4), jnp.array([1.0, 0.0, 1.0, 2.0])):
        got = per_example(x, weights)
        want = whole.apply(params, state, x, True, weights=weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    got = jax.grad(lambda x: (per_example(x, jnp.ones(4))[0] ** 3).sum())(x)
    want = jax.grad(lambda x: (whole.apply(params, state, x, True)[0] ** 3).sum())(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    y = jax.vmap(lambda x: layer.apply(params, state, x, False)[0])(x)
    np.testing.assert_allclose(y, whole.apply(params, state, x, False)[0], rtol=1e-6)
    assert layer.apply(params, state, x[0], False)[0].shape == (3,)


def test_a_layer_counts_the_single_examples_that_it_gathers():
    params, state = jaxbn.init(3)
    gathered = jaxbn.gather(state)
    x = jnp.arange(3.0)
    _, after = jaxbn.Gather(jaxbn.BatchNorm()).apply(params, gathered, x, False)
    assert after.batch.count.tolist() == [1, 1, 1]
    assert after.batch.mean.tolist() == [0, 1, 2]


def test_an_adjustment_follows_the_correction():
    layer = jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.5))
    s, o = ADJUSTMENTS["features"]
    params, state = start(layer)
    corrected, _ = layer.apply(params, state, X, True)
    y, _ = layer.apply(params, state, X, True, adjustment=(s, o))
    want = ((np.asarray(corrected) + 1) / 2 * s + o) * 2 - 1  # by `start`: scale 2, bias -1
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [jaxbn.BatchRenorm, convert.EmaBatchNorm])
def test_what_the_batch_lacks_is_not_corrected(wrap):
    layer = wrap(jaxbn.BatchNorm(momentum=0.5))
    params, state = layer.init(3)
    _, state = layer.apply(params, state, X, True)
    y, after = layer.apply(params, state, X, True, weights=jnp.zeros(len(X)))
    np.testing.assert_allclose(y, layer.apply(params, state, X, False)[0], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("shape", [(4, 1, 3), (4, 1, 1), (1, 2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_scale_and_bias_of_the_rank_of_x_are_conditional(shape, training):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(4, 2, 3)).astype(np.float32) for _ in range(2))
    params = jaxbn.BatchNormParams(*jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32))
    bare = jaxbn.BatchNorm(use_scale=False, use_bias=False)

    def inside(params, x):
        _, state = BN.init(3)
        return (BN.apply(params, state, x, training)[0] * dy).sum()

    def outside(params, x):
        y, _ = bare.apply(*bare.init(3), x, training)
        return ((y * params.scale + params.bias) * dy).sum()

    got, want = (jax.grad(f, (0, 1))(params, jnp.asarray(x)) for f in (inside, outside))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
