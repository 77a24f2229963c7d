"""Layers of Equinox and Haiku as the tables of laws take them: with `init` and `apply`.

The law table asks `as_equinox` and `as_haiku`, which run a normalizer in the `Norm` of the
framework; the device table asks for the two classes, which are its `BatchNorm`.
"""

import dataclasses
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp

import jaxbn
import jaxbn.equinox
import jaxbn.haiku

BN = jaxbn.BatchNorm()


def as_equinox(normalizer, params, state, x, training, **options):
    sizes = state.mean.shape if normalizer.bank is None else state.mean.shape[1:]
    make = eqx.nn.make_with_state(jaxbn.equinox.Norm)
    layer, start = make(normalizer, sizes if len(sizes) > 1 else sizes[0])
    layer = eqx.tree_at(lambda layer: layer.params, layer, params)
    start = start.set(layer.state_index, state)
    y, after = layer(x, start, inference=not training, **options)
    return y, after.get(layer.state_index)


def as_haiku(normalizer, params, state, x, training, **options):
    run = lambda x, **options: jaxbn.haiku.Norm(normalizer)(x, training, **options)
    trees = ({"norm": named(tree)} for tree in (params, state))
    y, after = hk.transform_with_state(run).apply(*trees, None, x, **options)
    return y, type(state)(**{field: after["norm"].get(field) for field in state._fields})


def named(tree):
    return {name: leaf for name, leaf in tree._asdict().items() if leaf is not None}


@dataclasses.dataclass(frozen=True)
class EquinoxBatchNorm:
    """The layer of Equinox with the settings of `bn`, for whole batches, channels last."""

    bn: Any = BN

    def make(self, num_features):
        make = eqx.nn.make_with_state(jaxbn.equinox.BatchNorm)
        return make(num_features, self.bn.axis_name, feature_axes=-1)

    def init(self, num_features):
        layer, state = self.make(num_features)
        return (layer.weight, layer.bias), state

    def apply(self, params, state, x, training, **options):
        layer, _ = self.make(x.shape[-1])
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, params)
        copy = jax.tree.map(lambda leaf: leaf, state)  # a State is used once
        return layer(x, copy, inference=not training, **options)


@dataclasses.dataclass(frozen=True)
class HaikuBatchNorm:
    """The layer of Haiku with the settings of `bn`; params and state are Haiku's trees."""

    bn: Any = BN

    def model(self, training):
        def run(x, **options):
            layer = jaxbn.haiku.BatchNorm(
                True, True, 0.99, cross_replica_axis=self.bn.axis_name
            )
            return layer(x, training, **options)

        return hk.transform_with_state(run)

    def init(self, num_features):
        return self.model(True).init(None, jnp.ones((2, num_features)))

    def apply(self, params, state, x, training, **options):
        return self.model(training).apply(params, state, None, x, **options)
