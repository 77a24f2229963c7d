"""Runs the cases that were recorded from `flax.linen.BatchNorm`."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn.linen
from tests.golden_runners.case import assert_near
from tests.golden_runners.tf1_arguments import encoded

DTYPES = {"dtype", "param_dtype"}
KNOWN = {"use_running_average", "axis", "momentum", "epsilon", "use_bias", "use_scale"}
KNOWN |= DTYPES | {"axis_name", "axis_index_groups", "use_fast_variance", "name"}
INITIALIZERS = {"bias_init", "scale_init"}
# Ours are computed in float32 at least, whatever this says.
WITHOUT_EFFECT = {"force_float32_reductions"}
KNOWN |= INITIALIZERS | WITHOUT_EFFECT
KEYS = {"op", "training", "x", "dy", "y", "y_dtype", "grads", "mask", "weights", "sgd"}
KEYS |= {"state_after", "per_device_stats"}


def run(case):
    """Runs every step of a case; what is not known is an error."""
    assert set(case.kwargs) <= KNOWN, case.kwargs
    layer = jaxbn.linen.BatchNorm(**arguments(case))
    start = {name: case[key] for name, key in case.meta["init_state"].items()}
    variables = check_init(layer, start, case)
    for step in case.steps:
        variables = run_step(case, layer, step, variables)


def arguments(case):
    """Returns the arguments of the layer, translated from JSON."""
    arguments = {k: v for k, v in case.kwargs.items() if k not in WITHOUT_EFFECT}
    for name in DTYPES & arguments.keys():
        arguments[name] = jnp.dtype(arguments[name])
    for name in INITIALIZERS & arguments.keys():
        arguments[name] = encoded(arguments[name])
    if isinstance(arguments.get("axis"), list):
        arguments["axis"] = tuple(arguments["axis"])
    return arguments


def hiding(case, step):
    """Returns the mask and the weights of a step, as keywords of a call."""
    return {
        name: jnp.asarray(case[step[name]]) for name in ("mask", "weights") if name in step
    }


def check_init(layer, start, case):
    """Returns the variables before the first step, in which only params may be random."""
    x = jnp.zeros(case.meta["shape"], case.meta["dtype"])
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    flat = {**variables.get("params", {}), **variables["batch_stats"]}
    assert flat.keys() == start.keys()
    for name in ("mean", "var"):
        np.testing.assert_array_equal(flat[name], start[name])
    return {
        collection: {
            name: jnp.asarray(start[name], leaf.dtype) for name, leaf in tree.items()
        }
        for collection, tree in variables.items()
    }


def gradients(layer, training, mapped, variables, x, dy, options):
    """Returns the gradients of the params and x, the output and the statistics.

    The output and the statistics are those of every device where x is spread.
    """

    def on_device(variables, x):
        y, updates = layer.apply(
            variables,
            x,
            use_running_average=not training,
            mutable=["batch_stats"],
            **options,
        )
        return y, updates["batch_stats"]

    run = on_device
    if mapped is not None:
        run = mapped(on_device, axis_name=layer.axis_name, in_axes=(None, 0))

    def loss(params, x):
        y, stats = run({**variables, "params": params}, x)
        return (y.astype(jnp.float32) * dy).sum(), (y, stats)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables.get("params", {}), x)


# The steps of a case share a program.
compiled_gradients = jax.jit(gradients, static_argnums=(0, 1, 2))


def check_output(case, step, scale, y, grads):
    assert y.dtype == step["y_dtype"]
    near = near_of(case)
    near(y, step["y"], "y")
    assert grads.keys() == step["grads"].keys()
    # A gradient of the params is a sum over the batch, of which much cancels.
    summed = np.abs(case[step["dy"]]).sum() / case[step["dy"]].shape[-1]
    for name, array in grads.items():
        terms = slope_times_dy(case, step, scale) if name == "x" else summed
        near(array, step["grads"][name], f"gradient of {name}", terms=terms)


def slope_times_dy(case, step, scale):
    """Returns the size of the terms that cancel in the gradient of x."""
    x, dy = (np.asarray(case[step[name]], np.float64) for name in ("x", "dy"))
    if not step["training"]:
        return 0.0
    # With shards, x has an axis of devices in front, which is reduced as well.
    lead = 1 if "shards" in case.meta else 0
    features = np.atleast_1d(case.kwargs.get("axis", -1))
    features = {int(axis) % (x.ndim - lead) + lead for axis in features}
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    gain = 1 / np.sqrt(x.var(axes, keepdims=True) + case.kwargs.get("epsilon", 1e-5))
    # A step of SGD leaves the error of the whole vector on the smallest scale.
    terms = np.abs(scale).max() * (np.abs(dy).max(axes, keepdims=True) * gain)
    return terms.ravel() if features == {x.ndim - 1} else terms.max()


def near_of(case):
    """Returns the comparison of an array with a recorded one; vectors as a whole."""

    def near(got, key, what, terms=0.0):
        want = case[key]
        if want.ndim == 1:
            terms = max(terms, np.abs(want).max())
        assert_near(got, want, case.tolerance, what, terms=terms)

    return near


def run_step(case, layer, step, variables):
    assert step.keys() <= KEYS, step.keys()
    x = jnp.asarray(case[step["x"]]).astype(case.meta["dtype"])
    dy = jnp.asarray(case[step["dy"]], jnp.float32)
    options, mapped = hiding(case, step), None
    if "shards" in case.meta:
        mapped = jax.pmap if "jax.pmap" in case.meta["note"] else jax.vmap
    params = variables.get("params", {})

    run = gradients if mapped is jax.pmap else compiled_gradients
    (grads, by_x), (y, stats) = run(
        layer, step["training"], mapped, variables, x, dy, options
    )
    check_output(case, step, params.get("scale", 1.0), y, {**grads, "x": by_x})
    near = near_of(case)
    if mapped is not None:
        for name, key in step.get("per_device_stats", {}).items():
            near(stats[name], key, f"{name} of every device")
        if step["training"]:
            stats = jax.tree.map(lambda leaf: leaf[0], stats)
        else:
            stats = variables["batch_stats"]
    if step["sgd"] is not None:
        assert sorted(step["sgd"]["params"]) == sorted(params)
        rate = step["sgd"]["lr"]
        params = {n: p - jnp.asarray(rate, p.dtype) * grads[n] for n, p in params.items()}
    after = {**params, **stats}
    assert after.keys() == step["state_after"].keys()
    for name, key in step["state_after"].items():
        near(after[name], key, f"{name} after the step")
    return {"params": params, "batch_stats": stats}
