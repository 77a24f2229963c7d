"""Several sums of one reading: a loop over tiles that stay in the caches of a CPU.

XLA makes one loop of elementwise sums that go on from tile to tile, while it reads an array
again for every sum over whole axes. For code that runs on a CPU.
"""

import itertools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._kernels.barriers import SMALL
from jaxbn._sharding import explicit_axes, vary_alike
from jaxbn._typing import Array, Shape

# Elements of a tile for each core: two sums of so many are well within its own cache.
PER_CORE = 1 << 14
# So many tiles are read in one turn, or reading and writing the sums would take as long.
AT_ONCE = 4
# Shorter rows are joined: a loop over each would take few steps of a vector processor.
LONG = 128
# From so many bytes on tiles are faster, by dtype and how many arrays are read. float16 is
# not fused elsewhere, and a processor may sum bfloat16 alone without widening it.
LARGE = {
    ("float16", 1): SMALL,
    ("float16", 2): SMALL,
    ("float32", 1): 40 << 20,
    ("float32", 2): 6 << 20,
    ("bfloat16", 2): 6 << 20,
}
if jax.__version_info__ < (0, 11):
    # Its XLA widens all of a bfloat16 array before it takes a tile of it.
    del LARGE["bfloat16", 2]


class Tiling(NamedTuple):
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


def tiling(x: Array, axes: tuple[int, ...], arrays: int) -> Tiling | None:
    """Returns how to cut `arrays` arrays such as `x`, or None if other sums are faster."""
    worth = axes and pays(x, axes, arrays)
    return _cut(x.shape, axes, AT_ONCE // arrays) if worth else None


def pays(x: Array, axes: tuple[int, ...], arrays: int) -> bool:
    """Tells whether tiles of `arrays` arrays such as `x` are faster than other sums."""
    # XLA would bring every tile of an array that it divides among devices to each of them.
    if jax.device_count() > 1 or explicit_axes(x):
        return False
    # Where the features are not last, a tile is scattered in memory.
    scattered = x.ndim - 1 in axes and x.dtype != jnp.float16
    return not scattered and x.nbytes >= LARGE.get((x.dtype.name, arrays), math.inf)


def sums(
    function: Callable[..., tuple[Array, ...]],
    tiling: Tiling,
    arrays: tuple[Array, ...],
    vectors: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Returns the sums of what `function` makes, elementwise, of `arrays` and `vectors`.

    A vector holds one value for each feature. The sums have the shape of the first one.
    """
    shape, axes, tile, at_once, repeats = tiling
    cut = tuple(array.reshape(shape) for array in arrays)
    per_feature = tuple(_along(vector, tiling) for vector in vectors)
    first, *others = axes
    counts = [shape[axis] // tile[axis] for axis in others]
    step = tile[first] * at_once
    turns = shape[first] // step

    def values(start, size):
        return function(*(lax.dynamic_slice(a, start, size) for a in cut), *per_feature)

    def turn(index, totals):
        start = [0] * len(shape)
        for axis, count in zip(reversed(others), reversed(counts), strict=True):
            index, start[axis] = index // count, index % count * tile[axis]
        for at in range(at_once):
            start[first] = index * step + at * tile[first]
            totals = tuple(map(jnp.add, totals, values(start, tile)))
        return totals

    kinds = jax.eval_shape(lambda: values([0] * len(shape), tile))
    zeros = tuple(vary_alike(jnp.zeros(kind.shape, kind.dtype), kind) for kind in kinds)
    totals = lax.fori_loop(0, turns * math.prod(counts), turn, zeros)
    totals = [jnp.sum(total, axes) for total in totals]
    rest = shape[first] - turns * step
    if rest:
        start, size = [0] * len(shape), list(shape)
        start[first], size[first] = turns * step, rest
        parts = [jnp.sum(part, axes) for part in values(start, size)]
        totals = map(jnp.add, totals, parts)
    row = 1 if len(shape) - 1 in axes else shape[-1] // repeats
    apart = (total.reshape(-1, repeats, row) for total in totals)
    return tuple(jnp.sum(total, 1).reshape(vectors[0].shape) for total in apart)


def _cut(shape: Shape, axes: tuple[int, ...], at_once: int) -> Tiling | None:
    """Returns tiles of about the wanted size, or None if they cannot be had."""
    shape, axes, repeats = _with_long_rows(*_merged(shape, axes))
    wanted = PER_CORE * _cores()
    first, *others = axes
    tile = [1 if axis == first else size for axis, size in enumerate(shape)]
    for axis in others:
        if math.prod(tile) > wanted:
            tile[axis] = _divisor(shape[axis], wanted * shape[axis] // math.prod(tile))
    rows = wanted // math.prod(tile)
    if rows > 1:
        # Best so many that none are left over.
        even = (n for n in range(rows, rows // 2, -1) if shape[first] % (n * at_once) == 0)
        tile[first] = next(even, rows)
    else:
        at_once = _divisor(shape[first], at_once)
    fits = wanted <= 4 * math.prod(tile) <= 16 * wanted
    if not fits or shape[first] < 2 * tile[first] * at_once:
        return None
    return Tiling(shape, axes, tuple(tile), at_once, repeats)


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


def _along(vector: Array, tiling: Tiling) -> Array:
    """Returns a vector of the features so that it broadcasts to a tile."""
    shape, axes, _, _, repeats = tiling
    *others, last = (1 if axis in axes else size for axis, size in enumerate(shape))
    return jnp.tile(vector.reshape(*others, last // repeats), repeats)


def _divisor(size: int, most: int) -> int:
    """Returns the largest divisor of `size` up to `most`."""
    return next(n for n in range(max(most, 1), 0, -1) if size % n == 0)


def _cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
