"""What every normalizer answers, and one application of it."""

import functools
import inspect
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axes import expand, feature_shape, reduction_axes
from jaxbn._dtypes import as_float, refuse_half, upcast, widest
from jaxbn._journeys import copied, reduced
from jaxbn._kernels.reduction import hide_unweighted
from jaxbn._layers import checks
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._layers.loop_shape import loop_shape_of
from jaxbn._layers.rule import Given, Plan, normalized, whole_batch
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.named_axes import check_axis
from jaxbn._statistics.weights import prepare_weights
from jaxbn._typing import (
    Activation,
    Array,
    ArrayLike,
    Axes,
    AxisGroups,
    AxisName,
    DTypeLike,
    Pair,
    PairLike,
)

Params = TypeVar("Params")
State = TypeVar("State")


class Normalizer(Protocol[Params, State]):
    r"""What every kind of normalization is: a value that answers for vectors alone.

    .. math::
        y = \left((x - \mu)\,a + b\right) \gamma + \beta

    with a and b from `standardize`, and \gamma and \beta from `scale_and_bias`. Inherit
    from this class, write `init`, `track` and what else differs from the defaults, and the
    normalizer works wherever a `BatchNorm` does: over devices, in ghost batches, gathered,
    re-estimated, folded, and as a module of Flax. Make it a frozen dataclass, and register
    it with `jax.tree_util.register_static`, to pass it through `jax.jit` without tracing
    again for an equal value.

    Whatever has an `init` and an `apply` of its own, without inheriting, is a normalizer
    for `jaxbn.init`, `jaxbn.apply` and the `Norm` modules.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, jaxbn
        >>> @jax.tree_util.register_static
        ... @dataclasses.dataclass(frozen=True)
        ... class RootMeanSquareNorm(jaxbn.Normalizer):
        ...     momentum: float = 0.9
        ...     def init(self, num_features):
        ...         one = jnp.ones(num_features)
        ...         return jaxbn.BatchNormParams(one, None), jaxbn.BatchStats(0 * one, one)
        ...     def standardize(self, mean, var):
        ...         inverse = jax.lax.rsqrt(mean**2 + var + 1e-6)
        ...         return inverse, mean * inverse
        ...     def track(self, state, batch):
        ...         return jaxbn.update_running(state, batch, momentum=self.momentum)
        ...
        >>> norm = RootMeanSquareNorm()
        >>> params, state = norm.init(1)
        >>> y, state = norm.apply(params, state, jnp.array([[3.0], [4.0]]), training=True)
        >>> print(y.round(1).ravel(), state.mean)
        [0.8 1.1] [0.35]

    Attributes:
        feature_axes: The axis or axes that keep statistics of their own.
        axis_name: The mapped axis, or axes, over which a batch is spread, or None.
        axis_index_groups: Groups of device indices that share statistics, or None.
        activation: Applied last, or None.
        dtype: The dtype of the result; None for that of x.
        ghost_batches: How the batch is divided in training, or None.
    """

    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisGroups | None = None
    activation: Activation | None = None
    dtype: DTypeLike | None = None
    ghost_batches: GhostBatches | None = None

    if not TYPE_CHECKING:  # no part of the protocol: how one of your own is pickled
        __reduce__, __copy__ = reduced, copied

    # To a type checker, `*_: Any, **options: Any` are `...`: a subclass names its keywords.

    def init(
        self, num_features: int | tuple[int, ...], *_: Any, **options: Any
    ) -> tuple[Params, State]:
        """Returns `(params, state)` for inputs with `num_features` features."""
        raise _unanswered(self, "init")

    def apply(
        self,
        params: Params,
        state: State,
        x: ArrayLike,
        training: bool | Array,
        *_: Any,
        **options: Any,
    ) -> tuple[Array, State]:
        """Returns the normalized `x` and the state after it, as `BatchNorm.apply` does.

        `options` are `weights`, `residual`, `adjustment`, and keywords of `track`.
        """
        return apply_normalizer(self, params, state, x, training, *_, **options)

    def track(self, state: State, batch: Moments, *_: Any, **options: Any) -> State:
        """Returns the state after one update with the moments of a batch."""
        raise _unanswered(self, "track")

    def running(self, state: State) -> Pair:
        """Returns the mean and the variance that inference normalizes with."""
        return state.mean, state.var  # pyright: ignore[reportAttributeAccessIssue]

    def standardize(self, mean: Array, var: Array) -> tuple[Array, Array | None]:
        """Returns what (x - mean) is multiplied by, and what is added then, or None."""
        raise _unanswered(self, "standardize")

    def scale_and_bias(self, params: Params) -> tuple[Array | None, Array | None]:
        """Returns the trained scale and bias, each of the shape of the features or None."""
        return params.scale, params.bias  # pyright: ignore[reportAttributeAccessIssue]

    def correction(
        self, state: State, batch: Moments, *_: Any, **options: Any
    ) -> Pair | None:
        """Returns what multiplies and shifts the standardized batch, or None."""
        return None

    def check(self, state: State, x: Array, tracks: bool, *_: Any, **options: Any) -> None:
        """Raises if the arguments of `apply` do not fit; nothing by default."""


