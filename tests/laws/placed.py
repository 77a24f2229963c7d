"""A normalizer of several domains as one of the table: it brings the ids of its rows."""

import dataclasses

import jax
import jax.numpy as jnp

import jaxbn
from jaxbn._layers.wrapper import Wrapper


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Placed(Wrapper):
    """A `DomainBatchNorm` whose rows have the ids `ids`, over and over."""

    inner: jaxbn.DomainBatchNorm
    ids: tuple[int, ...]

    @property
    def wrapped(self):
        return self.inner

    def apply(self, params, state, x, training, **options):
        ids = jnp.resize(jnp.asarray(self.ids), x.shape[:1])
        return self.inner.apply(params, state, x, training, domains=ids, **options)
