"""Haiku: what its layer does, ours does too, but for what is wrong there."""

import contextlib
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


def compiled(*args, **settings):
    """Returns `init` and `apply` as one program each, for modes that are not traced."""
    model = transformed(*args, **settings)
    init = jax.jit(model.init, static_argnums=(2, 3))
    return init, jax.jit(model.apply, static_argnums=(4, 5))


@contextlib.contextmanager
def lenient():
    """Lets Haiku promote as it needs to; ours must not need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def near(got, want, tolerance=2e-5):
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, got, want)


# Every argument of Haiku's layer, and the shape of an input.
EXAMPLES = {
    "images": ({"eps": 0.1, "decay_rate": 0.5}, (2, 3, 4, 3)),
    "channels first": ({"data_format": "NCHW", "create_offset": False}, (2, 3, 4, 4)),
    "axis from the end": ({"axis": [0, -1]}, (4, 2, 3)),
    "no params": ({"create_scale": False, "create_offset": False}, (8, 3)),
    "initializers": (
        {"scale_init": hk.initializers.RandomNormal(), "offset_init": jnp.ones},
        (8, 3),
    ),
    "all features": ({"axis": []}, (2, 3)),
}


@lenient()
@pytest.mark.parametrize("name", EXAMPLES)
def test_arguments_trees_and_steps_are_those_of_haiku(name):
    settings, shape = EXAMPLES[name]
    init, apply = compiled(**settings)
    their_init, their_apply = compiled(hk.BatchNorm, **settings)
    xs = jax.random.normal(KEY, (4, *shape)) * 2 + 1
    params, state = init(KEY, xs[0], True)
    their_params, their_state = their_init(KEY, xs[0], True)
    assert kinds((params, state)) == kinds((their_params, their_state))
    near(params, their_params, 0)

    @jax.jit
    def step(params, state, their_state, x):
        def loss(params, x, apply, state):
            y, after = apply(params, state, None, x, True)
            return jnp.sin(y).sum(), (y, after)

        both = (apply, state), (their_apply, their_state)
        gradient = jax.grad(loss, (0, 1), has_aux=True)
        return [gradient(params, x, *each) for each in both]

    for x in xs[:3]:
        ours, theirs = step(params, state, their_state, x)
        (got, (y, state)), (want, (their_y, their_state)) = ours, theirs
        near((y, state), (their_y, their_state))
        near(got, want, 2e-4)
    # What Haiku saved is read, and the other way round.
    for local in (False, True):
        want = their_apply(params, their_state, None, xs[3], False, local)
        near(apply(params, their_state, None, xs[3], False, local), want)
        near(their_apply(params, state, None, xs[3], False, local), want)
    near(
        step(params, their_state, state, xs[3])[0][1],
        step(params, state, state, xs[3])[1][1],
    )


@pytest.mark.parametrize("shape", [(3,), (8, 1), ()])
def test_scale_and_offset_of_the_call(shape):
    settings = {"create_scale": False, "create_offset": False}
    _, apply = compiled(**settings)
    their_init, their_apply = compiled(hk.BatchNorm, **settings)
    call = {"scale": jax.random.normal(KEY, shape), "offset": np.full(shape, 0.5)}
    with lenient():
        _, state = their_init(None, X, True)
        _, state = their_apply({}, state, None, X, True)
    for mode in ((True,), (False,), (False, True)):
        with lenient():
            want = their_apply({}, state, None, X, *mode, **call)
        near(apply({}, state, None, X, *mode, **call), want)


def test_nothing_is_nan_and_digits_are_kept():
    init, apply = compiled()
    noise = np.random.default_rng(0).normal(size=(4096, 8)) * 0.1
    x = jnp.asarray(1e4 + noise, jnp.float32)
    params, state = init(None, x, True)
    y, state = apply(params, state, None, x, True)
    rounded = np.asarray(x, np.float64)
    var = state["batch_norm/~/var_ema"]["average"]
    np.testing.assert_allclose(var[0], rounded.var(0), rtol=1e-5)
    want = (rounded - rounded.mean(0)) / np.sqrt(rounded.var(0) + 1e-5)
    np.testing.assert_allclose(y, want, atol=1e-4)
    # A feature that is not finite keeps its averages, and a batch without any its count.
    _, after = apply(params, state, None, x.at[0, 0].set(jnp.inf), True)
    for name in ("mean_ema", "var_ema"):
        before, kept = state[f"batch_norm/~/{name}"], after[f"batch_norm/~/{name}"]
        assert kept["average"][0, 0] == before["average"][0, 0]
        assert kept["counter"] == 2
    _, after = apply(params, state, None, x * jnp.nan, True)
    near(after, state, 0)


def test_the_start_is_valid_and_needs_neither_training_nor_an_axis():
    init, apply = compiled(cross_replica_axis="device")
    params, state = init(None, X, False)
    near(init(None, X, True), (params, state), 0)
    near(apply(params, state, None, X, False)[0], X, 1e-4)
    run = lambda x: apply(params, state, None, x, True)
    y, after = jax.vmap(run, axis_name="device")(X.reshape(4, 2, 3))
    want, alone = compiled()[1](params, state, None, X, True)
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


def test_channels_may_be_sharded_on_an_explicit_mesh():
    kinds_of_axes = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh(
        (2, 3), ("data", "model"), kinds_of_axes, devices=jax.devices()[:6]
    )
    init, apply = compiled()
    params, state = init(None, X, True)
    want = apply(params, state, None, X, True)
    spec = jax.sharding.PartitionSpec
    place = lambda leaf: jax.device_put(
        leaf, jax.NamedSharding(mesh, spec(None, "model") if leaf.ndim else spec())
    )
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, spec("data", "model")))
        placed = jax.tree.map(place, (params, state))
        y, after = apply(*placed, None, x, True)
        near((y, after), want)
        near(
            apply(placed[0], after, None, x, False),
            (apply(params, want[1], None, X, False)),
        )
    assert after["batch_norm/~/var_ema"]["average"].sharding.spec == spec(None, "model")
