"""What the numbers must do where others lose them: large means, NaN, nothing to average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._kernels import compensated
from tests.laws import oracle

OPTIMIZED = True


def normal(mean, std, rows=65536, features=4, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (mean + std * rng.standard_normal((rows, features))).astype(dtype)


@pytest.mark.parametrize("mean", [0.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("rows", [7, 4096, 65536])
def test_the_variance_keeps_its_digits_under_a_large_mean(mean, rows):
    x = normal(mean, 1.0, rows)
    batch = jaxbn.moments(x)
    np.testing.assert_allclose(batch.var, x.astype(np.float64).var(0), rtol=1e-5)
    np.testing.assert_allclose(
        batch.mean, x.astype(np.float64).mean(0), rtol=2e-7, atol=1e-6
    )


@pytest.mark.parametrize("lost", [[0], [1], [3], [0, 1, 2, 3]])
@pytest.mark.parametrize("poison", [[], [0], [2], [3]])
def test_one_feature_that_lost_digits_is_enough_to_read_x_again(lost, poison):
    x = normal(0.0, 1.0)
    x[:, lost] += np.float32(1e4)
    x[5, poison] = np.nan
    sound = [feature for feature in range(4) if feature not in poison]
    var = np.asarray(jaxbn.moments(x).var)
    np.testing.assert_allclose(var[sound], x[:, sound].astype(np.float64).var(0), rtol=1e-5)
    assert np.isnan(var[poison]).all()


def test_a_rare_value_far_away_does_not_spoil_the_variance():
    x = normal(1e4, 1.0)
    x[:32] = 0.0
    np.testing.assert_allclose(jaxbn.moments(x).var, x.astype(np.float64).var(0), rtol=1e-5)


def test_gradients_survive_a_large_mean():
    x = normal(1e3, 1.0, rows=512)
    bn = jaxbn.BatchNorm()
    params, state = bn.init(4)
    cotangent = normal(0.0, 1.0, rows=512, seed=1)
    got = jax.grad(lambda x: (bn.apply(params, state, x, True)[0] * cotangent).sum())(
        jnp.asarray(x)
    )
    wide, d = x.astype(np.float64), cotangent.astype(np.float64)
    inverse = 1 / np.sqrt(wide.var(0) + bn.epsilon)
    normalized = (wide - wide.mean(0)) * inverse
    want = inverse * (d - d.mean(0) - normalized * (d * normalized).mean(0))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e3, 1e6 + 0.1, 1e-30, 3e38])
@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_constant_feature_normalizes_to_exactly_the_bias(value, rows, dtype):
    if (dtype == "float16" and value > 6e4) or rows * value > 3.4e38:
        value = 6e4
    x = jnp.full((rows, 2), value, dtype)
    bn = jaxbn.BatchNorm()
    params, state = bn.init(2)
    params = params._replace(bias=jnp.array([0.5, -2.0]))
    y, state = bn.apply(params, state, x, True)
    np.testing.assert_array_equal(y, jnp.broadcast_to(params.bias.astype(dtype), (rows, 2)))
    assert (state.var <= 0.99).all()
    assert (state.var >= 0.98).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("option", [{}, {"debias": True}, {"momentum": None}, {"ddof": 1}])
def test_a_batch_that_is_not_finite_shows_and_leaves_the_state(bad, option):
    x = normal(1.0, 1.0, rows=8)
    x[3, 1] = bad
    bn = jaxbn.BatchNorm(**option)
    params, before = bn.init(4)
    for weights in (None, jnp.ones(8)):
        y, after = bn.apply(params, before, jnp.asarray(x), True, weights=weights)
        assert np.isnan(y[:, 1]).any()
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert new[1] == old[1]
            assert (np.delete(new, 1) != np.delete(old, 1)).all()
        assert np.isfinite(np.delete(y, 1, axis=1)).all()


def test_a_variance_that_overflows_leaves_the_state():
    x = np.array([[1e20, 1.0], [-1e20, 2.0]], np.float32)
    bn = jaxbn.BatchNorm()
    params, before = bn.init(2)
    y, after = bn.apply(params, before, x, True)
    assert np.isfinite(y).all()
    assert (after.mean[0], after.var[0]) == (before.mean[0], before.var[0])
    assert after.mean[1] != before.mean[1]


@pytest.mark.parametrize("training", [True, jnp.array(True)])
@pytest.mark.parametrize("option", [{}, {"debias": True}, {"momentum": None}, {"ddof": 1}])
def test_nothing_to_average_falls_back_on_the_running_statistics(training, option):
    bn = jaxbn.BatchNorm(**option)
    params, state = bn.init(4)
    _, state = bn.apply(params, state, normal(3.0, 2.0, rows=16), True)
    x = jnp.asarray(normal(3.0, 2.0, rows=5, seed=1))
    y, after = bn.apply(params, state, x, training, weights=jnp.zeros(5))
    np.testing.assert_allclose(y, bn.apply(params, state, x, False)[0], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    gradient = jax.grad(
        lambda x: bn.apply(params, state, x, True, weights=jnp.zeros(5))[0].sum()
    )
    assert np.isfinite(gradient(x)).all()

    y, after = bn.apply(params, state, x[:0], training)
    assert y.shape == (0, 4)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("option", [{"debias": True}, {"momentum": None}, {"momentum": 0}])
def test_a_first_batch_replaces_the_initial_state_exactly(option):
    x = np.float32([[-1.0847012, 1e-6], [-1.1018803, 0.0]])
    bn = jaxbn.BatchNorm(**option)
    _, state = bn.apply(*bn.init(2), jnp.asarray(x), True)
    np.testing.assert_allclose(state.var, x.astype(float).var(0), rtol=1e-5)


def test_one_row_gives_the_bias_and_no_gradient():
    bn = jaxbn.BatchNorm()
    params, state = bn.init(3)
    x = jnp.array([[1.0, -5.0, 1e4]])
    y, state = bn.apply(params, state, x, True)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_allclose(state.var, 0.99)
    gradient = jax.grad(lambda x: bn.apply(params, state, x, True)[0].sum())(x)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_of_half_precision_are_those_of_its_values(dtype):
    x = jnp.asarray(normal(200.0, 5.0, rows=4096)).astype(dtype)
    wide = np.asarray(x, np.float64)
    batch = jaxbn.moments(x)
    assert batch.mean.dtype == batch.var.dtype == batch.count.dtype == jnp.float32
    np.testing.assert_allclose(batch.mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(batch.var, wide.var(0), rtol=1e-5)


def test_complex_inputs_have_a_complex_mean_and_a_real_variance():
    re, im = normal(1.0, 1.0, rows=32), normal(-2.0, 3.0, rows=32, seed=1)
    x = (re + 1j * im).astype(np.complex64)
    bn = jaxbn.BatchNorm(param_dtype=jnp.complex64, momentum=0.0, epsilon=1e-12)
    params, state = bn.init(4)
    y, state = bn.apply(params, state, x, True)
    want, stats = oracle.apply(bn, oracle.tree(params), oracle.tree(state), x, True)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.mean, stats["mean"], rtol=1e-5)
    np.testing.assert_allclose(state.var, stats["var"], rtol=1e-5)
    assert (y.dtype, state.mean.dtype, state.var.dtype) == (
        "complex64",
        "complex64",
        "float32",
    )
    loss = lambda x: jnp.square(jnp.abs(bn.apply(params, state, x, True)[0] - 1j)).sum()
    by_x = jax.grad(loss)(jnp.asarray(x))
    h = jnp.zeros_like(x).at[3, 1].set(1e-2)
    for direction in (1, 1j):
        step = direction * h
        numeric = (loss(x + step) - loss(x - step)) / 2e-2
        np.testing.assert_allclose(
            jnp.real(direction * by_x[3, 1]), numeric, rtol=0.05, atol=0.05
        )


def test_a_momentum_may_change_from_step_to_step():
    bn = jaxbn.BatchNorm(debias=True)
    params, state = bn.init(4)
    step = jax.jit(lambda state, x, m: bn.apply(params, state, x, True, momentum=m)[1])
    batches = [normal(float(i), 1.0, rows=8, seed=i) for i in range(4)]
    momenta = [0.0, 0.5, 0.9, 0.2]
    for x, momentum in zip(batches, momenta, strict=True):
        state = step(state, x, momentum)
    assert step._cache_size() == 1
    hidden = weight = 0.0
    for x, m in zip(batches, momenta, strict=True):
        hidden = m * hidden + (1 - m) * x.astype(np.float64).mean(0)
        weight = m * weight + (1 - m)
    np.testing.assert_allclose(state.mean, hidden / weight, rtol=1e-5)


def test_weights_can_be_learned():
    bn = jaxbn.BatchNorm()
    params, state = bn.init(4)
    x = normal(1.0, 2.0, rows=6)
    weights = np.array([0.5, 1.0, 2.0, 0.0, 1.0, 3.0], np.float32)
    d = np.cos(x.astype(np.float64))

    def true_loss(values):
        args = oracle.tree(params), oracle.tree(state), x.astype(np.float64), True
        return (oracle.apply(bn, *args, values["weights"])[0] * d).sum()

    got = jax.grad(lambda w: (bn.apply(params, state, x, True, weights=w)[0] * d).sum())(
        jnp.asarray(weights)
    )
    want = oracle.gradient(true_loss, {"weights": weights.astype(np.float64) + 0})[
        "weights"
    ]
    positive = weights > 0
    np.testing.assert_allclose(got[positive], want[positive], rtol=1e-3, atol=1e-4)


def test_without_feature_axes_everything_is_one_feature():
    bn = jaxbn.BatchNorm(feature_axes=())
    params, state = bn.init(())
    x = np.random.default_rng(4).standard_normal((7, 5)).astype(np.float32)
    y, state = bn.apply(params, state, jnp.asarray(x), True)
    wide = x.astype(np.float64)
    want = (wide - wide.mean()) / np.sqrt(wide.var() + bn.epsilon)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.mean, 0.01 * wide.mean(), rtol=1e-5)


def test_a_huge_value_of_weight_0_changes_nothing():
    x, weights = normal(1.0, 1.0, rows=8), jnp.ones(8).at[3].set(0)
    want = jaxbn.moments(jnp.asarray(x), weights=weights)
    huge = np.where(np.arange(8)[:, None] == 3, np.float32(1e30), x)  # its square is inf
    got = jaxbn.moments(jnp.asarray(huge), weights=weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_y_of_half_precision_is_rounded_once(dtype):
    x = jnp.asarray(normal(200.3, 5.0, rows=64)).astype(dtype)
    bn = jaxbn.BatchNorm()
    y, _ = bn.apply(*bn.init(4), x, True)
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + bn.epsilon)
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=rounding, atol=1e-6)


def test_the_moments_of_nothing_are_0():
    for array in jaxbn.moments(jnp.ones((0, 3))):
        np.testing.assert_array_equal(array, jnp.zeros(3))


def test_gradients_survive_a_large_spread():
    """Where the cube of one over the standard deviation is below the smallest float32."""
    x = normal(0.0, 1e14, rows=16)
    dy = normal(0.0, 1.0, rows=16, seed=1)
    bn = jaxbn.BatchNorm()
    loss = lambda x: (bn.apply(*bn.init(4), x, True)[0] * dy).sum()
    wide, d = x.astype(np.float64), dy.astype(np.float64)
    y = (wide - wide.mean(0)) / wide.std(0)
    want = (d - d.mean(0) - y * (d * y).mean(0)) / wide.std(0)
    np.testing.assert_allclose(
        jax.grad(loss)(jnp.asarray(x)) * 1e14, want * 1e14, atol=1e-5
    )


def test_sums_and_products_of_twice_the_precision():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=4096) * 2.0 ** rng.integers(-12, 12, 4096) for _ in range(2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    both = jax.jit(lambda a, b: (compensated.two_sum(a, b), compensated.two_product(a, b)))
    total, product = (np.add(*np.float64(pair)) for pair in both(a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_allclose(product, a * b, rtol=2.0**-44)


def test_an_ensemble_may_lie_along_any_axis():
    x = jnp.asarray(normal(1.0, 2.0, rows=15)).reshape(5, 3, 4)
    want = jax.vmap(jaxbn.moments)(jnp.moveaxis(x, 1, 0))
    got = jax.vmap(jaxbn.moments, in_axes=1)(x)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_no_gradient_flows_into_running_statistics():
    state = jaxbn.BatchStats(jnp.zeros(3), jnp.ones(3))
    batch = jaxbn.Moments(jnp.ones(3), jnp.ones(3), jnp.full(3, 4.0))

    def tracked(state, batch):
        after = jaxbn.update_running(state, batch, momentum=0.5)
        return after.mean.sum() + after.var.sum()

    for leaf in jax.tree.leaves(jax.grad(tracked, (0, 1))(state, batch)):
        np.testing.assert_array_equal(leaf, 0)
