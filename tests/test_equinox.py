"""Equinox: what its layer does, ours does too, but for what is wrong there."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.equinox

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 3, 4)) * 2 + 3


def over(layer, axis_name="batch", **options):
    """Returns the layer mapped over examples, as Equinox has it."""
    run = lambda x, state: layer(x, state, **options)
    return jax.vmap(run, axis_name=axis_name, in_axes=(0, None), out_axes=(0, None))


def make(*args, cls=jaxbn.equinox.BatchNorm, **kwargs):
    return eqx.nn.make_with_state(cls)(*args, **kwargs)


def copy(state):
    """Returns a State that may be used once more."""
    return jax.tree.map(lambda leaf: leaf, state)


def stats_of(layer, state):
    return state.get(layer.ema_state_index or layer.batch_state_index)


def run(layer, state, steps=3):
    """Returns outputs, gradients, running statistics, and the output of inference."""
    dynamic, static = eqx.partition(layer, eqx.is_inexact_array)

    @eqx.filter_jit
    def step(dynamic, x, state):
        def loss(dynamic, x):
            y, after = over(eqx.combine(dynamic, static))(x, state)
            return jnp.sin(y).sum(), (y, after)

        return jax.grad(loss, (0, 1), has_aux=True)(dynamic, x)

    outputs = []
    for i in range(steps):
        gradients, (y, state) = step(dynamic, X[::-1] * (i + 1), state)
        outputs.append((y, jax.tree.leaves(gradients)))
    infer = eqx.filter_jit(over(eqx.nn.inference_mode(layer)))
    return outputs, stats_of(layer, state), infer(X, copy(state))[0]


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("batch", {}),
        ("batch", {"eps": 0.1, "channelwise_affine": False}),
        ("ema", {"momentum": 0.5}),
        ("ema", {"channelwise_affine": False, "eps": 0.1}),
    ],
)
def test_training_is_that_of_equinox(mode, settings):
    settings = {"momentum": 0.9, "mode": mode, **settings}
    outputs, stats, inferred = run(*make(3, "batch", **settings))
    want_outputs, hidden, want = run(*make(3, "batch", cls=eqx.nn.BatchNorm, **settings))
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    jax.tree.map(near, outputs, want_outputs)
    if mode == "ema":
        jax.tree.map(near, tuple(stats), hidden)
        near(inferred, want)
    else:
        near(stats.mean, hidden[0] / (1 - 0.9**3))
        near(stats.var, (hidden[1] - 0.9**3) / (1 - 0.9**3))


def test_the_variance_of_inference_is_that_of_the_batches_from_the_first_step_on():
    x = np.random.default_rng(0).normal(size=(64, 1))
    x = (x - x.mean()) / x.std() * np.sqrt(2.93) + 5
    layer, state = make(1, "batch")
    theirs, their_state = make(1, "batch", mode="batch", cls=eqx.nn.BatchNorm)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3)
    mine, other = (jax.jit(over(each)) for each in (layer, theirs))
    for step in range(1, 11):
        _, state = mine(jnp.asarray(x, jnp.float32), state)
        _, their_state = other(jnp.asarray(x, jnp.float32), their_state)
        near(stats_of(layer, state).var, 2.93)
        if step in (1, 2, 10):
            used = stats_of(theirs, their_state)[1] / (1 - 0.99**step)
            near(used, {1: 101.93, 2: 52.18, 10: 12.39}[step])


def test_a_whole_batch_without_an_axis_name_is_a_mapped_one():
    named, state = make(3, "batch")
    whole, other = make(3)
    y, state = over(named)(X, state)
    z, other = eqx.filter_jit(whole)(X, other)
    np.testing.assert_allclose(y, z, atol=1e-6)
    for a, b in zip(stats_of(named, state), stats_of(whole, other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    last, state = make(3, feature_axes=-1)
    np.testing.assert_allclose(
        last(X.swapaxes(1, 2), state)[0], z.swapaxes(1, 2), atol=1e-6
    )
    # Before any step, inference is the identity but for epsilon.
    for mode in ("batch", "ema"):
        layer, state = make(3, mode=mode, inference=True)
        np.testing.assert_allclose(layer(X, state)[0], X, rtol=1e-4)


def test_modes_and_keywords_of_the_call():
    layer, state = make(3)
    y, after = layer(X, copy(state))
    same, kept = layer(X, copy(state), update_stats=False)
    np.testing.assert_array_equal(y, same)
    assert eqx.tree_equal(kept, state)
    for flag, want in ((True, layer(X, copy(state), inference=True)), (False, (y, after))):
        traced = jax.jit(lambda f: layer(X, copy(state), inference=f))(jnp.array(flag))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), traced, want)
    # Under jax.vmap, a scalar weighs an example; what has weight 0 may be anything.
    named, start = make(3, "batch")
    step = lambda x, w, s: named(x, s, weights=w)
    mapped = jax.vmap(step, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))
    kept = jnp.arange(8) < 5
    _, weighed = mapped(X.at[5:].set(jnp.nan), kept, copy(start))
    _, want = over(named)(X[:5], start)
    for a, b in zip(stats_of(named, weighed), stats_of(named, want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_statistics_keep_their_digits_whatever_x_is():
    layer, state = make(3)
    noise = np.random.default_rng(0).normal(size=(4096, 3)) * 0.1
    _, after = layer(jnp.asarray(1e4 + noise, jnp.float32), copy(state))
    rounded = np.asarray(1e4 + noise, np.float32).astype(np.float64)
    np.testing.assert_allclose(stats_of(layer, after).var, rounded.var(0), rtol=1e-5)
    # A batch that is not finite leaves a channel as it was.
    _, kept = layer(X.at[0, 0, 0].set(jnp.inf), copy(after))
    assert stats_of(layer, kept).var[0] == stats_of(layer, after).var[0]
    assert np.isfinite(stats_of(layer, kept).mean).all()
    half = X.astype(jnp.bfloat16)
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), eqx.filter(layer, eqx.is_array))
    for model, dtype in ((layer, jnp.float32), (eqx.combine(cast, layer), jnp.bfloat16)):
        y, after = model(half, copy(state))
        assert y.dtype == dtype
        assert stats_of(layer, after).var.dtype == jnp.float32
        want = half.astype(jnp.float32).mean((0, 2))
        np.testing.assert_allclose(stats_of(layer, after).mean, want, rtol=1e-5)
        assert model(half, after, inference=True)[0].dtype == dtype


class Net(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.Module
    other: eqx.Module

    def __init__(self, key, norm=jaxbn.equinox.BatchNorm, **settings):
        self.linear = eqx.nn.Linear(4, 3, key=key)
        self.norm = norm(3, "batch", momentum=0.9, mode="batch", **settings)
        self.other = norm(3, "batch", momentum=0.9, mode="ema", **settings)

    def __call__(self, x, state):
        x, state = self.norm(self.linear(x), state)
        return self.other(jnp.tanh(x), state)


def test_an_ensemble_serialisation_and_a_sequence(tmp_path):
    keys = jax.random.split(KEY, 2)
    ensemble, states = eqx.filter_vmap(eqx.nn.make_with_state(Net))(keys)
    forward = eqx.filter_vmap(lambda model, state, x: over(model)(x, state))
    run = eqx.filter_jit(lambda m, s: forward(m, s, jnp.stack([X[:, 0], X[:, 1]])))
    y, states = run(ensemble, states)
    model, state = eqx.nn.make_with_state(Net)(keys[1])
    want, state = eqx.filter_jit(over(model))(X[:, 1], state)
    np.testing.assert_allclose(y[1], want, atol=1e-5)
    for stack, leaf in zip(*map(jax.tree.leaves, (states, state)), strict=True):
        np.testing.assert_allclose(stack[1], leaf, atol=1e-5)
    eqx.tree_serialise_leaves(tmp_path / "a.eqx", (model, state))
    like = eqx.filter_eval_shape(eqx.nn.make_with_state(Net), KEY)
    read = eqx.tree_deserialise_leaves(tmp_path / "a.eqx", like)
    assert eqx.tree_equal(read, (model, state))
    layers = [eqx.nn.Lambda(jnp.sin), jaxbn.equinox.BatchNorm(3, "batch")]
    layers.append(jaxbn.equinox.Norm(jaxbn.BatchRenorm(), 4))  # at the last axis
    sequence, state = eqx.nn.make_with_state(eqx.nn.Sequential)(layers)
    assert over(eqx.nn.inference_mode(sequence))(X, state)[0].shape == X.shape


def test_statistics_are_gathered_and_re_estimated_in_the_state():
    layer, state = make(3, momentum=0.5)
    norm, other = make(jaxbn.BatchNorm(feature_axes=1, debias=True, momentum=0.5), 3,
                       cls=jaxbn.equinox.Norm)  # fmt: skip
    both = (state, other)

    @jax.jit
    def step(states, x):
        return tuple(m(x, s)[1] for m, s in zip((layer, norm), states, strict=True))

    both = step(both, X * 2)
    gathered = jaxbn.gather(copy(both))
    for part in jnp.split(X, 4):
        gathered = step(gathered, part)
    pooled = jaxbn.track_gathered(gathered)
    want = step(copy(both), X)
    # And a step after: what the averages have seen was counted once.
    pairs = (pooled, want), (step(copy(pooled), X * 3), step(copy(want), X * 3))
    for after, expected in pairs:
        got = stats_of(layer, after[0])
        for name in ("mean", "var"):
            for tracked in (stats_of(layer, expected[0]), after[1].get(norm.state_index)):
                a, b = getattr(got, name), getattr(tracked, name)
                np.testing.assert_allclose(a, b, rtol=1e-5)
    renewed = jaxbn.reestimate(step, both, jnp.split(X, 4))
    np.testing.assert_allclose(stats_of(layer, renewed[0]).var, X.var((0, 2)), rtol=1e-5)


def test_layers_of_equinox_are_replaced_with_what_they_have_tracked():
    model, state = eqx.nn.make_with_state(Net)(KEY, norm=eqx.nn.BatchNorm)
    step = eqx.filter_jit(lambda model, state, x: over(model)(x, state))
    for i in range(3):
        _, state = step(model, state, X[:, 0] * (i + 1))
    infer = lambda model, state: step(eqx.nn.inference_mode(model), state, X[:, 1])[0]
    ours, renewed = jaxbn.equinox.replace(model, copy(state), variance="used")
    assert isinstance(ours.norm, jaxbn.equinox.BatchNorm)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    near(infer(ours, renewed), infer(model, state))
    ours, renewed = jaxbn.equinox.replace(model, copy(state))
    y, renewed = step(ours, renewed, X[:, 2])
    want, state = step(model, state, X[:, 2])
    near(y, want)
    near(stats_of(ours.norm, renewed).mean, stats_of(model.norm, state)[0] / (1 - 0.9**4))
    near(stats_of(ours.other, renewed).var, stats_of(model.other, state)[1])
    with pytest.raises(ValueError, match=r"no eqx\.nn\.BatchNorm in the Net"):
        jaxbn.equinox.replace(ours, renewed)
