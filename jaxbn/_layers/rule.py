"""The one rule: reduce x, compute vectors, map x; and the derivative of all three.

x is read by the reduction and by the map. What lies between are vectors, one value for each
feature, which JAX differentiates by itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._dtypes import real_part, upcast, widest
from jaxbn._kernels.accelerator import divisor
from jaxbn._kernels.affine_map import affine_map, affine_map_tangent
from jaxbn._kernels.operands import Map
from jaxbn._kernels.operation import computed_apart, number_of_elements
from jaxbn._kernels.reduction import ExactMoments, exact_moments, moments_tangent
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._sharding import closed, where_alike, zeros_like_result
from jaxbn._statistics.sync import sum_over_devices, sync_exact
from jaxbn._typing import Activation, Array, DTypeLike, Pair


class Plan(NamedTuple):
    """The static part of one application."""

    layer: Any  # a Normalizer
    axes: tuple[int, ...]  # of x that statistics are taken over
    training: bool | None  # None where a traced flag tells
    ghosts: GhostBatches | None
    certain: bool  # whether the batch is known to hold something of every feature
    activation: Activation | None
    wide: DTypeLike  # the dtype of everything between x and y
    dtype: DTypeLike  # that of y


class Given(NamedTuple):
    """The vectors that may be differentiated, each of x's rank and broadcast to x."""

    running: Pair
    params: Pair
    adjustment: Pair | None


def plan_of(layer, training, axes, shape, x, weights, given, others) -> tuple[Plan, Any]:
    """Returns the static part of an application, and what its activation has captured."""
    wide = widest(upcast(x).dtype, *(a.dtype for a in jax.tree.leaves(given)))
    dtype = layer.dtype
    if dtype is None:
        dtype = wide if jnp.issubdtype(wide, jnp.complexfloating) else x.dtype
    # Fuse an activation on a reshaped x only if it is known to be elementwise (relu).
    relu, captured = layer.activation is jax.nn.relu, ()
    ghosts = None if shape is None else shape.ghosts
    plain = ghosts is None and (shape is None or not shape.merged)
    axes = axes if shape is None else shape.axes
    fused = layer.activation if plain or relu else None
    if fused is not None and not relu:
        # What it captured, such as the slope of a parametric ReLU, may be differentiated.
        fused, captured = closed(fused, x, wide, (weights, given, others))
    certain = weights is None and layer.bank is None
    certain = certain and all(isinstance(n, int) and n > 0 for n in x.shape)
    plan = Plan(layer, axes, training, ghosts, certain, fused, wide, dtype)
    return plan, captured


class Line(NamedTuple):
    """The map of x, (x - mean) slope + offset."""

    mean: Array
    slope: Array
    offset: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalized(plan, x, weights, residual, captured, given, flag, correcting):
    """Returns y and the moments of the batch (of each ghost batch), or None."""
    batch = _reduced(plan, x, weights, flag, correcting)
    line = line_of(plan, batch, given, flag, correcting)
    return _mapped(plan, x, line, residual, captured), batch


@functools.partial(normalized.defjvp, symbolic_zeros=True)
def _normalized_jvp(plan, primals, tangents):
    x, weights, residual, captured, given, flag, correcting = primals
    moving = jax.tree.map(_unless_zero, tangents)
    x_moving, weights_moving, residual_moving, captured_moving, given_moving, *_ = moving
    batch = _reduced(plan, x, weights, flag, correcting)
    # Tangents of x are upcast here alone, so that the backward pass adds the gradients of
    # the reduction and of the map in float32 and rounds dx once.
    x_moving = None if x_moving is None else upcast(x_moving)
    own = None if batch is None else (batch.mean, batch.var)
    moves = x_moving is not None or weights_moving is not None
    own_moving = jax.tree.map(jnp.zeros_like, own)
    if batch is not None and moves:
        moves = x_moving, weights_moving
        own_moving = _moments_moving(plan, x, weights, batch, moves, correcting)
    elif not jax.tree.leaves(given_moving):
        own = None

    def vectors(own, given):
        seen = batch if batch is None else batch._replace(mean=own[0], var=own[1])
        return line_of(plan, seen, given, flag, correcting)

    if own is None and not jax.tree.leaves(given_moving):
        line, line_moving = vectors(batch and batch[:2], given), (None,) * 3
    else:
        given_moving = _with_zeros(given_moving, given)
        line, line_moving = jax.jvp(vectors, (own, given), (own_moving, given_moving))
    y = _mapped(plan, x, line, residual, captured)
    moving = Map._make((x_moving, *line_moving, residual_moving))
    of = Map._make((x, *line, residual))
    y_moving = _mapped_tangent(plan, of, y, moving, captured, captured_moving)
    return (y, batch), (y_moving, jax.tree.map(jnp.zeros_like, batch))


def _reduced(plan, x, weights, flag, correcting) -> ExactMoments | None:
    """Returns the moments of the batch over all devices; zeros unless `flag` holds."""
    if plan.training is False:
        return None

    def reduce() -> ExactMoments:
        batch, layer = exact_moments(x, weights, plan.axes), plan.layer
        batch = batch if layer.bank is None else layer.bank.pool(batch, correcting[1])
        if layer.axis_name is None:
            return batch
        return sync_exact(batch, layer.axis_name, layer.axis_index_groups)

    if flag is None:
        return reduce()
    return lax.cond(flag, reduce, lambda: zeros_like_result(reduce))


