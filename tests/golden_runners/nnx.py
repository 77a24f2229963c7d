"""Runs the cases that were recorded from `flax.nnx.BatchNorm`."""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn.nnx
from tests.golden_runners.linen import (
    KEYS,
    KNOWN,
    arguments,
    check_output,
    hiding,
    near_of,
)

# Notes for tools, beside the arrays.
METADATA = {"scale_metadata", "bias_metadata"}


def run(case):
    """Runs every step of a case; what is not known is an error."""
    assert set(case.kwargs) <= KNOWN | METADATA | {"num_features"}, case.kwargs
    kwargs = {k: v for k, v in arguments(case).items() if k not in METADATA}
    size = kwargs.pop("num_features", case.meta["shape"][kwargs.get("axis", -1)])
    layer = jaxbn.nnx.BatchNorm(size, rngs=nnx.Rngs(0), **kwargs)
    start = case.meta["init_state"]
    assert nnx.to_pure_dict(nnx.state(layer)).keys() == start.keys()
    for name, key in start.items():
        variable = getattr(layer, name)
        variable[...] = jnp.asarray(case[key], variable[...].dtype)
    for step in case.steps:
        run_step(case, layer, step)


def run_step(case, layer, step):
    assert step.keys() <= KEYS, step.keys()
    x = jnp.asarray(case[step["x"]]).astype(case.meta["dtype"])
    dy = jnp.asarray(case[step["dy"]], jnp.float32)
    options = hiding(case, step)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        layer = nnx.merge(graphdef, params, rest, copy=True)
        y = layer(x, use_running_average=not step["training"], **options)
        return (y.astype(jnp.float32) * dy).sum()

    grads, by_x = jax.grad(loss, argnums=(0, 1))(params, x)
    grads = nnx.to_pure_dict(grads)
    y = layer(x, use_running_average=not step["training"], **options)
    scale = 1.0 if layer.scale is None else layer.scale[...]
    check_output(case, step, scale, y, {**grads, "x": by_x})
    near = near_of(case)
    if step["sgd"] is not None:
        assert sorted(step["sgd"]["params"]) == sorted(grads)
        for name, grad in grads.items():
            param = getattr(layer, name)
            param[...] = param[...] - jnp.asarray(step["sgd"]["lr"], grad.dtype) * grad
    for name, key in step["state_after"].items():
        near(getattr(layer, name)[...], key, f"{name} after the step")
