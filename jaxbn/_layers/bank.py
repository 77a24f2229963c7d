"""A bank of statistics: which of its vectors each row of a batch is normalized by."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxbn._kernels.reduction import ExactMoments
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._sharding import split_axis
from jaxbn._statistics.moments import pool_moments
from jaxbn._typing import Array, Pair

Tree = TypeVar("Tree")


class Bank(NamedTuple):
    """A static description of the segments of a batch that are normalized alike.

    A segment is a domain, or what a ghost batch holds of one. Every row of x lies in one
    segment, or, where its id is out of range, in none.

    Attributes:
        size: The number of domains.
        ghosts: The ghost batches that the rows are divided into, or None.
        groups: The number of ghost batches, 1 without.
    """

    size: int
    ghosts: GhostBatches | None = None
    groups: int = 1

    def of(self, options: dict[str, Any]) -> Array:
        """Returns which rows lie in which segment: (segments, rows, 1, ...) booleans."""
        segments = options["segments"]
        every = jnp.arange(self.size * self.groups, dtype=segments.dtype)
        return segments[None] == jnp.expand_dims(every, range(1, segments.ndim + 1))

    def pool(self, rows: ExactMoments, options: dict[str, Any]) -> ExactMoments:
        """Returns the moments of each segment, given those of each row."""

        def one(mine: Array) -> ExactMoments:
            # Not by a weight of 0: what is NaN in one domain stays in that domain.
            parts = (jnp.where(mine, part, jnp.zeros_like(part)) for part in rows)
            return pool_moments(ExactMoments(*parts))

        return jax.vmap(one)(self.of(options))

    def total(self, rows: Pair, options: dict[str, Any]) -> Pair:
        """Returns the sums of each segment, given those of each row."""
        mine = self.of(options)
        first, second = (jnp.where(mine, row[None], 0).sum(1) for row in rows)
        return first, second

    def spread(self, vectors: Tree, options: dict[str, Any]) -> Tree:
        """Returns for each row the vectors of its segment, or of its domain, or 0."""
        mine = self.of(options)
        domains = mine
        if self.groups > 1:
            domains = split_axis(mine, (self.groups, self.size)).any(0)

        def of_rows(vector: Array) -> Array:
            members = domains if vector.shape[0] == self.size else mine
            members = jnp.squeeze(members, range(vector.ndim + 1, members.ndim))
            return jnp.where(members, vector[:, None], 0).sum(0, dtype=vector.dtype)

        return jax.tree.map(of_rows, vectors)

    def merge(self, batch: ExactMoments) -> ExactMoments:
        """Returns the moments of each domain, given those of each segment."""
        if self.ghosts is None:
            return batch
        parts = (split_axis(part, (self.groups, self.size)) for part in batch)
        return self.ghosts.merge(ExactMoments(*parts))
