"""The shape of x that the arithmetic works on: axes merged, ghost batches divided off."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from jaxbn._axes import expand
from jaxbn._kernels.operation import computed_apart, has_known_size, is_small
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._sharding import explicit_axes, join_axes
from jaxbn._typing import Array, Shape


class LoopShape(NamedTuple):
    """A static description of how the axes of x are taken.

    Attributes:
        shape: The shape of x.
        reduced: The axes of x that are averaged over.
        merged: How many of its last axes are taken as one, or 0.
        ghosts: The ghost batches that its first axis is divided into, or None.
    """

    shape: Shape
    reduced: tuple[int, ...]
    merged: int
    ghosts: GhostBatches | None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of that shape that are averaged over."""
        last = len(self.reduced) - max(self.merged - 1, 0)
        axes = self.reduced[:last]
        return axes if self.ghosts is None else self.ghosts.axes(axes)

    def of(self, array: Array) -> Array:
        """Returns an array in this shape: of the features, or one that broadcasts to x."""
        if array.ndim < len(self.shape):
            array = expand(array, self.reduced)
        if self.merged:
            first, last = array.shape[: -self.merged], array.shape[-self.merged :]
            if any(size != 1 for size in last):
                last = self.shape[-self.merged :]
                array = jnp.broadcast_to(array, (*first, *last))
            # Barrier: XLA would otherwise move the reshape past the loop that it is for.
            (array,) = computed_apart(array.reshape(*first, math.prod(last)))
        return array if self.ghosts is None else self.ghosts.split(array)

    def back(self, y: Array, x: Array) -> Array:
        """Returns `y`, which has this shape, in the shape of `x`."""
        if self.ghosts is not None:
            merged = (*x.shape[: -self.merged], -1) if self.merged else x.shape
            y = join_axes(y, x if not self.merged else x.reshape(merged))
        return computed_apart(y)[0].reshape(x.shape) if self.merged else y


def loop_shape_of(
    x: Array, reduced: tuple[int, ...], ghosts: GhostBatches | None
) -> LoopShape:
    """Returns the shape of `x`, averaged over the axes `reduced`, in which loops are long.

    XLA makes a loop of the last axis on CPU: 7 elements where images of 7 x 7 have their
    channels first.
    """
    merged = 0
    while merged < len(reduced) and reduced[-1 - merged] == x.ndim - 1 - merged:
        merged += 1
    long = merged > 1 and has_known_size(x) and not is_small(x)
    worth = long and not explicit_axes(x)
    return LoopShape(x.shape, reduced, merged if worth else 0, ghosts)
