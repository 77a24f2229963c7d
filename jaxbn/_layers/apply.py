"""One application of a layer that works from moments: batch, state, affine map."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axes import expand, feature_shape, reduction_axes
from jaxbn._dtypes import as_float, widest
from jaxbn._kernels.affine import affine_map
from jaxbn._kernels.barriers import as_input
from jaxbn._layers.ghost_batches import Groups
from jaxbn._layers.loop_shape import view_of
from jaxbn._layers.normalizer import (
    check_adjustment,
    check_fields,
    check_residual,
    split_mode,
)
from jaxbn._sharding import reshard_like, vary_alike
from jaxbn._state import BatchNormParams
from jaxbn._statistics.moments import exact_moments
from jaxbn._statistics.sync import check_axis, sync_exact
from jaxbn._statistics.weights import hide_unweighted, prepare_weights
from jaxbn._typing import Array, Pair


class Statistics(NamedTuple):
    """What x is normalized with, each of x's rank and broadcast to x."""

    mean: Array
    var: Array
    scale: Array | None
    bias: Array | None


def apply_layer(
    layer: Any,
    params: BatchNormParams,
    state: Any,
    x: Array,
    training: bool | Array,
    *,
    groups: Groups | None = None,
    weights: Array | None = None,
    residual: Array | None = None,
    adjustment: Pair | None = None,
    **options: Any,
) -> tuple[Array, Any]:
    """Checks the arguments of `layer.apply`, then runs it in one compiled function.

    A layer is a frozen value with `_settings()`, the `BatchNorm` that holds axes, epsilon,
    dtypes and activation; `_stats_fields()`, the type of its state and the fields of it
    that are None; `_check(state, x, tracks, **options)`; and `_track(batch, state,
    **options)`, which returns what else scales and shifts the normalized batch, or None,
    and the new state.
    """
    x = as_float(x)
    bn = layer._settings()
    axes = reduction_axes(bn.feature_axes, x.shape)
    features = feature_shape(bn.feature_axes, x.shape)
    check_fields("params", params, bn._params_fields(), features, x.shape)
    check_fields("state", state, layer._stats_fields(), features, x.shape)
    check_adjustment(adjustment, features, x.shape)
    check_residual(residual, x.shape)
    mode, flag = split_mode(training)
    layer._check(state, x, mode is not False, **options)
    if bn.axis_name is not None and mode is not False:
        check_axis(bn.axis_name, bn.axis_index_groups)
    if groups is not None and mode is not False:
        groups.check(x.shape, axes)
    batch = x, prepare_weights(weights, x, axes), adjustment, options
    try:
        return _run(layer, mode, groups, flag, params, state, batch, residual)
    except NotImplementedError as error:
        if bn.axis_index_groups is None:
            raise
        raise NotImplementedError(
            f"JAX has no axis_index_groups under vmap, got {bn.axis_index_groups}. Use "
            "pmap or shard_map, or nest two vmaps and name the inner one, a group."
        ) from error


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _run(layer, mode, groups, flag, params, state, batch, residual):
    bn = layer._settings()
    x, weights, adjustment, options = batch
    view = view_of(x, bn.feature_axes, None if mode is False else groups)
    # A function that is not known to work by elements must see the shape that x has.
    plain = view.groups is None and not view.merged
    fused = bn.activation if plain or bn.activation is jax.nn.relu else None

    with jax.named_scope(f"jaxbn.{type(layer).__name__}"):
        seen = as_input(view.of(hide_unweighted(x, weights)), recomputes=fused is not None)
        running = jax.tree.map(view.of, Statistics(state.mean, state.var, *params))

        def from_batch():
            parts, rest = exact_moments(seen, jax.tree.map(view.of, weights), view.axes)
            if bn.axis_name is not None:
                parts = sync_exact(parts, rest, bn.axis_name, bn.axis_index_groups)
            whole = parts if view.groups is None else view.groups.merge(parts)
            correction, new_state = layer._track(whole, state, **options)
            statistics = _where_seen(parts, running, view.axes)
            # The correction touches the normalized batch first, then the adjustment does.
            for pair in (adjustment, correction):
                if pair is not None:
                    statistics = _compose(statistics, *map(view.of, pair))
            return statistics, new_state

        statistics, state = _choose(mode, flag, from_batch, lambda: (running, state))
        added = jax.tree.map(view.of, residual)
        y = view.back(affine_map(seen, *statistics, bn.epsilon, bn.dtype, added, fused), x)
        return y if bn.activation is fused else bn.activation(y), state


def _where_seen(batch, running: Statistics, axes: tuple[int, ...]) -> Statistics:
    """Returns the statistics of the batch, or the running ones of features it lacks."""
    seen = expand(batch.count > 0, axes)
    mean, var = (
        _where(seen, expand(new, axes), old.astype(new.dtype))
        for new, old in ((batch.mean, running.mean), (batch.var, running.var))
    )
    return running._replace(mean=mean, var=var)


def _where(seen: Array, new: Array, old: Array) -> Array:
    """Returns `jnp.where`, whose types must agree where they tell of shardings."""
    if old.shape == new.shape:
        old = reshard_like(old, new)
    return jnp.where(reshard_like(seen, new), new, old)


def _compose(statistics: Statistics, factor: Array, offset: Array) -> Statistics:
    """Lets the normalized x be multiplied and shifted before scale and bias."""
    scale, bias = statistics.scale, statistics.bias
    given = [array for array in (factor, offset, scale, bias) if array is not None]
    wide = widest(*(array.dtype for array in given))
    factor, offset = factor.astype(wide), offset.astype(wide)
    if scale is not None:
        factor, offset = factor * scale.astype(wide), offset * scale.astype(wide)
    if bias is not None:
        offset = offset + bias.astype(wide)
    return statistics._replace(scale=factor, bias=offset)


def _choose(
    mode: bool | None,
    flag: Array | None,
    from_batch: Callable[[], tuple[Statistics, Any]],
    from_state: Callable[[], tuple[Statistics, Any]],
) -> tuple[Statistics, Any]:
    """Returns the statistics and the new state of the mode that holds."""
    if mode is not None:
        return from_batch() if mode else from_state()
    kinds = [jax.eval_shape(branch) for branch in (from_batch, from_state)]

    def agreeing(branch):
        """Runs a branch; those of one program must agree in structure and types."""
        statistics, state = branch()
        fields = map(_like, statistics, (0, 1, 1, 0), kinds[0][0], kinds[1][0])
        statistics = statistics._make(fields)
        return statistics, jax.tree.map(vary_alike, state, kinds[0][1])

    return lax.cond(flag, lambda: agreeing(from_batch), lambda: agreeing(from_state))


def _like(array: Array | None, neutral: int, *kinds: Any) -> Array | None:
    """Returns `array`, or what changes nothing, as all of `kinds` can be typed."""
    kinds = tuple(kind for kind in kinds if kind is not None)
    if not kinds:
        return None
    array = jnp.asarray(neutral if array is None else array)
    array = array.astype(widest(*(kind.dtype for kind in kinds)))
    array = jnp.broadcast_to(array, jnp.broadcast_shapes(*(kind.shape for kind in kinds)))
    return functools.reduce(vary_alike, kinds, array)
