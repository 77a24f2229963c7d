"""The formulations for CPUs, where XLA reads x again for every sum over whole axes.

Such a sum runs at the speed of memory if XLA makes one fusion of it and of all that it
reads ("__ynn_fusion"), and it gives that up when something else reads the same intermediate
value: float32 from bfloat16, x minus its mean. So every sum reads x behind an optimization
barrier of its own, which XLA removes only after fusing. Without them a pass in bfloat16
stores two copies of x in float32; docs/performance.md tells what each formulation is worth.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._dtypes import upcast
from jaxbn._kernels import accelerator, tiles
from jaxbn._kernels.accelerator import Triple, combined, count_of, divisor, opened
from jaxbn._kernels.operands import Map, MapSettings, Reduction, Sums
from jaxbn._kernels.operation import is_small
from jaxbn._typing import Array


def moments(axes: tuple[int, ...], of: Reduction, whole: bool) -> Triple:
    """Returns the mean, what its rounding left out, and the biased variance.

    Sums x and its square, and reads x again where that has lost digits. Sums of values are
    2.5 times as fast here as sums of differences, which a shift would need. The conditional
    costs about 3 % of the compile time of a ResNet-50.
    """
    if is_small(of.x):
        return accelerator.two_pass(axes, of, whole)
    cut = tiles.cut(of.x, axes, 1) if whole and of.weights is None else None
    if cut is not None:
        return _tiled_moments(axes, of, cut)
    all_within = _all_within if whole else accelerator.all_within
    return accelerator.guarded(axes, of, _unseen, all_within)


def _tiled_moments(axes: tuple[int, ...], of: Reduction, cut: tiles.Cut) -> Triple:
    """Sums deviations from the mean of a sample, and their squares, in one reading."""
    shift = accelerator.sample_mean(axes, of.x)

    def powers(x: Array, shift: Array) -> tuple[Array, Array]:
        deviation = upcast(x) - shift
        return deviation, deviation * deviation

    totals = tiles.sums(powers, cut, (of.x,), (shift,))
    count = divisor(count_of(axes, of))
    return combined(shift, *(total / count for total in totals))


def normalize(settings: MapSettings, of: Map, whole: bool) -> tuple[Array]:
    """Returns the map of x, with its ReLU."""
    if not is_small(of.x):
        # Without the barrier XLA divides by the standard deviation for every element.
        mean, slope, offset = (_behind_barrier(v) for v in (of.mean, of.slope, of.offset))
        of = of._replace(mean=mean, slope=slope, offset=offset)
    return accelerator.normalize(settings, of, whole)


def sums(axes: tuple[int, ...], of: Sums, whole: bool) -> tuple[Array, Array]:
    """Returns the sum of t and that of t (x - mean)."""
    if is_small(of.x):
        return accelerator.sums(axes, of, whole)
    cut = tiles.cut(of.x, axes, 2) if whole and of.weights is None else None
    if cut is not None:
        return _tiled_sums(of, cut)
    if of.offset is not None:
        # A ReLU's mask fuses with no sum, so the masked gradient is stored once.
        of = of._replace(t=_behind_barrier(opened(of, of.t)), slope=None, offset=None)
    total = accelerator.sums(axes, of._replace(t=_unseen(of.t)), whole)[0]
    return total, accelerator.sums(axes, _unseen(of), whole)[1]


def _tiled_sums(of: Sums, cut: tiles.Cut) -> tuple[Array, Array]:
    """Takes both sums in one reading, and the ReLU's mask on the way."""
    names = [name for name in ("mean", "slope", "offset") if getattr(of, name) is not None]

    def products(x: Array, t: Array, *vectors: Array) -> tuple[Array, Array]:
        values = dict(zip(names, vectors, strict=True))
        return accelerator.addends(of._replace(x=x, t=t, **values))

    vectors = tuple(getattr(of, name) for name in names)
    return tiles.sums(products, cut, (of.x, of.t), vectors)


def _all_within(values: Array, bounds: Array) -> Array:
    """Returns `accelerator.all_within`, reducing pairs to one that fails.

    XLA fuses it with what computes the pairs. Of `jnp.all` it makes three or four kernels:
    the comparison, windows of 32 features (TreeReductionRewriter), and their reductions.
    Features that are split over devices would be gathered for pairs.
    """

    def failing(a: Any, b: Any) -> Any:
        holds = a[0] <= a[1]
        return lax.select(holds, b[0], a[0]), lax.select(holds, b[1], a[1])

    zero = lax.full_like(values, 0, shape=())
    axes = range(values.ndim)
    value, bound = lax.reduce((values, bounds), (zero, zero), failing, axes)
    return value <= bound


def _unseen(*arrays: Any) -> Any:
    """Returns the first argument as values that XLA has not seen before.

    XLA merges barriers of the same arrays (CSE): the further arguments tell them apart.
    Sums of float16 are not fused in any case.
    """
    if any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(arrays)):
        return arrays[0]
    return lax.optimization_barrier(arrays)[0]


def _behind_barrier(array: Array | None) -> Array | None:
    return None if array is None else lax.optimization_barrier(array)
