"""How an Equinox layer keeps running statistics in `eqx.nn.State`."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._accumulation.state import Gathered
from jaxbn._state import BatchStats, register_stats
from jaxbn._typing import Array


@register_stats
class MeanAndVar(NamedTuple):
    """The running statistics of a layer, which `state.get` returns.

    Attributes:
        mean: Running mean, of shape (C,). Starts at 0.
        var: Running variance, likewise. Starts at 1.
    """

    mean: Array
    var: Array

    def renewed(self, mean: Array, var: Array) -> "MeanAndVar":
        """Returns the statistics after a data set of these moments."""
        return MeanAndVar(mean, var)

    def pooled(self, pool: Any) -> "MeanAndVar":
        """Returns the statistics of replicas pooled into one; `pool` pools moments."""
        return MeanAndVar(*pool(self.mean, self.var))


def split(stats: BatchStats) -> tuple[MeanAndVar, Array]:
    """Returns the two entries of a layer in a `State`: the statistics, and their weight.

    They are apart so that `mean, var = state.get(index)` is what it is in Equinox. The
    weight is there twice: as it was before the layer began to gather, and as it is.
    """
    assert stats.weight is not None
    return MeanAndVar(stats.mean, stats.var), jnp.stack([stats.weight, stats.weight])


def join(entry: Any, seen: Array) -> BatchStats | Gathered:
    """Returns the state of the core's layer, which gathers if the entry does."""
    before, now = seen
    if not isinstance(entry, Gathered):
        return BatchStats(entry.mean, entry.var, now)
    before = jnp.where(entry.batch.count > 0, before, now)
    stats = BatchStats(entry.stats.mean, entry.stats.var, now)
    start = BatchStats(entry.start.mean, entry.start.var, before)
    return Gathered(stats, start, entry.batch)


def split_any(state: BatchStats | Gathered) -> tuple[Any, Array]:
    """Undoes `join`."""
    if not isinstance(state, Gathered):
        return split(state)
    (stats, now), (start, before) = split(state.stats), split(state.start)
    return Gathered(stats, start, state.batch), jnp.stack([before[0], now[1]])


def read(layer: Any, state: Any, index: eqx.nn.StateIndex) -> Any:
    """Returns an entry of `state`, or explains that it is the state of another model."""
    if not isinstance(state, eqx.nn.State):
        raise TypeError(
            f"state must be an eqx.nn.State, got {type(state).__name__}. Take it from "
            "model, state = eqx.nn.make_with_state(Model)(...), and call model(x, state)."
        )
    try:
        return state.get(index)
    except KeyError:
        raise ValueError(
            f"the state holds no statistics of this {type(layer).__name__}: it was made "
            "with another model. Take both from one call, model, state = "
            "eqx.nn.make_with_state(Model)(...), or pass on what the last call returned."
        ) from None


def check_stats(stats: Any, input_size: int) -> None:
    """Raises unless the statistics are those of a layer of this size."""
    shape = jnp.shape(stats.start.mean if isinstance(stats, Gathered) else stats.mean)
    if shape != (input_size,):
        stacked = shape[1:] == (input_size,)
        remedy = (
            "They are those of an ensemble: call it under eqx.filter_vmap"
            if stacked
            else "Pass the state that was made together with the model"
        )
        raise ValueError(
            f"the statistics in the state have shape {shape}, but the layer was made for "
            f"{input_size} channels. {remedy}."
        )


def training_of(layer: Any, inference: Any) -> bool | Array:
    """Returns the mode of a call, which overrides that of the layer."""
    flag = layer.inference if inference is None else inference
    if isinstance(flag, (jax.Array, np.ndarray)):
        return jnp.logical_not(flag)
    if not isinstance(flag, (bool, np.bool_)):
        raise TypeError(
            f"inference must be a bool, got {flag!r}. Write inference=True to normalize "
            "with the running statistics, or model = eqx.nn.inference_mode(model)."
        )
    return not flag


def check_channels(layer: Any, shape: tuple[int, ...], axis: int) -> None:
    """Raises unless x, of `shape`, has the channels of a layer on `axis`."""
    size, ndim = layer.input_size, len(shape)
    if -ndim <= axis < ndim and shape[axis] == size:
        return
    found = f"{shape[axis]} channels on" if -ndim <= axis < ndim else "no"
    others = [other for other, length in enumerate(shape) if length == size]
    hint = f"here feature_axes={others[-1]}" if others else f"here there is no {size}"
    raise ValueError(
        f"x of shape {shape} has {found} axis {axis}, but the layer was made for "
        f"input_size={size}. As in Equinox, channels come first: a layer with axis_name "
        "takes one example (C, ...) under jax.vmap(..., axis_name=...), one without it a "
        f"whole batch (N, C, ...); feature_axes names another axis, {hint}."
    )
