"""Computes running statistics from the buffers of Equinox's batch norm, and back."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from jaxbn._dtypes import at_least_float32
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.ema_batch_norm import EmaBatchNorm
from jaxbn._state import BatchStats
from jaxbn.convert._array_names import LayerArrays
from jaxbn.convert._arrays import (
    checked,
    per_feature,
    plain,
    share,
    steps_of,
    to_layer,
    to_stats,
)
from jaxbn.convert._converted import Converted

Variance: TypeAlias = Literal["used", "intended"]
Equinox: TypeAlias = Converted[BatchNorm, BatchStats] | Converted[EmaBatchNorm, BatchStats]


def read_arrays(
    found: LayerArrays, *, momentum: float, eps: float, variance: Variance
) -> Equinox:
    """Returns the layer of either mode, which the names tell."""
    if "first_time" in found.arrays:
        return _read_ema(found, momentum, eps)
    found.require("hidden_mean", "hidden_var")
    read = checked(found, ("scale", "bias", "hidden_mean", "hidden_var"))
    steps = found.count("counter")
    weight = share(momentum, steps)
    mean, var = (
        array.astype(at_least_float32(array.dtype))
        for array in (read.arrays["hidden_mean"], read.arrays["hidden_var"])
    )
    notes = read.notes
    if steps == 0:
        if variance == "intended":
            var = np.ones_like(var)
        else:
            notes += ("has seen no batch; to train on as Equinox, read it as intended",)
    elif variance == "intended":
        var = _intended(found, var, 1 - weight)
    if steps:
        mean, var = mean / mean.dtype.type(weight), var / var.dtype.type(weight)
    values = to_stats(mean, var, np.full(read.features, weight))
    bn, params = to_layer(read, feature_axes=1, momentum=momentum, epsilon=eps, debias=True)
    return Converted(bn, params, BatchStats(*values), notes)


def _intended(found: LayerArrays, hidden: np.ndarray, start: Any) -> np.ndarray:
    """Returns the hidden variance without what is left of the 1 that it started at."""
    rest = hidden - hidden.dtype.type(start)
    if (rest < -1e-5).any():
        raise ValueError(
            f"{found.names['hidden_var']} is below momentum^counter = {start:.6g}, and "
            "cannot have started at 1. Pass the momentum that the module was made with, or "
            'variance="used".'
        )
    return np.maximum(rest, 0)


def _read_ema(
    found: LayerArrays, momentum: float, eps: float
) -> Converted[EmaBatchNorm, BatchStats]:
    first_time = bool(found.count("first_time"))
    roles = ("scale", "bias")
    if not first_time:
        # Before the first batch Equinox leaves both buffers uninitialized.
        found.require("mean", "var")
        roles += ("mean", "var")
    read = checked(found, roles)
    features = read.features or found.need("mean").shape
    arrays = {"mean": np.zeros(features, "f"), "var": np.ones(features, "f"), **read.arrays}
    full = read._replace(arrays=arrays, features=features)
    weight = np.full(features, 0 if first_time else 1, np.float32)
    values = to_stats(arrays["mean"], arrays["var"], weight)
    bn, params = to_layer(full, feature_axes=1, momentum=momentum, epsilon=eps)
    return Converted(EmaBatchNorm(bn), params, BatchStats(*values), read.notes)


def write_arrays(
    layer: Equinox, kept: Mapping[str, np.ndarray], *, variance: Variance
) -> dict[str, np.ndarray]:
    """Returns the arrays of either mode, which the kind of the layer tells."""
    state = layer.state
    if isinstance(layer.bn, EmaBatchNorm):
        assert state.weight is not None
        arrays = per_feature(layer.params, mean=state.mean, var=state.var)
        return {**arrays, "first_time": np.asarray(not np.max(state.weight) > 0)}
    bn = plain(layer.bn, "Equinox")
    counted = int(kept["counter"].reshape(())) if "counter" in kept else None
    steps = steps_of(bn, state, counted, "Equinox")
    weight = share(bn.momentum or 0.0, steps)
    mean, var = np.asarray(state.mean), np.asarray(state.var)
    hidden_var = var * var.dtype.type(weight) if steps else var
    if steps and variance == "intended":
        hidden_var = hidden_var + var.dtype.type(1 - weight)
    return {
        **per_feature(layer.params),
        "hidden_mean": mean * mean.dtype.type(weight),
        "hidden_var": hidden_var,
        "counter": np.asarray(steps, np.int32),
    }