def _moments_moving(plan, x, weights, batch, moving, correcting):
    """Returns the tangents of the mean and the variance, whatever the flag says.

    It decides in `line_of`: that costs the backward pass nothing, and JAX cannot transpose
    a conditional that a vmap has made a select.
    """
    moments, layer = (batch.mean, batch.rest, batch.var), plan.layer
    if layer.bank is not None:
        moments = layer.bank.spread(moments, correcting[1])
    totals = moments_tangent(x, weights, moments, moving, plan.axes)
    if layer.bank is not None:
        totals = layer.bank.total(totals, correcting[1])
    if layer.axis_name is not None:
        totals = sum_over_devices(totals, layer.axis_name, layer.axis_index_groups)
    n = batch.count if plan.certain and plan.training else divisor(batch.count)
    if n is batch.count and layer.axis_name is None:
        n = number_of_elements(x, plan.axes)
    return tuple(total / jnp.asarray(n, total.dtype) for total in totals)


def line_of(
    plan: Plan, batch: ExactMoments | None, given: Given, flag: Any, correcting: Any
) -> Line:
    """Returns the map that normalizes x, given the moments of the batch or None.

    The rest, what rounding left out of the mean, goes into the offset, so that x minus the
    rounded mean, which has no rounding error, is enough for an exact y.
    """
    mean, var = given.running
    pairs, rest, layer = [], None, plan.layer
    if batch is not None:
        own = batch if layer.bank is None else layer.bank.spread(batch, correcting[1])
        seen = None if plan.certain else own.count > 0
        seen = flag if seen is None else seen if flag is None else seen & flag
        if seen is None:
            mean, var, rest = own.mean, own.var, own.rest
        else:
            mean = where_alike(seen, own.mean, mean)
            var = where_alike(seen, own.var, var)
            rest = where_alike(seen, own.rest, 0)
        # The correction touches the normalized batch first, then the adjustment does.
        given_pairs = _correction(plan, batch, correcting), given.adjustment
        for pair in (pair for pair in given_pairs if pair is not None):
            pairs.append(
                tuple(where_alike(flag, a, b) for a, b in zip(pair, (1, 0), strict=True))
            )
    slope, offset = layer.standardize(mean, var.astype(real_part(plan.wide)))
    slope, mean = slope.astype(plan.wide), mean.astype(plan.wide)
    offset = None if offset is None else offset.astype(plan.wide)
    for factor, shift in (*pairs, given.params):
        slope, offset = _followed(slope, offset, factor, shift)
    if rest is not None:
        offset = _followed(slope, offset, None, -(rest.astype(plan.wide) * slope))[1]
    return Line(mean, slope, offset)


def _correction(plan: Plan, batch: ExactMoments, correcting: Any) -> Any:
    """Returns what the layer multiplies and adds after standardizing, of x's rank."""
    state, options = correcting
    pair = plan.layer.correction(state, whole_batch(plan, batch), **options)
    if pair is None:
        return None
    return tuple(_of_rank(plan, jnp.asarray(a)) for a in pair)


def whole_batch(plan: Plan, batch: ExactMoments) -> ExactMoments:
    """Returns the moments of the whole batch, of the shape of the features."""
    batch = ExactMoments(*(jnp.squeeze(array, plan.axes) for array in batch))
    return batch if plan.ghosts is None else plan.ghosts.merge(batch)


def _of_rank(plan: Plan, per_feature: Array) -> Array:
    axes = plan.axes if plan.ghosts is None else plan.ghosts.all_axes(plan.axes)
    return jnp.expand_dims(per_feature, axes)


def _mapped(plan: Plan, x: Array, line: Line, residual: Any, captured: Any) -> Array:
    if plan.activation is None or plan.activation is jax.nn.relu:
        relu = plan.activation is not None
        return affine_map(x, *line, residual, relu=relu, dtype=plan.dtype)
    y = affine_map(x, *line, residual, dtype=plan.wide)
    return plan.activation(y, *captured).astype(plan.dtype)


def _mapped_tangent(plan, of, y, moving, captured, captured_moving):
    if plan.activation is None or plan.activation is jax.nn.relu:
        relu = plan.activation is not None
        return affine_map_tangent(of, y, moving, relu=relu, dtype=plan.dtype)
    tangent = affine_map_tangent(of, None, moving, relu=False, dtype=plan.wide)
    captured_moving = _with_zeros(captured_moving, captured)
    return _through_activation(plan, of, captured, tangent, captured_moving)


# Checkpointed: what enters the activation is computed from x again, not kept.
@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _through_activation(plan, of, captured, tangent, captured_moving):
    x, *vectors = computed_apart(of.x, of.mean, of.slope, of.offset, recomputes=True)
    line = Line._make(vectors)
    before = affine_map(x, *line, of.residual, dtype=plan.wide)
    along = (before, *captured), (tangent, *captured_moving)
    return jax.jvp(plan.activation, *along)[1].astype(plan.dtype)


def _followed(slope: Array, offset: Any, factor: Any, shift: Any) -> tuple[Array, Any]:
    """Returns the slope and the offset of a map whose result is multiplied and shifted."""
    if factor is not None:
        factor = factor.astype(slope.dtype)
        slope, offset = slope * factor, None if offset is None else offset * factor
    if shift is not None:
        shift = shift.astype(slope.dtype)
        offset = shift if offset is None else offset + shift
    return slope, offset


def _unless_zero(tangent: Any) -> Any:
    return None if isinstance(tangent, SymbolicZero) else tangent


def _with_zeros(moving: Any, values: Any) -> Any:
    """Returns the tangents of values, with zeros for those that are None."""

    def filled(tangent: Any, value: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, value) if tangent is None else tangent

    return jax.tree.map(filled, moving, values, is_leaf=lambda tangent: tangent is None)