def _unanswered(normalizer: Any, name: str) -> TypeError:
    kind, line = type(normalizer).__name__, signature_of(name)
    return TypeError(f"{kind} does not answer {name}, which this needs. Write `{line}`.")


def signature_of(name: str) -> str:
    """Returns the line that begins a method of a normalizer."""
    whole = inspect.signature(getattr(Normalizer, name))
    shown = [p for p in whole.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    return f"def {name}{whole.replace(parameters=shown)}"


def apply_normalizer(
    layer: Any,
    params: Any,
    state: Any,
    x: ArrayLike,
    training: bool | Array,
    *,
    weights: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    adjustment: PairLike | None = None,
    **options: Any,
) -> tuple[Array, Any]:
    """Checks the arguments of `layer.apply`, then runs it in one compiled function."""
    x = as_float(x)
    axes = reduction_axes(layer.feature_axes, x.shape)
    features = feature_shape(layer.feature_axes, x.shape)
    checks.check_made_by(layer, params, state, features, x.shape)
    if adjustment is not None:
        checks.check_adjustment(adjustment, features, x.shape)
    if residual is not None:
        checks.check_residual(residual, x.shape)
    mode, flag = checks.split_mode(training)
    layer.check(state, x, mode is not False, **options)
    if mode is not False:
        refuse_half(state, "state")
        if layer.axis_name is not None:
            check_axis(layer.axis_name, layer.axis_index_groups)
        if layer.ghost_batches is not None:
            layer.ghost_batches.check(x.shape, axes)
    weights = prepare_weights(weights, x, axes)
    if mode is False:
        adjustment, options = None, {}
    try:
        arrays = params, state, x, weights, residual, adjustment
        y, after = _apply(layer, mode, axes, *arrays, flag, options)
    except NotImplementedError as error:
        if layer.axis_index_groups is None:
            raise
        raise NotImplementedError(
            f"JAX has no axis_index_groups under vmap, got {layer.axis_index_groups}. Use "
            "pmap or shard_map, or nest two vmaps and name the inner one, a group."
        ) from error
    return y, state if mode is False else after


# Not inlined: JAX traces, differentiates and lowers this once for all layers of equal
# settings and shapes, and a network holds calls of it. XLA inlines the calls before it
# optimizes anything ("call-inliner"), so the compiled program is the same.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(
    layer, training, axes, params, state, x, weights, residual, adjustment, flag, options
):
    with jax.named_scope(f"jaxbn.{type(layer).__name__}"):
        ghosts = None if training is False else layer.ghost_batches
        # Ghost batches and channels first are computed on a reshaped x.
        other = ghosts is not None or axes[-1] == x.ndim - 1
        shape = loop_shape_of(x, axes, ghosts) if other else None
        given = Given(layer.running(state), layer.scale_and_bias(params), adjustment)
        plan, captured = _plan(layer, training, axes, shape, x, weights, given)
        seen = x if weights is None else hide_unweighted(x, weights)
        if shape is None:
            given = jax.tree.map(lambda a: expand(a, axes) if a.ndim < x.ndim else a, given)
        else:
            everything = seen, weights, residual, given
            seen, weights, residual, given = jax.tree.map(shape.of, everything)
        frozen = lax.stop_gradient((state, options))
        y, batch = normalized(plan, seen, weights, residual, captured, given, flag, frozen)
        y = y if shape is None else shape.back(y, x)
        if layer.activation is not None and plan.activation is None:
            y = layer.activation(y)
        if batch is None:
            return y, None
        # The state carries no gradient: differentiating a loss through two steps would
        # otherwise differentiate the first batch's statistics again.
        state, batch, options = lax.stop_gradient((state, batch, options))
        after = layer.track(state, whole_batch(plan, batch), **options)
        if flag is not None:
            after = jax.tree.map(lambda new, old: jnp.where(flag, new, old), after, state)
        return y, after


def _plan(layer, training, axes, shape, x, weights, given) -> tuple[Plan, Any]:
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
        fused, captured = jax.closure_convert(fused, jax.ShapeDtypeStruct(x.shape, wide))
    certain = weights is None and all(isinstance(n, int) and n > 0 for n in x.shape)
    plan = Plan(layer, axes, training, ghosts, certain, fused, wide, dtype)
    return plan, captured
