"""Runs what PyTorch recorded of whole models: fused layers, and `update_bn`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from tests.golden_runners.case import assert_near


def run(case):
    """Runs the single step of a case."""
    assert set(case.kwargs) <= {"bn_kwargs", "conv", "momentum", "sizes"}, case.kwargs
    (step,) = case.steps
    RUN[step["op"]](case, step)


def by_channel(array):
    return np.moveaxis(np.asarray(array, np.float64), 1, -1)


def run_fold(case, step):
    """Folds the norm after a linear layer, as `torch.nn.utils.fusion` did."""
    layer, bn, want = (
        {name: jnp.asarray(case[key]) for name, key in step[group].items()}
        for group in ("layer", "bn", "fused")
    )
    norm = jaxbn.BatchNorm(
        epsilon=step["eps"], use_scale="weight" in bn, use_bias="bias" in bn, ddof=1
    )
    params = jaxbn.BatchNormParams(bn.get("weight"), bn.get("bias"))
    state = jaxbn.BatchStats(bn["running_mean"], bn["running_var"])
    affine = jaxbn.as_affine(params, state, norm)
    options = {"in_axis": 1, "out_axis": 0}
    if is_transposed(case):
        groups = case.kwargs["conv"].get("groups", 1)
        options = {"in_axis": 0, "out_axis": 1, "groups": groups, "groups_on": "in"}
    weight, bias = jaxbn.fold(layer["weight"], layer.get("bias"), affine, **options)
    near = functools.partial(assert_near, tolerance=case.tolerance)
    near(
        np.moveaxis(weight, options["out_axis"], -1),
        np.moveaxis(want["weight"], options["out_axis"], -1),
        what="weight",
    )
    near(bias, want["bias"], what="bias")
    x = jnp.asarray(case[step["x"]])
    y = linear(x, weight, bias, case.kwargs["conv"], is_transposed(case))
    for key in ("y", "y_unfused"):
        near(by_channel(y), by_channel(case[step[key]]), what=key)


def is_transposed(case):
    return "ConvTranspose" in case.meta["call"]


def linear(x, weight, bias, conv, transposed=False):
    """Applies a linear layer of PyTorch."""
    if weight.ndim == 2:
        return x @ weight.T + bias[None]
    every = lambda name, default: np.broadcast_to(conv.get(name, default), weight.ndim - 2)
    size = np.array(weight.shape[2:])
    stride, dilation = every("stride", 1), every("dilation", 1)
    low = high = every("padding", 0)
    groups = conv.get("groups", 1)
    spread = np.ones_like(stride)
    if transposed:
        low = dilation * (size - 1) - low
        high, stride, spread = low + every("output_padding", 0), spread, stride
        weight = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = weight.reshape(-1, *weight.shape[2:])
        weight = jnp.flip(weight, range(2, weight.ndim))
    y = jax.lax.conv_general_dilated(
        x,
        weight,
        tuple(stride),
        list(zip(low, high, strict=True)),
        lhs_dilation=tuple(spread),
        rhs_dilation=tuple(dilation),
        feature_group_count=groups,
    )
    return y + bias.reshape(1, -1, *[1] * (y.ndim - 2))


def run_update_bn(case, step):
    """Averages over batches as PyTorch does, which is what momentum=None tracks."""
    arrays = {name: case[key] for name, key in case.meta["init_state"].items()}
    norm = jaxbn.BatchNorm(feature_axes=1, momentum=None, ddof=1)
    states = {
        name.split(".")[0]: norm.init(len(array))[1]
        for name, array in arrays.items()
        if name.endswith("running_mean")
    }

    def forward(states, x, training):
        after = {}
        for i in range(len(case.meta["layers"])):
            weight, bias = (arrays.get(f"{i}.{name}") for name in ("weight", "bias"))
            if str(i) in states:
                params = jaxbn.BatchNormParams(jnp.asarray(weight), jnp.asarray(bias))
                x, after[str(i)] = norm.apply(params, states[str(i)], x, training)
            elif weight is None:
                assert case.meta["layers"][i] == "ReLU()"
                x = jax.nn.relu(x)
            else:
                x = linear(x, weight, bias, {})
        return x, after

    for key in step["loader"]:
        _, states = forward(states, jnp.asarray(case[key]), True)
    near = functools.partial(assert_near, tolerance=case.tolerance)
    for name, state in states.items():
        recorded = {
            key: case[f"after.{name}.{key}"] for key in ("running_mean", "running_var")
        }
        near(state.mean, recorded["running_mean"], what=f"{name} mean")
        near(state.var, recorded["running_var"], what=f"{name} var")
        seen = case[f"after.{name}.num_batches_tracked"]
        np.testing.assert_array_equal(state.weight, np.full(state.weight.shape, seen))
    y, _ = forward(states, jnp.asarray(case[step["x_eval"]]), False)
    near(by_channel(y), by_channel(case[step["y_eval"]]), what="y in inference")


RUN = {"fold": run_fold, "update_bn": run_update_bn}
