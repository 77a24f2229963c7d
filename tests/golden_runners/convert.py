"""Runs recorded layers of other libraries through jaxbn.convert, training included.

Each recorded state is converted and comes back bit for bit; a layer that goes on from the
first one, and one converted anew before every step, train as the recorded one did.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_runners.case import assert_near

KEYS = {"op", "training", "x", "dy", "y", "y_dtype", "grads", "mask", "sgd"}
KEYS |= {"state_after", "reg_loss", "reg_grads", "run_updates", "renorm_r", "renorm_d"}


def run_layer(case, read, write, names, start=0, end=None, **options):
    """Runs the steps of a case from the state before step `start`, and before step `end`.

    Args:
        case: The case.
        read: From recorded arrays to a `Converted`.
        write: And back.
        names: The recorded name of a gradient for `scale` and `bias`.
        start: The step before which the first layer is converted.
        end: The step before which to end; None for after all of them.
        options: Those of `run_step`.
    """
    keys = [case.meta["init_state"], *(step["state_after"] for step in case.steps)]
    recorded = [{name: case[key] for name, key in state.items()} for state in keys]
    for arrays in recorded[start : None if end is None else end + 1]:
        check_round_trip(read, write, arrays)
    went_on = read(recorded[start])
    for before, step in list(zip(recorded, case.steps, strict=False))[start:end]:
        assert step.keys() <= KEYS, step.keys()
        for layer in (went_on, read(before)):
            after = run_step(case, layer, step, names, **options)
            check_state(case, write(after), step["state_after"])
            went_on = after if layer is went_on else went_on


def check_round_trip(read, write, arrays):
    back = write(read(arrays))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype, name
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def check_state(case, got, want):
    assert got.keys() == want.keys(), (sorted(got), sorted(want))
    for name, key in want.items():
        if case[key].dtype.kind != "f":
            np.testing.assert_array_equal(got[name], case[key], err_msg=name)
        else:
            near(case, got[name], key, f"{name} after the step")


def near(case, got, key, what, terms=0.0):
    """Compares relative to the largest recorded value, or to `terms` where these cancel."""
    want = case[key]
    terms = max(terms, np.abs(want).max(initial=0.0))
    assert_near(got, want, case.tolerance, what, terms=terms)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(bn, training, params, state, x, dy, weights):
    """Returns the gradients of the params and x, the output, and the state after it."""

    def loss(params, x):
        y, after = bn.apply(params, state, x, training, weights=weights)
        return (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(), (y, after)

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def run_step(
    case,
    layer,
    step,
    names,
    training=None,
    penalty=None,
    project=None,
    compares=lambda step: True,
    rounding=lambda x, step: 0.0,
):
    """Runs a step, compares its output and gradients, and returns the layer after it.

    Args:
        case: The case.
        layer: The layer before the step.
        step: The recorded step.
        names: The recorded name of a gradient for `scale` and `bias`.
        training: From a step to whether the layer trains; None for what it says.
        penalty: A loss of the params that is added; None for none.
        project: From params to what the constraints make of them; None for none.
        compares: From a step to whether its output and gradients can be compared.
        rounding: From x and a step to the size of what cancels in the recorded output.
    """
    trains = step["training"] if training is None else training(step)
    x = jnp.asarray(case[step["x"]]).astype(case.meta["dtype"])
    dy = jnp.asarray(case[step["dy"]])
    # A mask is one of rows or positions, to which the axis of the features is added.
    weights = jnp.asarray(case[step["mask"]])[..., None] if "mask" in step else None

    (by_params, by_x), (result, state) = gradients(
        layer.bn, trains, layer.params, layer.state, x, dy, weights
    )
    if compares(step):
        assert result.dtype == step.get("y_dtype", "float32")
        near(case, result, step["y"], "y", rounding(case[step["x"]], step))
        # What cancels in them is as large as one term of the sum, times the slope.
        near(case, by_x, step["grads"]["x"], "gradient of x", np.abs(dy).max())
    grads = {names[k]: g for k, g in by_params._asdict().items() if g is not None}
    if case.meta.get("trainable", True):
        assert {*grads, "x"} == step["grads"].keys()
    for name, grad in grads.items():
        if compares(step) and name in step["grads"]:
            grad = np.reshape(grad, case[step["grads"][name]].shape)
            near(case, grad, step["grads"][name], name, np.abs(dy).sum() / dy.shape[-1])
    params = layer.params
    if penalty is not None:
        added = check_penalty(case, step, names, penalty, params)
        by_params = jax.tree.map(jnp.add, by_params, added)
    if step["sgd"] is not None:
        assert sorted(step["sgd"]["params"]) == sorted(grads)
        rate = step["sgd"]["lr"]
        params = jax.tree.map(
            lambda p, g: p - (rate * g.astype(jnp.float32)).astype(p.dtype),
            params,
            by_params,
        )
        params = params if project is None else project(params)
    kept = state if step["training"] else layer.state
    return dataclasses.replace(layer, params=params, state=kept)


def check_penalty(case, step, names, penalty, params):
    """Compares the penalty and its gradient, which it returns."""
    added = jax.grad(penalty)(params)
    near(case, penalty(params), step["reg_loss"], "penalty")
    for field, gradient in added._asdict().items():
        if names[field] in step["reg_grads"]:
            near(case, gradient, step["reg_grads"][names[field]], f"penalty of {field}")
        else:
            assert gradient is None or not gradient.any(), f"penalty of {field}"
    return added
