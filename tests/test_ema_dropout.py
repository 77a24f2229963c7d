"""Averages of pytrees, and dropout in both conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

VALUES = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32) + 2


def average(ema, **options):
    """Returns the averages after each value, by one compiled update."""
    state = ema.init({"w": jnp.zeros(4), "step": jnp.array(0)})
    update = jax.jit(ema.update)
    seen = []
    for n, value in enumerate(VALUES):
        extra = {name: option(n) for name, option in options.items()}
        state = update(state, {"w": value, "step": jnp.array(n)}, **extra)
        seen.append(np.asarray(ema.value(state)["w"]))
        assert ema.value(state)["step"] == n
    assert update._cache_size() == 1
    return np.stack(seen)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("schedule", ["constant", "num_updates", "decay"])
@pytest.mark.parametrize("debias", [False, True])
def test_an_average_is_that_of_the_definition(decay, schedule, debias):
    decays = {
        "constant": lambda n: decay,
        "num_updates": lambda n: min(decay, (1 + n) / (10 + n)),
        "decay": lambda n: decay * n / 20,
    }[schedule]
    options = {
        "constant": {},
        "num_updates": {"num_updates": lambda n: n},
        "decay": {"decay": decays},
    }[schedule]
    got = average(jaxbn.Ema(decay, debias=debias), **options)
    hidden, weight, want = np.zeros(4), 0.0, []
    for n, value in enumerate(VALUES.astype(np.float64)):
        d = decays(n)
        hidden, weight = d * hidden + (1 - d) * value, d * weight + 1 - d
        want.append(hidden / weight if debias else hidden)
    np.testing.assert_allclose(got, want, rtol=1e-4 if schedule == "decay" else 1e-5)


def test_an_average_starts_at_the_tree_and_is_kept_in_float32():
    ema = jaxbn.Ema(0.9)
    tree = {"w": jnp.ones(3, jnp.bfloat16)}
    state = ema.update(ema.init(tree), {"w": 3 * tree["w"]})
    assert ema.value(state)["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema.value(state)["w"], 1.2)
    assert ema.value(state, like=tree)["w"].dtype == jnp.bfloat16


def test_params_and_statistics_are_averaged_together_without_a_gradient():
    bn = jaxbn.BatchNorm(use_bias=False)
    ema = jaxbn.Ema(0.9)
    both = bn.init(4)
    state = ema.init(both)
    params, stats = ema.value(ema.update(state, both))
    assert params.bias is None
    assert isinstance(stats, jaxbn.BatchStats)
    gradient = jax.grad(lambda w: ema.update(ema.init(jnp.zeros(2)), w).average.sum())
    np.testing.assert_array_equal(gradient(jnp.ones(2)), 0)


@pytest.mark.parametrize(
    ("call", "fact"),
    [
        (lambda: jaxbn.Ema(1.5), "1.5"),
        (lambda: jaxbn.Ema("0.9"), "'0.9'"),
        (
            lambda: jaxbn.Ema(0.9).update(jaxbn.Ema(0.9).init([1.0]), {"w": 1.0}),
            "structure",
        ),
        (lambda: jaxbn.Ema(0.9).update(jaxbn.Ema(0.9).init(1.0), 1.0, decay=-1.0), "-1.0"),
    ],
)
def test_a_wrong_average_is_refused(call, fact):
    with pytest.raises((ValueError, TypeError), match=fact):
        call()


X = jnp.asarray(np.random.default_rng(1).normal(size=(50, 40, 3)).astype(np.float32))
KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("scaled_at", ["training", "inference"])
@pytest.mark.parametrize("traced", [False, True])
def test_dropout_keeps_the_scale_in_either_convention(rate, scaled_at, traced):
    mode = jnp.array if traced else bool
    train, infer = (
        jax.jit(
            jaxbn.dropout, static_argnames=("scaled_at", *([] if traced else ["training"]))
        )(KEY, X, rate, training=mode(training), scaled_at=scaled_at)
        for training in (True, False)
    )
    kept = np.asarray(train) != 0
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / X.size) + 1e-9
    factor = 1 / (1 - rate) if scaled_at == "training" else 1.0
    np.testing.assert_allclose(train[kept], X[kept] * factor, rtol=1e-6)
    np.testing.assert_allclose(
        infer, X if scaled_at == "training" else X * (1 - rate), rtol=1e-6
    )


def test_dropout_drops_along_axes_together_and_its_gradient_likewise():
    def drop(x):
        return jaxbn.dropout(KEY, x, 0.5, True, broadcast_axes=(1,))

    kept = np.asarray(drop(X)) != 0
    assert (kept == kept[:, :1]).all()
    gradient = jax.grad(lambda x: drop(x).sum())(X)
    np.testing.assert_array_equal(gradient, np.where(kept, 2.0, 0.0))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"rate": 1.0}, "1.0"),
        ({"rate": -0.1}, "-0.1"),
        ({"scaled_at": "never"}, "never"),
        ({"broadcast_axes": (3,)}, "axis 3"),
        ({"x": jnp.ones((2, 2), int)}, "int32"),
        ({"training": 1}, "got 1"),
    ],
)
def test_a_wrong_dropout_is_refused(options, fact):
    arguments = {"key": KEY, "x": X, "rate": 0.5, "training": True, **options}
    with pytest.raises((ValueError, TypeError), match=fact):
        jaxbn.dropout(**arguments)
