"""What every normalizer answers, and one application of it."""

import functools
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._axes import divided_axes, expand, no_axis_left
from jaxbn._dtypes import as_float, refuse_half
from jaxbn._kernels.reduction import hide_unweighted
from jaxbn._layers import checks
from jaxbn._layers.bank import Bank
from jaxbn._layers.by_domain import apply_by_domain, as_ids
from jaxbn._layers.foreign_words import not_a_function
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._layers.loop_shape import loop_shape_of
from jaxbn._layers.rule import Given, normalized, plan_of, whole_batch
from jaxbn._sharding import split_like, split_like_any
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
from jaxbn._values.journeys import copied, reduced

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
        ...     momentum: float = 0.5
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
        [0.8 1.1] [1.75]

    Attributes:
        feature_axes: The axis or axes that keep statistics of their own.
        axis_name: The mapped axis, or axes, over which a batch is spread, or None.
        axis_index_groups: Groups of device indices that share statistics, or None.
        activation: Applied last, or None.
        dtype: The dtype of the result; None for that of x.
        ghost_batches: How the batch is divided in training, or None.
        bank: How many domains have statistics of their own, or None.
    """

    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisGroups | None = None
    activation: Activation | None = None
    dtype: DTypeLike | None = None
    ghost_batches: GhostBatches | None = None
    bank: Bank | None = None

    if not TYPE_CHECKING:  # no part of the protocol: how one of your own is pickled
        __reduce__, __copy__ = reduced, copied

    # To a type checker, `*_: Any, **options: Any` are `...`: a subclass names its keywords.

    def init(
        self, num_features: int | tuple[int, ...], *_: Any, **options: Any
    ) -> tuple[Params, State]:
        """Returns `(params, state)` for inputs with `num_features` features."""
        raise checks.unanswered(self, "init")

    @checks.in_our_words
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

    if not TYPE_CHECKING:

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise TypeError(not_a_function(type(self).__name__))

    def track(self, state: State, batch: Moments, *_: Any, **options: Any) -> State:
        """Returns the state after one update with the moments of a batch."""
        raise checks.unanswered(self, "track")

    def running(self, state: State) -> Pair:
        """Returns the mean and the variance that inference normalizes with."""
        return state.mean, state.var  # pyright: ignore[reportAttributeAccessIssue]

    def standardize(self, mean: Array, var: Array) -> tuple[Array, Array | None]:
        """Returns what (x - mean) is multiplied by, and what is added then, or None."""
        raise checks.unanswered(self, "standardize")

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
    axes, features = divided_axes(layer.feature_axes, x.shape)
    checks.check_made_by(layer, params, state, features, x.shape)
    if adjustment is not None:
        checks.check_adjustment(adjustment, features, x.shape)
    if residual is not None:
        checks.check_residual(residual, x.shape)
    mode, flag = checks.split_mode(training)
    ids = None
    if layer.bank is not None:
        rows = x.shape[:1] if axes[:1] == (0,) else ()
        ids = as_ids(layer, options.pop("domains", None), rows)
    lone = not axes
    if lone:
        # One example: the rest of its batch is on the mapped axis.
        if mode is not False and layer.axis_name is None:
            raise no_axis_left(features, x.shape)
        x, axes = x[None], (0,)
        residual = None if residual is None else jnp.asarray(residual)[None]
        weights = None if weights is None else jnp.asarray(weights)[None]
    layer.check(state, x, mode is not False, **options)
    if mode is not False:
        refuse_half(state, "state")
        if layer.axis_name is not None:
            check_axis(layer.axis_name, layer.axis_index_groups)
        if layer.ghost_batches is not None:
            layer.ghost_batches.check(x.shape, axes)
    if weights is not None:
        weights = prepare_weights(weights, x, axes)
    if mode is False:
        adjustment, options = None, {}
    try:
        arrays = params, state, x, weights, residual, adjustment
        if ids is None:
            y, after = _apply(layer, mode, axes, *arrays, flag, options)
        else:
            plan = _apply, layer, mode, axes
            y, after = apply_by_domain(*plan, arrays, flag, options, *ids)
    except NotImplementedError as error:
        if layer.axis_index_groups is None:
            raise
        raise NotImplementedError(
            f"JAX has no axis_index_groups under vmap, got {layer.axis_index_groups}. Use "
            "pmap or shard_map, or nest two vmaps and name the inner one, a group."
        ) from error
    return y[0] if lone else y, state if mode is False else after


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
        frozen = lax.stop_gradient((state, options))
        # Only on meshes of explicit axes do types tell how arrays are split over devices.
        leaves = jax.tree.leaves((params, state, x, weights, residual, adjustment, options))
        explicit = any(any(jax.typeof(leaf).sharding.spec) for leaf in leaves)
        if explicit:
            everything = given, weights, residual, frozen
            given, weights, residual, frozen = split_like(x, everything, axes)
        others = residual, flag
        plan, captured = plan_of(layer, training, axes, shape, x, weights, given, others)
        seen = x if weights is None else hide_unweighted(x, weights)
        if shape is None:
            given = jax.tree.map(lambda a: expand(a, axes) if a.ndim < x.ndim else a, given)
        else:
            everything = seen, weights, residual, given
            seen, weights, residual, given = jax.tree.map(shape.of, everything)
        y, batch = normalized(plan, seen, weights, residual, captured, given, flag, frozen)
        y = y if shape is None else shape.back(y, x)
        if layer.activation is not None and plan.activation is None:
            y = layer.activation(y)
        if batch is None:
            return y, None
        # The state carries no gradient: differentiating a loss through two steps would
        # otherwise differentiate the first batch's statistics again.
        state, batch, options = lax.stop_gradient((state, batch, options))
        batch = whole_batch(plan, batch)
        if explicit:
            batch = split_like_any(state, batch)
        after = layer.track(state, batch, **options)
        if flag is not None:
            after = jax.tree.map(lambda new, old: jnp.where(flag, new, old), after, state)
        return y, after
