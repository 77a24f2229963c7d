"""Several sums of one reading: a loop over tiles that stay in the caches of a CPU.

XLA makes one loop of elementwise sums that go on from tile to tile, while it reads an array
again for every sum over whole axes. Over parts of sharded arrays XLA would bring every tile
to each device, so tiles are for whole arrays.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxbn._compat import TILES_OF_BFLOAT16
from jaxbn._kernels.operation import SMALL, has_known_size
from jaxbn._sharding import explicit_axes, vary_alike
from jaxbn._typing import Array, Pair, Shape

# Elements of a tile. A constant, since a program must not depend on the machine that traces
# it; two sums of so many stay within the own caches of two cores and of more.
TILE = 1 << 15
# Tiles read in one turn of the loop. With fewer, loading and storing the running sums
# takes as long as reading x.
AT_ONCE = 4
# Shorter rows are joined: a loop over each would take few steps of a vector processor.
LONG = 128
# Smallest array in bytes for which tiles win, by (dtype, arrays read); measured in
# docs/performance.md. Sums of float16 over whole axes are not fused; a processor may sum
# bfloat16 alone without widening it.
LARGE = {
    ("float16", 1): SMALL,
    ("float16", 2): SMALL,
    ("float32", 1): 40 << 20,
    ("float32", 2): 6 << 20,
}
if TILES_OF_BFLOAT16:
    LARGE["bfloat16", 2] = 6 << 20


class Cut(NamedTuple):
    """A static description of how arrays are cut into tiles.

    Attributes:
        shape: That of the arrays, neighbouring axes merged that are both summed over.
        axes: The axes of `shape` that are summed over.
        tile: The shape of a tile.
        at_once: How many tiles, neighbours in the first of `axes`, are read in one turn.
        repeats: How often the features are repeated along the last of the axes.
    """

    shape: Shape
    axes: tuple[int, ...]
    tile: Shape
    at_once: int
    repeats: int


def cut(x: Array, axes: tuple[int, ...], arrays: int) -> Cut | None:
    """Returns how to cut `arrays` arrays such as `x`, or None if other sums are faster."""
    if not axes or not has_known_size(x) or explicit_axes(x):
        return None
    # Where the features are not last, a tile is scattered in memory.
    scattered = x.ndim - 1 in axes and x.dtype != jnp.float16
    if scattered or x.nbytes < LARGE.get((x.dtype.name, arrays), math.inf):
        return None
    return cut_of(x.shape, axes, AT_ONCE // arrays)


def sums(
    function: Callable[..., Pair],
    cut: Cut,
    arrays: tuple[Array, ...],
    vectors: tuple[Array, ...],
) -> Any:
    """Returns the sums of the two that `function` makes, elementwise, of its arguments.

    A vector holds one value for each feature. The sums have the shape of the first one.
    """
    shape, axes, tile, at_once, repeats = cut
    parts = tuple(array.reshape(shape) for array in arrays)
    per_feature = tuple(_along(vector, cut) for vector in vectors)
    first, *others = axes
    counts = [shape[axis] // tile[axis] for axis in others]
    step = tile[first] * at_once
    turns = shape[first] // step

    def values(start, size):
        return function(*(lax.dynamic_slice(a, start, size) for a in parts), *per_feature)

    def turn(index, totals):
        start = [jnp.int32(0)] * len(shape)
        for axis, count in zip(reversed(others), reversed(counts), strict=True):
            start[axis] = lax.rem(index, jnp.int32(count)) * jnp.int32(tile[axis])
            index = lax.div(index, jnp.int32(count))
        for at in range(at_once):
            start[first] = index * jnp.int32(step) + jnp.int32(at * tile[first])
            totals = tuple(map(lax.add, totals, values(start, tile)))
        return totals

    zero = vary_alike(lax.full(tile, 0, vectors[0].dtype), arrays[0])
    turns_of_all = jnp.int32(turns * math.prod(counts))
    totals = lax.fori_loop(jnp.int32(0), turns_of_all, turn, (zero, zero))
    totals = [lax.reduce_sum(total, axes=axes) for total in totals]
    rest = shape[first] - turns * step
    if rest:
        start, size = [0] * len(shape), list(shape)
        start[first], size[first] = turns * step, rest
        parts_of_rest = values(start, size)
        totals = [
            t + lax.reduce_sum(p, axes=axes)
            for t, p in zip(totals, parts_of_rest, strict=True)
        ]
    row = 1 if len(shape) - 1 in axes else shape[-1] // repeats
    apart = (total.reshape(-1, repeats, row) for total in totals)
    return tuple(lax.reduce_sum(t, axes=(1,)).reshape(vectors[0].shape) for t in apart)


def cut_of(shape: Shape, axes: tuple[int, ...], at_once: int) -> Cut | None:
    """Returns tiles of about the wanted size, or None if they cannot be had."""
    shape, axes, repeats = _with_long_rows(*_merged(shape, axes))
    first, *others = axes
    tile = [1 if axis == first else size for axis, size in enumerate(shape)]
    for axis in others:
        if math.prod(tile) > TILE:
            tile[axis] = _divisor(shape[axis], TILE * shape[axis] // math.prod(tile))
    rows = TILE // math.prod(tile)
    if rows > 1:
        # Prefer a height that divides the batch: no remainder.
        even = (n for n in range(rows, rows // 2, -1) if shape[first] % (n * at_once) == 0)
        tile[first] = next(even, rows)
    else:
        at_once = _divisor(shape[first], at_once)
    fits = TILE <= 4 * math.prod(tile) <= 16 * TILE
    if not fits or shape[first] < 2 * tile[first] * at_once:
        return None
    return Cut(shape, axes, tuple(tile), at_once, repeats)


def _merged(shape: Shape, axes: tuple[int, ...]) -> tuple[Shape, tuple[int, ...]]:
    """Returns the shape and axes after merging neighbours of one kind."""
    runs = itertools.groupby(range(len(shape)), lambda axis: axis in axes)
    merged = [(summed, math.prod(shape[axis] for axis in run)) for summed, run in runs]
    sizes = tuple(size for _, size in merged)
    return sizes, tuple(axis for axis, (summed, _) in enumerate(merged) if summed)


def _with_long_rows(
    shape: Shape, axes: tuple[int, ...]
) -> tuple[Shape, tuple[int, ...], int]:
    """Returns both, and how many rows were joined to one."""
    repeats, last = 1, len(shape) - 1
    if last in axes:
        return shape, axes, 1
    *others, rows, features = shape
    while features * repeats < LONG and rows % (2 * repeats) == 0:
        repeats *= 2
    return (*others, rows // repeats, features * repeats), axes, repeats


def _along(vector: Array, cut: Cut) -> Array:
    """Returns a vector of the features so that it broadcasts to a tile."""
    *others, last = (1 if axis in cut.axes else n for axis, n in enumerate(cut.shape))
    return jnp.tile(vector.reshape(*others, last // cut.repeats), cut.repeats)


def _divisor(size: int, most: int) -> int:
    """Returns the largest divisor of `size` up to `most`."""
    return next(n for n in range(max(most, 1), 0, -1) if size % n == 0)
