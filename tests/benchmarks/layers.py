"""The layers of jaxbn and of its JAX peers, each called as its users would call it.

Packages that may be absent are imported where they are used.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MOMENTUM = 0.9
EPSILON = 1e-5


class UnfitError(Exception):
    """A peer has no such layer."""


class Wanted(NamedTuple):
    """A layer to make: `axis` holds the features of an input of `rank`."""

    features: int
    rank: int
    axis: int
    dtype: str
    relu: bool

    @property
    def example_shape(self) -> tuple[int, ...]:
        shape = [2] + [1] * (self.rank - 1)
        shape[self.axis] = self.features
        return tuple(shape)


class Layer(NamedTuple):
    """Params and state, and `apply(params, state, x, training, residual) -> y, state`.

    The layers of jaxbn and of linen take a mask of the axes before the features, too.
    """

    params: Any
    state: Any
    apply: Callable[..., Any]


def make_layer(peer: str, wanted: Wanted) -> Layer:
    """Returns the layer of a peer, with a ReLU as the last step or without."""
    return MAKERS[peer](wanted)


def _jaxbn(wanted: Wanted) -> Layer:
    import jaxbn

    activation = jax.nn.relu if wanted.relu else None
    bn = jaxbn.BatchNorm(feature_axes=wanted.axis, momentum=MOMENTUM, activation=activation)

    def apply(params, state, x, training, residual=None, mask=None):
        return bn.apply(params, state, x, training, residual=residual, weights=mask)

    return Layer(*bn.init(wanted.features), apply)


def _ending(call):
    """Adds the residual and the ReLU behind a layer that has neither."""

    def end(relu, params, state, x, training, residual=None, *mask):
        y, state = call(params, state, x, training, *mask)
        y = y if residual is None else y + residual
        return jax.nn.relu(y) if relu else y, state

    return end


def _linen(wanted: Wanted) -> Layer:
    import flax.linen as nn

    bn = nn.BatchNorm(
        momentum=MOMENTUM, epsilon=EPSILON, axis=wanted.axis, dtype=wanted.dtype
    )
    zeros, ones = jnp.zeros(wanted.features), jnp.ones(wanted.features)
    params, stats = {"scale": ones, "bias": zeros}, {"mean": zeros, "var": ones}

    @_ending
    def call(params, stats, x, training, mask=None):
        variables = {"params": params, "batch_stats": stats}
        if not training:
            return bn.apply(variables, x, use_running_average=True), stats
        mask = None if mask is None else mask[..., None]
        y, new = bn.apply(
            variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
        )
        return y, new["batch_stats"]

    return Layer(params, stats, functools.partial(call, wanted.relu))


def _nnx(wanted: Wanted) -> Layer:
    from flax import nnx

    bn = nnx.BatchNorm(
        wanted.features,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        axis=wanted.axis,
        dtype=jnp.dtype(wanted.dtype),
        rngs=nnx.Rngs(0),
    )
    graph, params, stats = nnx.split(bn, nnx.Param, nnx.BatchStat)

    @_ending
    def call(params, stats, x, training):
        # A copy, since what belongs to another trace must not be updated in this one.
        layer = nnx.merge(graph, params, stats, copy=True)
        y = layer(x, use_running_average=not training)
        return y, nnx.state(layer, nnx.BatchStat)

    return Layer(params, stats, functools.partial(call, wanted.relu))


def _haiku(wanted: Wanted) -> Layer:
    import haiku as hk

    def layer(x, training):
        order = "channels_last" if wanted.axis == -1 else "channels_first"
        bn = hk.BatchNorm(True, True, MOMENTUM, eps=EPSILON, data_format=order)
        return bn(x, training)

    pure = hk.without_apply_rng(hk.transform_with_state(layer))
    example = jnp.zeros(wanted.example_shape, wanted.dtype)
    params, state = pure.init(jax.random.key(0), example, True)
    # Its variance starts at 0, where those of the others start at 1.
    for name in state:
        if name.endswith("var_ema"):
            state[name]["average"] = jnp.ones_like(state[name]["average"])
    return Layer(params, state, functools.partial(_ending(pure.apply), wanted.relu))


def _equinox(wanted: Wanted) -> Layer:
    import equinox as eqx

    if wanted.axis == -1 and wanted.rank > 2:
        raise UnfitError("its layer is channels first")
    bn, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        wanted.features, axis_name="batch", momentum=MOMENTUM, eps=EPSILON, mode="batch"
    )
    params, rest = eqx.partition(bn, eqx.is_inexact_array)

    @_ending
    def call(params, state, x, training):
        layer = eqx.nn.inference_mode(eqx.combine(params, rest), not training)
        each = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return each(x, state)

    return Layer(params, state, functools.partial(call, wanted.relu))


def _keras(wanted: Wanted) -> Layer:
    import keras

    policy = "float32" if wanted.dtype == "float32" else f"mixed_{wanted.dtype}"
    layer = keras.layers.BatchNormalization(
        axis=wanted.axis, momentum=MOMENTUM, epsilon=EPSILON, dtype=policy
    )
    layer.build(wanted.example_shape)
    params = [variable.value for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]

    @_ending
    def call(params, state, x, training):
        return layer.stateless_call(params, state, x, training=training)

    return Layer(params, state, functools.partial(call, wanted.relu))


MAKERS = {
    "jaxbn": _jaxbn,
    "linen": _linen,
    "nnx": _nnx,
    "haiku": _haiku,
    "equinox": _equinox,
    "keras": _keras,
}
