"""What tf1 refuses, warns of and allows to be traced; its numbers are in test_golden.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import tf1

LAYER, CONTRIB = tf1.batch_normalization, tf1.batch_norm
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
IMAGES = X.reshape(6, 1, 1, 3)


def apply(layer, shape=(6, 3), training=True):
    return layer.apply(*layer.init(shape), X, training)


# What TensorFlow refused, and what cannot be meant: the call, the error, the fact.
MISTAKES = {
    "axis_tuple": (lambda: LAYER(axis=(1, 2)), TypeError, r"tuple"),
    "axis_text": (lambda: LAYER(axis=["a"]), TypeError, "'a'"),
    "axis_twice": (lambda: LAYER(axis=[1, -2]).init((4, 3, 2)), ValueError, "twice"),
    "axis_out_of_range": (lambda: LAYER(axis=2).init((4, 3)), ValueError, "axis 2"),
    "momentum": (lambda: LAYER(momentum=1.5), ValueError, "1.5"),
    "decay": (lambda: CONTRIB(decay=-0.1), ValueError, "-0.1"),
    "renorm_decay": (lambda: CONTRIB(renorm=True, renorm_decay=2.0), ValueError, "2.0"),
    "clipping_key": (
        lambda: LAYER(renorm=True, renorm_clipping={"r_max": 2.0}), ValueError, "r_max",
    ),
    "rmax": (lambda: LAYER(renorm=True, renorm_clipping={"rmax": 0.5}), ValueError, "0.5"),
    "rmin": (lambda: LAYER(renorm=True, renorm_clipping={"rmin": 2.0}), ValueError, "2.0"),
    "dmax": (lambda: LAYER(renorm=True, renorm_clipping={"dmax": -1.0}), ValueError, "-1.0"),
    "virtual_size_zero": (lambda: LAYER(virtual_batch_size=0), ValueError, "0"),
    "virtual_size_at_inference": (
        lambda: apply(LAYER(virtual_batch_size=4), (8, 3), training=False), ValueError,
        "=4 .* 6 rows",
    ),
    "virtual_size_and_adjustment": (
        lambda: LAYER(virtual_batch_size=2, adjustment=lambda shape: (1, 0)), ValueError,
        "adjustment",
    ),
    "data_format": (lambda: CONTRIB(data_format="NWC"), ValueError, "NWC"),
    "renorm_and_weights": (
        lambda: CONTRIB(renorm=True, batch_weights=jnp.ones(3)), ValueError, "batch_weights",
    ),
    "float64_fused": (lambda: CONTRIB().init((4, 3), jnp.float64), TypeError, "float64"),
    "params_missing": (
        lambda: LAYER().apply({"gamma": jnp.ones(3)}, {}, X), ValueError, "beta",
    ),
    "params_of_another_shape": (lambda: apply(LAYER(), (4, 5)), ValueError, "params"),
    "training_int": (lambda: apply(LAYER(), training=1), TypeError, "got 1"),
    "weights_shape": (
        lambda: apply(CONTRIB(batch_weights=jnp.ones(5))), ValueError, r"\(5,\)",
    ),
    "adjustment_shape": (
        lambda: apply(LAYER(adjustment=lambda shape: (jnp.ones(5), jnp.ones(5)))),
        ValueError, r"5",
    ),
    "keep_prob_zero": (lambda: tf1.dropout(KEY, X, 0.0), ValueError, "0.0"),
    "keep_prob_above_one": (lambda: tf1.dropout(KEY, X, 1.2), ValueError, "1.2"),
    "keep_prob_and_rate": (lambda: tf1.dropout(KEY, X, 0.5, rate=0.5), ValueError, "rate"),
    "neither_keep_prob_nor_rate": (lambda: tf1.dropout(KEY, X), ValueError, "rate"),
    "noise_shape": (lambda: tf1.dropout(KEY, X, 0.5, [6]), ValueError, r"6"),
    "ema_decay": (lambda: tf1.ExponentialMovingAverage(1.1), ValueError, "1.1"),
    "ema_of_ints": (
        lambda: tf1.ExponentialMovingAverage(0.9).init(jnp.ones(2, int)), TypeError, "int32",
    ),
    "moments_axis": (lambda: tf1.moments(X, [2]), ValueError, "2"),
    "moments_axis_twice": (lambda: tf1.moments(X, [1, -1]), ValueError, "not different"),
    "weights_negative": (
        lambda: tf1.weighted_moments(X, [0], -jnp.ones((6, 1))), ValueError, "-1.0",
    ),
    "fused_inference_without_moments": (
        lambda: tf1.fused_batch_norm(IMAGES, X[0], X[0], is_training=False), ValueError, "mean",
    ),
    "fused_rank": (lambda: tf1.fused_batch_norm(X, X[0], X[0]), ValueError, "4"),
    "parameters_that_do_not_broadcast": (
        lambda: tf1.nn_batch_normalization(X, jnp.ones(5), jnp.ones(5), None, None, 1e-3),
        ValueError, r"\(5,\)",
    ),
    "argument_of_the_other_layer": (lambda: CONTRIB(momentum=0.9), TypeError, "momentum"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_fact_and_a_remedy(mistake):
    call, error, fact = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert re.search(fact, message, re.DOTALL), message
    if "unexpected keyword" not in message:
        assert ". " in message, message


def test_what_tensorflow_dropped_silently_is_told():
    with pytest.warns(UserWarning, match="param_regularizers"):
        layer = CONTRIB(
            fused=False, updates_collections=None, param_regularizers={"beta": jnp.sum}
        )
    assert layer.penalty({"beta": jnp.ones(3)}) == 0


def test_whatever_was_a_tensor_may_be_traced():
    layer = LAYER(renorm=True)
    params, state = layer.init((6, 3))

    @jax.jit
    def step(state, training, momentum, r_max, weights):
        renormed = LAYER(
            training=training,
            momentum=momentum,
            renorm=True,
            renorm_clipping={"rmax": r_max, "rmin": 1 / r_max, "dmax": r_max - 1},
        )
        weighted = CONTRIB(batch_weights=weights, decay=momentum, is_training=training)
        y, state = renormed.apply(params, state, X)
        return y + weighted.apply(*weighted.init((6, 3)), X)[0], state

    for training, momentum, r_max in ((True, 0.9, 1.5), (False, 0.5, 2.0)):
        y, state = step(state, jnp.array(training), momentum, r_max, jnp.ones(6))
    assert step._cache_size() == 1
    assert np.isfinite(y).all()


@pytest.mark.parametrize("rank", [2, 4])
def test_a_traced_flag_gives_what_two_static_programs_give(rank):
    x = X if rank == 2 else IMAGES
    layer = LAYER(momentum=0.9)
    params, state = layer.init(x.shape)
    traced = jax.jit(lambda training: layer.apply(params, state, x, training))
    for training in (True, False):
        want = jax.jit(lambda t=training: layer.apply(params, state, x, t))()
        got = traced(jnp.array(training))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    assert traced._cache_size() == 1


@pytest.mark.parametrize("debias", [False, True])
def test_a_float16_state_is_widened_and_does_not_stall(debias):
    layer = tf1.batch_norm(
        decay=0.999, batch_weights=jnp.ones((64, 1)), zero_debias_moving_mean=debias
    )
    params, state = layer.init((64, 2), jnp.float16)
    assert {leaf.dtype.name for leaf in params.values()} == {"float16"}
    assert {leaf.dtype.name for leaf in state.values()} == {"float32"}
    # A checkpoint of TensorFlow's holds float16.
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state)
    x = jnp.full((64, 2), 5, jnp.float16)
    step = jax.jit(lambda state: layer.apply(params, state, x, training=True)[1])
    for _ in range(300):
        state = step(state)
    want = 5.0 if debias else 5 * (1 - 0.999**300)
    np.testing.assert_allclose(state["moving_mean"], want, rtol=1e-4)
    np.testing.assert_allclose(state["moving_variance"], 0.999**300, rtol=1e-4)
    assert layer.apply(params, state, x, training=False)[0].dtype == jnp.float16


def test_newer_and_older_spellings_are_taken():
    x = jnp.arange(6.0).reshape(3, 2)
    for function in (tf1.moments, tf1.sufficient_statistics):
        old, new = function(x, [0], keep_dims=True), function(x, [0], keepdims=True)
        assert old[1].shape == new[1].shape == (1, 2)
        with pytest.raises(ValueError, match="two spellings of one argument"):
            function(x, [0], keep_dims=True, keepdims=True)
    key = jax.random.key(0)
    a = tf1.dropout(key, x, 0.5, None, 7, "drop")
    np.testing.assert_array_equal(a, tf1.dropout(key, x, rate=0.5))
