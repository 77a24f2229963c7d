"""Runs the recorded cases of TensorFlow's two layers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import tf1
from tests.golden_runners.case import assert_near
from tests.golden_runners.tf1_arguments import constants, decode
from tests.golden_runners.tf1_checks import (
    Traced,
    after_descent,
    array,
    arrays,
    check,
    descend,
    known,
    near,
    sizes,
)

LAYERS = {
    "tf.layers.batch_normalization": (tf1.batch_normalization, "training"),
    "tf.contrib.layers.batch_norm": (tf1.batch_norm, "is_training"),
}
# Older XLA may add up the same sums in another order the second time.
ROUNDING = 0 if jax.__version_info__ >= (0, 10) else 2e-7
TWICE = " twice, second with reuse=True"
# An operation of TensorFlow's that refused while running has no exception of its own here.
ERRORS = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "InvalidArgumentError": ValueError,
}


def maker(case):
    """Returns a function that makes the layer, given the mode and what a step feeds."""
    function, mode = LAYERS[case.meta["api"].removesuffix(TWICE)]
    kwargs = decode(case.kwargs)

    def make(training, fed):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* has no effect, as in TensorFlow")
            return function(**{**kwargs, **fed, mode: training})

    return make


def run_layer(case):
    if "expect_error" in case.meta:
        return run_error(case)
    make = maker(case)
    placeholder = case.meta["training"] == "placeholder"
    training = case.meta["training"] is not False
    check_init(case, make(training, feed(case, case.steps[0])))

    def forward(training, params, state, x, dy, fed):
        layer = make(training, fed)

        def normalize(params, x):
            return layer.apply(params, state, x)

        y, backward, updated = jax.vjp(normalize, params, x, has_aux=True)
        by_params, by_x = backward(dy)
        deferred = layer.run_updates(params, state, x)
        penalty = jax.value_and_grad(layer.penalty)(params, x.ndim)
        return y, {**by_params, "x": by_x}, updated, deferred, penalty

    traced = Traced(forward, placeholder)
    params, state = split(arrays(case, case.meta["init_state"]))
    for index, step in enumerate(case.steps):
        params, state = run_step(case, index, step, traced, make, params, state)
    traced.check(1 if placeholder else 2)


def run_step(case, index, step, traced, make, params, state):
    known(
        step, "op", "training", "x", "dy", "y", "grads", "reg_loss", "reg_grads", "sgd",
        "run_updates", "batch_weights", "renorm_clipping", "state_after",
        "renorm_r", "renorm_d",  # within y and its gradients
    )  # fmt: skip
    assert step["op"] == ("train" if step["training"] else "infer"), step["op"]
    what = f"step {index}:"
    x, dy, fed = array(case, step["x"]), array(case, step["dy"]), feed(case, step)
    y, gradients, updated, deferred, penalty = traced(
        step["training"], params, state, x, dy, fed
    )
    terms = sizes(x, dy, y, *normalization(case, params, state, x, step["training"]))
    assert y.dtype == x.dtype
    near(case, y, step["y"], f"{what} y")
    check(case, gradients, step["grads"], f"{what} gradient of", terms)
    descent = check_penalty(case, step, penalty, gradients, what)

    for name, value in updated.items():
        np.testing.assert_allclose(
            value, deferred[name], ROUNDING, err_msg=f"{what} deferred {name}"
        )
    state = after_updates(case, step, state, updated, what)
    if step["sgd"] is not None:
        params = descend(params, {k: descent[k] for k in params}, step["sgd"])
        params = make(step["training"], fed).project(params)
    terms = after_descent(terms, params, step["sgd"])
    check(case, {**params, **state}, step["state_after"], f"{what} state", terms)
    return params, state


def after_updates(case, step, state, updated, what):
    """Returns the state after a step, whose update operations were run or not."""
    if step["run_updates"] == "in forward":
        return updated
    assert step["run_updates"] in (True, False), step["run_updates"]
    if case.meta["update_op_count"] == 0:
        for name, value in updated.items():
            np.testing.assert_array_equal(value, state[name], f"{what} untouched {name}")
    return updated if step["run_updates"] else state


def check_penalty(case, step, penalty, gradients, what):
    """Checks the regularization loss, and returns the gradients that SGD follows."""
    loss, by_params = penalty
    if "reg_loss" not in step:
        assert loss == 0, f"{what} penalty {loss}, recorded none"
        return gradients
    near(case, loss, step["reg_loss"], f"{what} penalty")
    recorded = step["reg_grads"]
    for name, gradient in by_params.items():
        if name in recorded:
            near(case, gradient, recorded[name], f"{what} penalty gradient of {name}")
        else:
            assert not gradient.any(), f"{what} penalty gradient of {name}, recorded none"
    if step["sgd"] is not None:
        assert step["sgd"]["gradient"] == "grads + reg_grads", step["sgd"]
    return {**gradients, **{k: gradients[k] + g for k, g in by_params.items()}}


def check_init(case, layer):
    """Checks the names, shapes, dtypes and given values of the variables at first."""
    dtype, recorded = jnp.dtype(case.meta["dtype"]), case.meta["variables"]
    params, state = layer.init(tuple(case.meta["shape"]), dtype, key=jax.random.key(0))
    assert set(params) == {"gamma", "beta"} & set(recorded)
    made = {**params, **state}
    assert set(made) == set(recorded), f"made {sorted(made)}, recorded {sorted(recorded)}"
    for name, value in made.items():
        assert list(value.shape) == recorded[name]["shape"], name
        was = recorded[name]["dtype"]
        # Averages in float16 stall, so a state is kept wider than TensorFlow did.
        assert value.dtype.name == (
            "float32" if name in state and was == "float16" else was
        )
    for name in constants(case.kwargs) & made.keys():
        key = case.meta["init_state"][name]
        assert_near(made[name], case[key], case.tolerance, f"initial {name}")


def split(variables):
    params = {name: variables[name] for name in ("gamma", "beta") if name in variables}
    return params, {k: v for k, v in variables.items() if k not in params}


def feed(case, step):
    """Returns what a step fed besides its inputs and the mode."""
    fed = {}
    if "batch_weights" in step:
        fed["batch_weights"] = jnp.asarray(case[step["batch_weights"]])
    if "renorm_clipping" in step:
        fed["renorm_clipping"] = {
            **case.kwargs["renorm_clipping"],
            **{k: jnp.float32(v) for k, v in step["renorm_clipping"].items()},
        }
    return fed


def normalization(case, params, state, x, training):
    """Returns the reduced axes of a step, and by what it multiplies x at most."""
    last = 1 if case.kwargs.get("data_format") == "NCHW" else -1
    features = np.atleast_1d(case.kwargs.get("axis", last)) % x.ndim
    axes = tuple(set(range(x.ndim)) - set(features.tolist()))
    var = np.asarray(state["moving_variance"], np.float64)
    if training:
        ghosts = case.kwargs.get("virtual_batch_size") or len(x)
        rows = np.asarray(x, np.float64).reshape(ghosts, -1, *x.shape[1:])
        var = rows.var((0, *(axis + 1 for axis in axes if axis != 0)))
    gain = 1 / np.sqrt(var.min() + case.kwargs.get("epsilon", 1e-3))
    return axes, gain * np.abs(params.get("gamma", 1.0)).max()


def run_shared(case):
    """Runs two applications of one layer, whose updates follow both."""
    make = maker(case)

    def forward(training, params, state, xs, dys):
        layer = make(training, {})

        def normalize(params, xs):
            return [layer.apply(params, state, x)[0] for x in xs]

        ys, backward = jax.vjp(normalize, params, xs)
        by_params, by_xs = backward(dys)
        for x in xs:
            state = layer.run_updates(params, state, x)
        return ys, by_params, by_xs, state

    assert case.meta["training"] == "placeholder"
    traced = Traced(forward, True)
    params, state = split(arrays(case, case.meta["init_state"]))
    for index, step in enumerate(case.steps):
        known(step, "op", "training", "apps", "grads", "sgd", "state_after")
        assert step["op"] == ("shared_train" if step["training"] else "shared_infer")
        what = f"step {index}:"
        xs, dys = ([array(case, app[key]) for app in step["apps"]] for key in ("x", "dy"))
        ys, by_params, by_xs, updated = traced(step["training"], params, state, xs, dys)
        terms = {}
        for app, x, dy, y, by_x in zip(step["apps"], xs, dys, ys, by_xs, strict=True):
            known(app, "x", "dy", "y", "grad_x")
            used = normalization(case, params, state, x, step["training"])
            terms = sizes(x, dy, y, *used)
            near(case, y, app["y"], f"{what} y")
            near(case, by_x, app["grad_x"], f"{what} gradient of x", terms["x"])
        check(case, by_params, step["grads"], f"{what} gradient of", terms)
        if step["sgd"] is not None:
            state, params = updated, descend(params, by_params, step["sgd"])
        terms = after_descent(terms, params, step["sgd"])
        check(case, {**params, **state}, step["state_after"], f"{what} state", terms)
    traced.check()


def run_error(case):
    """Asserts that what TensorFlow refused is refused, with the same type of error."""
    function, _ = LAYERS[case.meta["api"]]
    kwargs = dict(case.kwargs)
    if "axis_tuple" in kwargs:
        kwargs["axis"] = tuple(kwargs.pop("axis_tuple"))
    x = array(case, "x")
    # Arrays among the arguments are not recorded; the message names those that mattered.
    message = case.meta["expect_error"]["message"]
    combined = {"updates_collections", "zero_debias_moving_mean"} & set(kwargs)
    if message.startswith("renorm is not supported with batch_weights") and not combined:
        kwargs["batch_weights"] = jnp.ones(len(x))

    def call():
        layer = function(**decode(kwargs))
        layer.apply(*layer.init(x.shape), x)

    with pytest.raises(ERRORS[case.meta["expect_error"]["type"]]) as caught:
        call()
    assert str(caught.value).count(". ") >= 1, f"no remedy: {caught.value}"
