"""Runs the recorded layers of PyTorch, and its synchronized batches spread over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import convert
from tests.golden_runners import torch_models
from tests.golden_runners.case import assert_near

KNOWN = {"momentum", "eps", "affine", "bias", "track_running_stats", "training"}
# Told by the arrays, or of no effect where one process has all.
KNOWN |= {"num_features", "device", "dtype", "process_group"}


def run(case):
    """Runs every step of a case; an argument or operation that is not known is an error."""
    jax.config.update("jax_enable_x64", case.meta["dtype"] == "float64")
    try:
        if "expect_error" in case.meta:
            return run_error(case)
        if case.steps[0]["op"] in torch_models.RUN:
            return torch_models.run(case)
        assert set(case.kwargs) <= KNOWN, case.kwargs
        step = {
            "train": run_layer,
            "eval": run_layer,
            "sync_train": run_layer,
            "functional": run_function,
        }
        arrays = {name: case[key] for name, key in case.meta.get("init_state", {}).items()}
        for recorded in case.steps:
            arrays = step[recorded["op"]](case, recorded, arrays)
    finally:
        jax.config.update("jax_enable_x64", False)


def layer_of(case):
    """Returns the layer with PyTorch's conventions: one minus the momentum, unbiased."""
    momentum = case.kwargs.get("momentum", 0.1)
    affine = case.kwargs.get("affine", True)
    return jaxbn.BatchNorm(
        feature_axes=1,
        momentum=None if momentum is None else 1 - momentum,
        epsilon=case.kwargs.get("eps", 1e-5),
        ddof=1,
        use_scale=affine,
        use_bias=affine and case.kwargs.get("bias", True),
        param_dtype="float64" if case.meta["dtype"] == "float64" else "float32",
    )


def values_of(layer, arrays, features):
    """Returns params and state of a state dict, which comes back bit for bit."""
    if "running_mean" not in arrays:
        _, fresh = layer.init(features)
        as_array = lambda name: jnp.asarray(arrays[name]) if name in arrays else None
        return jaxbn.BatchNormParams(as_array("weight"), as_array("bias")), fresh
    momentum = None if layer.momentum is None else 1 - layer.momentum
    converted = convert.from_torch(arrays, eps=layer.epsilon, momentum=momentum)
    assert converted.bn == layer
    back = convert.to_torch(converted)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    return converted.params, converted.state


def run_layer(case, step, arrays):
    layer = layer_of(case)
    x = jnp.asarray(case[step["x"]]).astype(case.meta["dtype"])
    dy = jnp.asarray(case[step["dy"]]).astype(x.dtype) if "dy" in step else jnp.ones_like(x)
    params, state = values_of(layer, arrays, x.shape[1])
    training = step["training"] or not case.kwargs.get("track_running_stats", True)
    splits = tuple(case.meta["splits"]) if step["op"] == "sync_train" else None
    (by_params, by_x), (y, after) = gradients(layer, training, splits, params, state, x, dy)
    near = functools.partial(assert_near, tolerance=case.tolerance)
    near(channels_last(y), channels_last(case[step["y"]]), what="y")
    moved = {"x": by_x, "weight": by_params.scale, "bias": by_params.bias}
    slope = 1 if params.scale is None else np.abs(np.asarray(params.scale, np.float64))
    var = np.var(np.asarray(x, np.float64), axis=(0, *range(2, x.ndim)))
    terms = slope / np.sqrt(var + layer.epsilon) * np.abs(np.asarray(dy, np.float64)).max()
    for name, key in step.get("grads", {}).items():
        got, want = moved[name], case[key]
        if name == "x":
            near(channels_last(got), channels_last(want), what="x gradient", terms=terms)
        else:
            near(got, want, what=f"{name} gradient")
    check_local_gradients(case, step, layer, params, state, near)
    return follow(case, step, params, by_params, after, arrays, near)


# The steps of a case share a program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def gradients(layer, training, splits, params, state, x, dy):
    """Returns the gradients of the params and x, the output, and the state after it."""
    apply = layer.apply if splits is None else by_shards(layer, splits)

    def loss(params, x):
        y, after = apply(params, state, x, training)
        return (y * dy).sum(), (y, after)

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def channels_last(array):
    return np.moveaxis(np.asarray(array, np.float64), 1, -1)


