"""Haiku: what its layer does, ours does too, but for what is wrong there."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.haiku

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 3)) * 2 + 3


def transformed(cls=jaxbn.haiku.BatchNorm, **settings):
    settings = {"create_scale": True, "create_offset": True, "decay_rate": 0.9, **settings}
    return hk.transform_with_state(
        lambda x, *mode, **call: cls(**settings)(x, *mode, **call)
    )


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def near(got, want, tolerance=2e-5):
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, got, want)


# Every argument of Haiku's layer, and the shape of an input.
EXAMPLES = {
    "defaults": ({}, (8, 3)),
    "images": ({"eps": 0.1, "decay_rate": 0.5}, (2, 3, 4, 3)),
    "channels first": ({"data_format": "NCHW", "create_offset": False}, (2, 3, 4, 4)),
    "axis": ({"axis": [0]}, (8, 2, 3)),
    "axis from the end": ({"axis": [0, -1]}, (4, 2, 3)),
    "no params": ({"create_scale": False, "create_offset": False}, (8, 3)),
    "initializers": (
        {"scale_init": hk.initializers.RandomNormal(), "offset_init": jnp.ones},
        (8, 3),
    ),
    "all features": ({"axis": []}, (2, 3)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_arguments_trees_and_steps_are_those_of_haiku(name):
    settings, shape = EXAMPLES[name]
    ours, theirs = transformed(**settings), transformed(hk.BatchNorm, **settings)
    xs = jax.random.normal(KEY, (4, *shape)) * 2 + 1
    params, state = ours.init(KEY, xs[0], True)
    their_params, their_state = theirs.init(KEY, xs[0], True)
    assert kinds((params, state)) == kinds((their_params, their_state))
    near(params, their_params, 0)

    def step(model, params, state, x):
        def loss(params, x):
            y, after = model.apply(params, state, None, x, True)
            return jnp.sin(y).sum(), (y, after)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    mine, other = (jax.jit(functools.partial(step, model)) for model in (ours, theirs))
    for x in xs[:3]:
        gradients, (y, state) = mine(params, state, x)
        want, (their_y, their_state) = other(params, their_state, x)
        near((y, state), (their_y, their_state))
        near(gradients, want, 2e-4)
    # What Haiku saved is read, and the other way round.
    for model in (ours, theirs):
        for local in (False, True):
            read = [
                model.apply(params, s, None, xs[3], False, local)
                for s in (state, their_state)
            ]
            near(read[0], read[1])
            near(read[0][0], ours.apply(params, state, None, xs[3], False, local)[0])
    near(mine(params, their_state, xs[3])[1][1], other(params, state, xs[3])[1][1])


@pytest.mark.parametrize("shape", [(3,), (8, 1), (1, 1), ()])
def test_scale_and_offset_of_the_call(shape):
    settings = {"create_scale": False, "create_offset": False}
    ours, theirs = transformed(**settings), transformed(hk.BatchNorm, **settings)
    call = {"scale": jax.random.normal(KEY, shape), "offset": np.full(shape, 0.5)}
    _, state = theirs.init(None, X, True)
    _, state = theirs.apply({}, state, None, X, True)
    for mode in ((True,), (False,), (False, True)):
        with jax.numpy_rank_promotion("allow"):
            want = theirs.apply({}, state, None, X, *mode, **call)
        near(ours.apply({}, state, None, X, *mode, **call), want)


def test_nothing_is_nan_and_digits_are_kept():
    model = transformed()
    noise = np.random.default_rng(0).normal(size=(4096, 8)) * 0.1
    x = jnp.asarray(1e4 + noise, jnp.float32)
    params, state = model.init(None, x, True)
    y, state = model.apply(params, state, None, x, True)
    rounded = np.asarray(x, np.float64)
    var = state["batch_norm/~/var_ema"]["average"]
    np.testing.assert_allclose(var[0], rounded.var(0), rtol=1e-5)
    want = (rounded - rounded.mean(0)) / np.sqrt(rounded.var(0) + 1e-5)
    np.testing.assert_allclose(y, want, atol=1e-4)
    # A feature that is not finite keeps its averages, and a batch without any its count.
    _, after = model.apply(params, state, None, x.at[0, 0].set(jnp.inf), True)
    for name in ("mean_ema", "var_ema"):
        before, kept = state[f"batch_norm/~/{name}"], after[f"batch_norm/~/{name}"]
        assert kept["average"][0, 0] == before["average"][0, 0]
        assert kept["counter"] == 2
    _, after = model.apply(params, state, None, x * jnp.nan, True)
    near(after, state, 0)


def test_the_start_is_valid_and_needs_neither_training_nor_an_axis():
    model = transformed(cross_replica_axis="device")
    params, state = model.init(None, X, False)
    near(model.init(None, X, True), (params, state), 0)
    near(model.apply(params, state, None, X, False)[0], X, 1e-4)
    run = lambda x: model.apply(params, state, None, x, True)
    y, after = jax.vmap(run, axis_name="device")(X.reshape(4, 2, 3))
    want, alone = transformed().apply(params, state, None, X, True)
    near((y.reshape(8, 3), jax.tree.map(lambda leaf: leaf[0], after)), (want, alone))


def test_modes_and_keywords_of_the_call():
    model = transformed()
    params, state = model.init(None, X, True)
    apply = functools.partial(model.apply, params, state, None, X)
    near(apply(True, update_stats=False), (apply(True)[0], state), 0)
    for local in (False, True):
        traced = jax.jit(lambda t, local=local: apply(t, local))
        for flag in (True, False):
            near(traced(jnp.array(flag)), apply(flag, local), 1e-6)
    hidden = X.at[5:].set(jnp.nan)
    weighed = model.apply(params, state, None, hidden, True, weights=jnp.arange(8) < 5)
    near(weighed[1], model.apply(params, state, None, X[:5], True)[1])
    by_decay = lambda decay: transformed(decay_rate=decay).apply(
        params, state, None, X, True
    )
    near(jax.jit(by_decay)(0.9), apply(True), 1e-5)


def test_averages_of_half_inputs_are_float32():
    half = X.astype(jnp.bfloat16)
    model = transformed()
    params, state = model.init(None, half, True)
    assert params["batch_norm"]["scale"].dtype == jnp.bfloat16
    y, after = model.apply(params, state, None, half, True)
    assert y.dtype == jnp.bfloat16
    assert kinds(after) == kinds(state)
    mean = after["batch_norm/~/mean_ema"]["average"]
    np.testing.assert_allclose(mean[0], half.astype(jnp.float32).mean(0), rtol=1e-5)
    # A state that Haiku kept in half precision is read, and goes on in float32.
    cast = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, after
    )
    _, wide = model.apply(params, cast, None, half, True)
    assert kinds(wide) == kinds(state)
    wide, _ = transformed().apply(jax.tree.map(lambda a: a.astype(jnp.float32), params),
                                  state, None, half, True)  # fmt: skip
    assert wide.dtype == jnp.float32


class Center:
    """A normalizer that a user wrote: params None, state a bare array."""

    def init(self, num_features):
        return None, jnp.zeros((1, num_features))

    def apply(self, params, state, x, training):
        mean = x.mean(0, keepdims=True) if training else state
        return x - mean, 0.9 * state + 0.1 * mean if training else state


def test_norm_runs_a_normalizer_of_ones_own():
    model = hk.transform_with_state(lambda x, t: jaxbn.haiku.Norm(Center())(x, t))
    params, state = model.init(None, X, True)
    near(model.apply(params, state, None, X, False)[0], X, 0)
    y, state = model.apply(params, state, None, X, True)
    near(y, X - X.mean(0, keepdims=True), 1e-6)
    near(state["norm"]["state"], 0.1 * X.mean(0, keepdims=True), 1e-6)
