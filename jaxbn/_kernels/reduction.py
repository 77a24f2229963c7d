"""The reduction: what x is summed up to, and how those sums move with x and the weights."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._dtypes import at_least_float32, upcast, widest
from jaxbn._kernels import accelerator, cpu, gpu
from jaxbn._kernels.accelerator import count_of, divisor, opened
from jaxbn._kernels.operands import Reduction, Sums
from jaxbn._kernels.operation import Operation, computed_apart, number_of_elements
from jaxbn._sharding import broadcast_like
from jaxbn._typing import Array, Pair


def hide_unweighted(x: Array, weights: Array) -> Array:
    """Reads NaN and infinity of weight 0 as 0, so that they reach no sum and no gradient.

    Multiplying by the weight would not do: 0 times NaN is NaN, forward and backward.
    """
    return jnp.where((weights > 0) | jnp.isfinite(x), x, jnp.zeros_like(x))


def _count_elements(x: Array, weights: Array, axes: tuple[int, ...]) -> Array:
    """Returns the total weight of every feature, of x's rank."""
    # Axes along which the weights are constant multiply them instead of being summed.
    repeats = math.prod(x.shape[axis] for axis in axes if weights.shape[axis] == 1)
    features = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    return jnp.broadcast_to(jnp.sum(weights * repeats, axes, keepdims=True), features)


class ExactMoments(NamedTuple):
    """Moments whose mean is exact: the sum of `mean` and `rest`, what rounding left out."""

    mean: Array
    var: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rest: Array


def exact_moments(x: Array, weights: Array | None, axes: tuple[int, ...]) -> ExactMoments:
    """Returns the moments of `x`, of its rank, with size 1 along `axes`."""
    count = None if weights is None else _count_elements(x, weights, axes)
    mean, rest, var = _moments(x, weights, count, axes)
    if count is None:
        count = jnp.full_like(var, number_of_elements(x, axes))
    return ExactMoments(mean, var, count, rest)


def _moments(x, weights, count, axes):
    if not jnp.iscomplexobj(x):
        return _MOMENTS(axes, Reduction(x, weights, count))
    re, im = (_moments(part, weights, count, axes) for part in (x.real, x.imag))
    return *(jax.lax.complex(re[i], im[i]) for i in (0, 1)), re[2] + im[2]


def moments_tangent(
    x: Array,
    weights: Array | None,
    moments: tuple[Array, Array, Array],
    tangents: tuple[Array | None, Array | None],
    axes: tuple[int, ...],
) -> Pair:
    """Returns the count times the tangents of the mean and the variance.

    Both are sums over all elements, on whatever device, around the mean of all; `tangents`
    are those of x and of the weights. What rounding left out of the mean, the rest, moves
    its own share from the first sum into the second.
    """
    x_tangent, weights_tangent = tangents
    mean, rest, var = moments
    if jnp.iscomplexobj(x):
        whole = zip(*((a.real, a.imag) for a in (x, mean, rest)), strict=True)
        each = (None, None) if x_tangent is None else (x_tangent.real, x_tangent.imag)
        # The variance of a complex x is that of both parts, so its share with the weights
        # is taken once.
        pairs = [
            moments_tangent(a, weights, (m, r, v), (t, weights_tangent), axes)
            for (a, m, r), t, v in zip(whole, each, (var, jnp.zeros_like(var)), strict=True)
        ]
        (re, first), (im, second) = pairs
        return jax.lax.complex(re, im), first + second
    of_mean, of_var = [], []
    if x_tangent is not None:
        total, product = sums(x, mean, x_tangent, weights=weights, axes=axes)
        of_mean, of_var = [total], [2 * (product - rest * total)]
    if weights_tangent is not None:
        shares = _shares_of_weights(axes, x, mean, rest, var, weights_tangent)
        of_mean, of_var = [*of_mean, shares[0]], [*of_var, shares[1]]
    return sum(of_mean[1:], of_mean[0]), sum(of_var[1:], of_var[0])


# Checkpointed, so that the backward pass keeps x in its own dtype and centers it again,
# instead of keeping the centered copy.
@functools.partial(jax.checkpoint, static_argnums=0)
def _shares_of_weights(axes, x, mean, rest, var, tangent):
    centered = (upcast(x) - mean) - rest
    shares = centered * tangent, (jnp.square(centered) - var) * tangent
    return tuple(jnp.sum(share, axes, keepdims=True) for share in shares)


def sums(
    x: Array,
    mean: Array,
    t: Array,
    *,
    relu: tuple[Array, Array] | None = None,
    weights: Array | None = None,
    axes: tuple[int, ...],
) -> Pair:
    """Returns the sum of t and that of t (x - mean), of x's rank.

    With `relu`, the slope and the offset of a map, t counts where its ReLU is open.
    """
    slope, offset = (None, None) if relu is None else relu
    return _SUMS(axes, Sums(x, mean, slope, offset, weights, t))


def _moments_types(axes: tuple[int, ...], of: Reduction) -> tuple[Any, ...]:
    return (_vector_type(of.x, axes, at_least_float32(of.x.dtype)),) * 3


def _sums_types(axes: tuple[int, ...], of: Sums) -> tuple[Any, ...]:
    dtype = at_least_float32(widest(of.x.dtype, of.t.dtype))
    return (_vector_type(of.x, axes, dtype),) * 2


def _vector_type(x: Any, axes: tuple[int, ...], dtype: Any) -> Any:
    """Returns the type of x after a sum over `axes`, which stay with size 1."""
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    kept = {}
    if any(x.sharding.spec[axis] is not None for axis in axes):
        spec = (None if axis in axes else name for axis, name in enumerate(x.sharding.spec))
        kept["sharding"] = x.sharding.update(spec=tuple(spec))
    return x.update(shape=shape, dtype=dtype, weak_type=False, **kept)


def _batched(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis + 1 for axis in axes)


_MOMENTS = Operation(
    "moments",
    _moments_types,
    accelerator.moments,
    {
        "cpu": cpu.moments,
        "cuda": gpu.moments,
        "rocm": gpu.moments,
        "tpu": accelerator.moments_on_tpu,
    },
    _batched,
)
_SUMS = Operation(
    "sums",
    _sums_types,
    accelerator.sums,
    {"cpu": cpu.sums, "cuda": gpu.sums, "rocm": gpu.sums},
    _batched,
)


@_MOMENTS.def_tangent
def _(axes, of, moving):
    found = _MOMENTS(axes, of)
    # The derivative through the count is contained in that through the weights.
    if moving.x is None and moving.weights is None:
        return found, tuple(map(jnp.zeros_like, found))
    moved = None if moving.x is None else upcast(moving.x), moving.weights
    totals = moments_tangent(of.x, of.weights, found, moved, axes)
    n = divisor(count_of(axes, of))
    return found, (totals[0] / n, jnp.zeros_like(found[1]), totals[1] / n)


_SUMS.def_linear_in(["t"])


@_SUMS.def_transpose
def _(axes, of, wanted, gradients):
    total, product = gradients
    x, mean, total, product = computed_apart(of.x, of.mean, total, product)
    if product is None:
        t = broadcast_like(total, x)
    else:
        t = (upcast(x) - mean) * product
        t = t if total is None else t + total
    t = t if of.weights is None else t * of.weights
    t = t if of.offset is None else opened(of._replace(x=x), t)
    return of._replace(t=t.astype(wanted.t.dtype))
