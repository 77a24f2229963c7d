"""Laws that hold for every normalizer in every execution mode."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.laws import oracle
from tests.laws.modes import MODES
from tests.laws.placed import Placed

# Each normalizer with the shape of one batch and the shape of its weights, or None.
CASES = {
    "default": (jaxbn.BatchNorm(), (6, 3), None),
    "channels_first": (jaxbn.BatchNorm(feature_axes=1, momentum=0.7), (4, 3, 2, 2), None),
    "two_axes": (jaxbn.BatchNorm(feature_axes=(-1, 1), momentum=0.7), (4, 3, 2, 2), None),
    "bare": (jaxbn.BatchNorm(use_scale=False, use_bias=False), (2, 3, 2), None),
    "no_bias": (jaxbn.BatchNorm(use_bias=False, epsilon=0.1), (2, 2, 3, 2), None),
    "unbiased": (jaxbn.BatchNorm(ddof=1, momentum=0.5), (4, 3), None),
    "debiased": (jaxbn.BatchNorm(debias=True, momentum=0.9), (4, 3), None),
    "cumulative": (jaxbn.BatchNorm(momentum=None, ddof=1), (4, 3), None),
    "row_weights": (jaxbn.BatchNorm(momentum=0.7), (5, 3, 2), (5,)),
    "position_weights": (jaxbn.BatchNorm(feature_axes=1, ddof=1), (3, 2, 3), (3, 3)),
    "element_weights": (jaxbn.BatchNorm(momentum=0.7), (6, 3), (6, 3)),
    "renorm": (
        jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.7), momentum=0.8),
        (6, 3),
        None,
    ),
    "renorm_clipped": (
        jaxbn.BatchRenorm(
            jaxbn.BatchNorm(feature_axes=1, epsilon=0.01),
            momentum=0.5,
            limits=jaxbn.RenormLimits(0.9, 1.2, 0.3),
        ),
        (4, 3, 2),
        (4, 2),
    ),
    "ghosts": (
        jaxbn.GhostBatchNorm(jaxbn.BatchNorm(momentum=0.7, ddof=1), 3),
        (6, 2),
        None,
    ),
    "ghosts_strided": (
        jaxbn.GhostBatchNorm(
            jaxbn.BatchNorm(feature_axes=1, momentum=0.7),
            2,
            layout="strided",
            tracking="averaged",
        ),
        (4, 2, 3),
        (4, 3),
    ),
    "ghosts_weighted": (jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 2), (4, 3, 2), (4, 3)),
    "ghosts_renorm": (
        jaxbn.GhostBatchNorm(jaxbn.BatchRenorm(), 2, layout="strided", tracking="averaged"),
        (6, 2, 2),
        None,
    ),
    "domains": (
        Placed(
            jaxbn.DomainBatchNorm(
                jaxbn.GhostBatchNorm(
                    jaxbn.BatchRenorm(jaxbn.BatchNorm(feature_axes=1)), 3, layout="strided"
                ),
                2,
                affine="separate",
            ),
            (1, 0),
        ),
        (6, 2, 3),
        (6, 3),
    ),
}
STEPS = 3


def draw(shape, weights_shape, seed=0, dtype=np.float32):
    """Returns inputs and weights for some steps; what has weight 0 is NaN or infinite."""
    rng = np.random.default_rng(seed)
    xs = (rng.normal(size=(STEPS, *shape)) * 2 + 3).astype(dtype)
    if weights_shape is None:
        return xs, None
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], size=(STEPS, *weights_shape))
    weights[:, 0] = 1.0
    return xs, weights.astype(np.float32)


def poison(normalizer, xs, weights):
    """Hides NaN and infinity where the weight is 0."""
    if weights is None:
        return xs
    axes = oracle.reduced(xs[0], oracle.settings(normalizer).feature_axes)
    zero = np.stack(
        [oracle.align(w, x, axes) == 0 for w, x in zip(weights, xs, strict=True)]
    )
    assert zero.any()
    bad = np.where(np.arange(zero.size).reshape(zero.shape) % 2, np.nan, np.inf)
    return np.where(zero, bad, xs).astype(xs.dtype)


def start(normalizer, shape):
    """Returns params away from 1 and 0, and the initial state."""
    axes = oracle.reduced(np.zeros(shape), oracle.settings(normalizer).feature_axes)
    features = tuple(int(size) for size in np.delete(shape, axes))
    params, state = normalizer.init(features if len(features) > 1 else features[0])

    def moved(leaf):
        by = np.linspace(0.5, 1.5, leaf.size, dtype=np.float32).reshape(leaf.shape)
        return leaf + by.astype(leaf.dtype)

    return jax.tree.map(moved, params), state


def change(normalizer, **settings):
    """Returns the normalizer with other settings of the `BatchNorm` at its heart."""
    for field in ("inner", "bn"):
        if hasattr(normalizer, field):
            inner = change(getattr(normalizer, field), **settings)
            return dataclasses.replace(normalizer, **{field: inner})
    return dataclasses.replace(normalizer, **settings)


def run_oracle(normalizer, params, state, xs, weights, held=None):
    """Returns the outputs of some training steps, and the state before each and after."""
    states, ys = [state], []
    for i, x in enumerate(xs):
        weight = None if weights is None else weights[i]
        hold = None if held is None else (held[0][i], held[1][i])
        y, state = oracle.apply(normalizer, params, state, x, True, weight, hold)
        states.append(state)
        ys.append(y)
    return np.stack(ys), states


# The other modes are compared with the oracle where they are differentiated, below.
@pytest.mark.parametrize("mode", ["eager", "jit", "scan", "by_equinox", "by_haiku"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case, mode):
    normalizer, shape, weights_shape = CASES[case]
    xs, weights = draw(shape, weights_shape)
    xs = poison(normalizer, xs, weights)
    params, state = start(normalizer, shape)
    found = MODES[mode](normalizer, params, state, jnp.asarray(xs), weights)
    check_with_oracle(found, normalizer, params, state, xs, weights)


def check_with_oracle(found, normalizer, params, state, xs, weights):
    ys, after = found
    want_ys, states = run_oracle(
        normalizer, oracle.tree(params), oracle.tree(state), xs.astype(np.float64), weights
    )
    want = states[-1]
    np.testing.assert_allclose(ys, want_ys, rtol=2e-5, atol=2e-5)
    for name, value in after._asdict().items():
        if want[name] is None:
            assert value is None
        else:
            np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-6)


def draw_cotangent(xs):
    return np.random.default_rng(2).normal(size=xs.shape).astype(np.float32)


@functools.cache
def finite_differences(case):
    """Returns the gradients of the params and of x over some steps, of every mode."""
    normalizer, shape, weights_shape = CASES[case]
    xs, weights = draw(shape, weights_shape, seed=1)
    params, state = start(normalizer, shape)
    cotangent = draw_cotangent(xs)
    wide, wide_xs = oracle.tree(state), xs.astype(np.float64)
    _, states = run_oracle(normalizer, oracle.tree(params), wide, wide_xs, weights)

    def true_loss(values):
        values = dict(values)
        held = wide_xs, states
        moved = values.pop("xs")
        return (
            run_oracle(normalizer, values, wide, moved, weights, held)[0] * cotangent
        ).sum()

    return oracle.gradient(true_loss, {**oracle.tree(params), "xs": wide_xs})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences(case, mode):
    normalizer, shape, weights_shape = CASES[case]
    xs, weights = draw(shape, weights_shape, seed=1)
    params, state = start(normalizer, shape)
    cotangent = draw_cotangent(xs)

    def loss(params, xs):
        ys, after = MODES[mode](normalizer, params, state, xs, weights)
        return (ys * cotangent).sum(), (ys, after)

    gradients = jax.grad(loss, (0, 1), has_aux=True)
    (by_params, by_xs), found = gradients(params, jnp.asarray(xs))
    check_with_oracle(found, normalizer, params, state, xs, weights)
    want = finite_differences(case)
    np.testing.assert_allclose(by_xs, want["xs"], rtol=1e-4, atol=1e-5)
    for name, value in by_params._asdict().items():
        if value is not None:
            np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_hidden_nan_reaches_no_gradient(case):
    normalizer, shape, weights_shape = CASES[case]
    xs, weights = draw(shape, weights_shape)
    if weights is None:
        weights = np.ones((STEPS, shape[0]), np.float32)
        weights[:, 1] = 0
    params, state = start(normalizer, shape)
    x, hidden = xs[0], poison(normalizer, xs, weights)[0]
    finite = np.isfinite(hidden)
    cotangent = np.where(finite, np.cos(x), 0)

    def loss(params, x):
        return (
            normalizer.apply(params, state, x, True, weights=weights[0])[0] * cotangent
        ).sum()

    clean, hiding = (
        jax.grad(loss, (0, 1))(params, jnp.asarray(value)) for value in (x, hidden)
    )
    jax.tree.map(np.testing.assert_array_equal, clean[0], hiding[0])
    np.testing.assert_array_equal(np.where(finite, clean[1], 0), hiding[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_equal_finite_differences(case, training, x64):
    """Forward over reverse and reverse over reverse, in float64."""
    normalizer, shape, weights_shape = CASES[case]
    normalizer = change(normalizer, param_dtype="float64")
    xs, weights = draw(shape, weights_shape, dtype=np.float64)
    params, state = start(normalizer, shape)
    options = {} if weights is None else {"weights": weights[0]}

    def loss(params, x):
        return jnp.sin(normalizer.apply(params, state, x, training, **options)[0]).sum()

    gradient = jax.grad(loss, 1)
    x, direction = jnp.asarray(xs[0]), jnp.cos(jnp.asarray(xs[0]))

    @jax.jit
    def derivatives(params, x, direction):
        by_forward = jax.jvp(lambda x: gradient(params, x), (x,), (direction,))[1]
        by_reverse = jax.grad(lambda x: (gradient(params, x) * direction).sum())(x)
        by_jacobians = [j(loss, (0, 1))(params, x) for j in (jax.jacfwd, jax.grad)]
        return by_forward, by_reverse, by_jacobians

    moved = (jax.jit(gradient)(params, x + h * direction) for h in (1e-5, -1e-5))
    want = (next(moved) - next(moved)) / 2e-5
    by_forward, by_reverse, (forward, reverse) = derivatives(params, x, direction)
    np.testing.assert_allclose(by_forward, by_reverse, rtol=1e-9, atol=1e-9)
    if not isinstance(oracle.core(normalizer), jaxbn.BatchRenorm):
        # Differences see r and d move, through which no gradient flows.
        np.testing.assert_allclose(by_forward, want, rtol=1e-6, atol=1e-7)
    jax.tree.map(lambda f, r: np.testing.assert_allclose(f, r, rtol=1e-9), forward, reverse)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_dtypes_and_structure_never_change(case, dtype, x64):
    normalizer, shape, weights_shape = CASES[case]
    xs, weights = draw(shape, weights_shape)
    params, state = start(normalizer, shape)
    xs = jnp.asarray(xs).astype(dtype)
    kinds = lambda tree: jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree
    )
    options = {} if weights is None else {"weights": jnp.asarray(weights[0])}
    wide = change(normalizer, dtype="float32")
    for training in (True, False, jnp.array(True)):

        def run(layer, x, options, training=training):
            return layer.apply(params, state, x, training, **options)

        # Programs are traced and not compiled: types are known by then.
        y, after = jax.eval_shape(functools.partial(run, normalizer), xs[0], options)
        assert y.dtype == dtype
        assert kinds(after) == kinds(state)
        y, _ = jax.eval_shape(functools.partial(run, wide), xs[0], options)
        assert y.dtype == jnp.float32


@pytest.mark.parametrize("case", CASES)
def test_rebuilding_an_equal_value_does_not_retrace(case):
    normalizer, shape, weights_shape = CASES[case]
    xs, _ = draw(shape, weights_shape)
    params, state = start(normalizer, shape)
    traces = []

    @jax.jit
    def step(normalizer, params, state, x):
        traces.append(x.shape)
        return normalizer.apply(params, state, x, True)

    for x in xs:
        rebuilt = dataclasses.replace(normalizer)
        assert rebuilt == normalizer
        assert hash(rebuilt) == hash(normalizer)
        assert pickle.loads(pickle.dumps(rebuilt)) == normalizer
        names = {"dtype": np.dtype, "Placed": Placed, **vars(jaxbn)}
        assert eval(repr(rebuilt), names) == normalizer
        _, state = step(rebuilt, params, state, x)
    assert len(traces) == 1


@pytest.mark.parametrize("case", CASES)
def test_inference_returns_the_state_itself_and_uses_it(case):
    normalizer, shape, weights_shape = CASES[case]
    xs, weights = draw(shape, weights_shape)
    params, state = start(normalizer, shape)
    _, state = MODES["eager"](normalizer, params, state, jnp.asarray(xs), weights)
    for training in (False, jnp.array(False)):
        y, after = normalizer.apply(params, state, jnp.asarray(xs[0]), training)
        jax.tree.map(np.testing.assert_array_equal, after, state)
        want, _ = oracle.apply(
            normalizer, oracle.tree(params), oracle.tree(state), xs[0], False
        )
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_no_gradient_flows_into_the_state(case):
    normalizer, shape, weights_shape = CASES[case]
    xs, _ = draw(shape, weights_shape)
    params, state = start(normalizer, shape)

    def tracked(x, mean):
        _, after = normalizer.apply(params, state._replace(mean=mean), x, True)
        return sum(leaf.sum() for leaf in jax.tree.leaves(after))

    for gradient in jax.grad(tracked, (0, 1))(jnp.asarray(xs[0]), state.mean):
        assert not gradient.any()