def follow(case, step, params, by_params, after, arrays, near):
    """Takes the recorded step of SGD, and compares all that a state dict holds."""
    got = {"weight": params.scale, "bias": params.bias}
    if step.get("sgd"):
        moved = {"weight": by_params.scale, "bias": by_params.bias}
        for name in step["sgd"]["params"]:
            got[name] = got[name] - step["sgd"]["lr"] * moved[name]
    got |= {"running_mean": after.mean, "running_var": after.var}
    counted = arrays.get("num_batches_tracked", 0) + int(step["training"])
    got["num_batches_tracked"] = counted if after.weight is None else after.weight[0]
    recorded = step.get("state_after", {})
    for name, key in recorded.items():
        near(got[name], case[key], what=f"{name} afterwards")
    return {**arrays, **{name: case[key] for name, key in recorded.items()}}


def split(case, rows):
    """Returns rows padded into shards, and the weights that tell which are real."""
    splits = case.meta["splits"]
    shards = np.split(np.asarray(rows), np.cumsum(splits)[:-1])
    padded = np.zeros((len(splits), max(splits), *rows.shape[1:]), rows.dtype)
    for shard, part in zip(padded, shards, strict=True):
        shard[: len(part)] = part
    return padded, (np.arange(max(splits)) < np.array(splits)[:, None]).astype(rows.dtype)


def by_shards(layer, splits):
    """Returns `layer.apply` over shards of the recorded sizes, as one function."""
    synced = jaxbn.BatchNorm(**{**vars(layer), "axis_name": "d"})
    member = np.repeat(np.arange(len(splits)), splits)
    place = np.concatenate([np.arange(size) for size in splits])
    here = np.arange(max(splits)) < np.array(splits)[:, None]

    def apply(params, state, x, training):
        real = here.astype(x.dtype)
        shards = jnp.zeros((len(splits), max(splits), *x.shape[1:]), x.dtype)
        shards = shards.at[member, place].set(x)
        run = lambda x, w: synced.apply(params, state, x, training, weights=w)
        y, after = jax.vmap(run, axis_name="d")(shards, real)
        return y[member, place], jax.tree.map(lambda leaf: leaf[0], after)

    return apply


def check_local_gradients(case, step, layer, params, state, near):
    """Compares what each device holds before the gradients are summed, under pmap."""
    if step["op"] != "sync_train":
        return
    (x, real), (dy, _) = split(case, case[step["x"]]), split(case, case[step["dy"]])
    by_params = local_gradients(layer)(params, state, x, real, dy)
    near(by_params.scale, case[step["local_grad_weight"]], what="local weight gradient")
    near(by_params.bias, case[step["local_grad_bias"]], what="local bias gradient")


@functools.cache
def local_gradients(layer):
    """Returns a function of shards, which the steps of a case share."""
    synced = jaxbn.BatchNorm(**{**vars(layer), "axis_name": "d"})

    def loss(params, state, x, w, dy):
        return (synced.apply(params, state, x, True, weights=w)[0] * dy).sum()

    return jax.pmap(jax.grad(loss), axis_name="d", in_axes=(None, None, 0, 0, 0))


def run_function(case, step, arrays):
    given = {name: case[key] for name, key in step["inputs"].items()}
    layer = layer_of(case)
    used = {"use_scale": "weight" in given, "use_bias": "bias" in given}
    layer = jaxbn.BatchNorm(**{**vars(layer), **used})
    x = jnp.asarray(case[step["x"]])
    params, state = values_of(layer, given, x.shape[1])

    (by_params, by_x), (y, after) = gradients(
        layer, case.kwargs["training"], None, params, state, x, case[step["dy"]]
    )
    near = functools.partial(assert_near, tolerance=case.tolerance)
    near(channels_last(y), channels_last(case[step["y"]]), what="y")
    got = {"x": by_x, "weight": by_params.scale, "bias": by_params.bias}
    for name, key in step["grads"].items():
        near(got[name], case[key], what=f"{name} gradient")
    got = {"running_mean": after.mean, "running_var": after.var}
    for name, key in (step["state_after"] or {}).items():
        near(got[name], case[key], what=f"{name} afterwards")
    return arrays


def run_error(case):
    """PyTorch refuses one value per channel; here that is defined: the bias."""
    assert "more than 1 value per channel" in case.meta["expect_error"]["message"]
    layer = layer_of(case)
    params, state = layer.init(case.meta["shape"][1])
    y, _ = layer.apply(params, state, jnp.ones(case.meta["shape"]), True)
    np.testing.assert_array_equal(y, 0)
