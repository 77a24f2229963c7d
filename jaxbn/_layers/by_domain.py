"""One application of a normalizer that keeps statistics for each of several domains."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._axes import reduction_axes
from jaxbn._dtypes import as_float
from jaxbn._kernels.operation import computed_apart
from jaxbn._kernels.reduction import ExactMoments, exact_moments, hide_unweighted
from jaxbn._layers.bank import Bank
from jaxbn._sharding import split_like
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.weights import prepare_weights
from jaxbn._typing import Array, ArrayLike, Axes, Pair, Shape
from jaxbn._values.canonical import known


def as_ids(layer: Any, domains: ArrayLike | None, rows: Shape) -> tuple[Array, bool]:
    """Returns ids, one or of the shape `rows`, and whether all are known to be in range."""
    if domains is None:
        raise TypeError(
            f"{type(layer).__name__} normalizes rows by the statistics of their domain, "
            "got no domains. Write domains=..., an id for all of x or one for each row."
        )
    values, size = known(domains), layer.bank.size
    ids = domains if isinstance(domains, jax.Array) else np.asarray(domains)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"domains must be integers, got {ids.dtype}. Number them from 0 to {size - 1}."
        )
    if ids.shape not in ((), rows):
        raise ValueError(
            f"domains of shape {ids.shape} do not fit. Give one id for all, of shape ()"
            + (f", or one for each row of x, of shape {rows}." if rows else ".")
        )
    outside = [] if values is None else values[(values < 0) | (values >= size)].tolist()
    if outside:
        raise ValueError(
            f"domains must lie in 0 to {size - 1}, got {outside[0]} among them. Make the "
            "layer with more num_domains, or number the domains from 0."
        )
    if ids.dtype.itemsize < 4:  # that may not hold the number of domains
        ids = ids.astype(np.int32)
    inside = (ids >= 0) & (ids < size)
    return jnp.where(inside, ids, size).astype(np.int32), values is not None


class _State(NamedTuple):
    stats: Any  # that of the layer
    running: Pair  # what each row is normalized with in inference


@dataclasses.dataclass(frozen=True)
class _EachRow:
    """A layer as it looks to a batch whose rows are features too, axis 0 of x.

    Between the reduction and the map, the rule pools its moments into those of segments.
    """

    layer: Any
    bank: Bank

    # Ghost batches are segments.
    ghost_batches = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def running(self, state: _State) -> Pair:
        return state.running

    def scale_and_bias(self, params: Pair) -> Pair:
        return params

    def correction(self, state: _State, batch: ExactMoments, **options: Any) -> Any:
        others = {name: value for name, value in options.items() if name != "segments"}
        pair = self.layer.correction(state.stats, self.bank.merge(batch), **others)
        if pair is None:
            return None
        # A layer may answer for all domains at once.
        pair = tuple(jnp.broadcast_to(a, state.stats.mean.shape) for a in pair)
        return self.bank.spread(pair, options)

    def track(
        self, state: _State, batch: ExactMoments, *, segments: Array, **options: Any
    ) -> _State:
        after = self.layer.track(state.stats, self.bank.merge(batch), **options)
        return state._replace(stats=after)


# `run` is `_apply` of normalizer.py, which cannot be imported from here.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 8))
def apply_by_domain(
    run: Callable[..., Any],
    layer: Any,
    training: bool | None,
    axes: tuple[int, ...],
    arrays: tuple[Any, ...],
    flag: Array | None,
    options: dict[str, Any],
    ids: Array,
    complete: bool,
) -> tuple[Array, Any]:
    """Returns what `run` does, with the statistics of the domain of each row.

    One id makes x a single row, whose reduction is that of a whole batch.
    """
    params, state, x, weights, residual, adjustment = arrays
    ghosts = None if training is False else layer.ghost_batches
    if ghosts is not None:
        ids = jnp.broadcast_to(ids, x.shape[:1])
    at, features = ids.ndim, x.ndim - len(axes)
    x, weights, residual, adjustment = jax.tree.map(
        lambda a: a[None] if a.ndim < x.ndim else jnp.expand_dims(a, at),
        (x, weights, residual, jax.tree.map(jnp.asarray, adjustment)),
    )
    # Barriers: XLA would otherwise move the reshapes into the loops over x.
    (x,) = computed_apart(x)
    axes = tuple(axis + 1 for axis in axes)
    bank = layer.bank
    if ghosts is not None:
        bank = Bank(bank.size, ghosts, x.shape[0] // ghosts.size)
    segments = _segments(bank, ids, x)
    options = {**options, "segments": segments}

    def of_rows(vector: Array) -> Array:
        return bank.spread(vector, options) if vector.ndim > features else vector[None]

    running, pair = jax.tree.map(
        of_rows, (layer.running(state), layer.scale_and_bias(params))
    )
    if not complete:
        # In the offset alone, so that a row which is left out of the loss has no gradient.
        inside = jnp.squeeze(segments < bank.size * bank.groups, axes)
        scale, bias = pair
        bias = jnp.zeros_like(running[0]) if bias is None else bias
        pair = scale, jnp.where(inside, bias, jnp.full_like(bias, jnp.nan))
    arrays = pair, _State(state, running), x, weights, residual, adjustment
    y, after = run(_EachRow(layer, bank), training, axes, *arrays, flag, options)
    (y,) = computed_apart(y)
    return jnp.squeeze(y, at), None if after is None else after.stats


def moments_by_domain(
    layer: Any,
    x: ArrayLike,
    feature_axes: Axes,
    weights: ArrayLike | None,
    domains: ArrayLike | None,
) -> Moments:
    """Returns `moments` of the rows of each domain of `layer`."""
    x = as_float(x)
    axes = reduction_axes(feature_axes, x.shape)
    ids, _ = as_ids(layer, domains, x.shape[:1] if axes[0] == 0 else ())
    return _moments(layer.bank, axes, x, prepare_weights(weights, x, axes), ids)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(
    bank: Bank, axes: tuple[int, ...], x: Array, weights: Array | None, ids: Array
) -> Moments:
    x, weights = jax.tree.map(lambda a: jnp.expand_dims(a, ids.ndim), (x, weights))
    axes = tuple(axis + 1 for axis in axes)
    weights = split_like(x, weights)
    x = x if weights is None else hide_unweighted(x, weights)
    rows = exact_moments(x, weights, axes)
    batch = bank.pool(rows, {"segments": _segments(bank, ids, x)})
    return Moments(*(jnp.squeeze(part, axes) for part in batch[:3]))


def _segments(bank: Bank, ids: Array, x: Array) -> Array:
    """Returns the segment of each row of `x`, of its rank; one too many for none."""
    segments = ids
    if bank.ghosts is not None:
        rows, size = jnp.arange(x.shape[0], dtype=ids.dtype), bank.ghosts.size
        group = rows % bank.groups if bank.ghosts.strided else rows // size
        none = bank.size * bank.groups
        segments = jnp.where(ids < bank.size, ids + bank.size * group, none)
    return split_like(x, segments.reshape(-1, *[1] * (x.ndim - 1)))
