"""How a batch is divided into ghost batches, and how their moments become one."""

from typing import NamedTuple

from jaxbn._kernels.reduction import ExactMoments
from jaxbn._sharding import split_axis
from jaxbn._statistics.moments import pool_moments
from jaxbn._typing import Array, Shape


class GhostBatches(NamedTuple):
    """Ghost batches of `size` rows: a static description of two reshapes and a merge.

    Attributes:
        size: Rows in a ghost batch.
        strided: Whether ghost batch j holds rows j, j + G, j + 2G, ... of G ghost batches,
            as in TensorFlow 1, instead of neighbouring rows.
        averaged: Whether the moments of the whole are the plain averages of those of the
            ghost batches, as in TensorFlow 1, instead of the moments of all elements.
    """

    size: int
    strided: bool = False
    averaged: bool = False

    def check(self, shape: Shape, axes: tuple[int, ...]) -> None:
        """Raises unless a batch of `shape`, averaged over `axes`, divides."""
        if axes[0] != 0:
            raise ValueError(
                f"ghost batches divide axis 0 of x, but of x of shape {shape} only the "
                f"axes {axes} are averaged over. Leave axis 0 out of feature_axes."
            )
        if shape[0] % self.size:
            raise ValueError(
                f"virtual_batch_size={self.size} does not divide the batch of {shape[0]} "
                f"rows. Drop the last {shape[0] % self.size} rows, or choose a size that "
                "divides it."
            )

    def axes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the reduced axes after `split`, given those before, 0 among them."""
        rows = 0 if self.strided else 1
        return (rows, *(axis + 1 for axis in axes if axis != 0))

    def all_axes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `axes`, which are reduced after `split`, and that of the groups."""
        return tuple(sorted({0, 1, *axes}))

    def split(self, array: Array) -> Array:
        """Gives an array of x's rank, or one that broadcasts to x, an axis of groups."""
        rows = array.shape[0]
        if rows == 1:
            return array[None]
        groups = rows // self.size
        return split_axis(
            array, (self.size, groups) if self.strided else (groups, self.size)
        )

    def merge(self, parts: ExactMoments) -> ExactMoments:
        """Returns the moments to track, given those of the groups along the first axis."""
        return pool_moments(parts, averaged=self.averaged)
