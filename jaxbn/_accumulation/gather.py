"""Gathering: the moments of several batches, pooled, and tracked as those of one."""

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._accumulation.state import Gathered
from jaxbn._axes import divided_axes
from jaxbn._layers.by_domain import moments_by_domain
from jaxbn._layers.checks import in_our_words, split_mode
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._layers.normalizer import Normalizer, Params, State
from jaxbn._layers.required import require
from jaxbn._layers.wrapper import Wrapper
from jaxbn._sharding import reshard_like
from jaxbn._statistics.moments import Moments, merge_moments, moments
from jaxbn._statistics.sync import sync_moments
from jaxbn._typing import Array, ArrayLike

# The keywords of `apply` that its `track` does not take.
NOT_TRACKED = {"weights", "residual", "adjustment", "domains"}


@jax.tree_util.register_static
@in_our_words
@dataclasses.dataclass(frozen=True, repr=False)
class Gather(Wrapper[Params, State]):
    """A norm that can gather: with a state from `gather`, it pools before it tracks.

    Each batch is normalized as by `inner`. With a `Gathered` state, the moments of the
    batch are merged into `state.batch`, and `state.stats` are the running statistics after
    one update with all of them, however many batches, applications or microbatches they
    came from. In inference the moments of x are gathered too, and `stats` stay.
    With any other state, this is `inner`; so it can stay in a model for good.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> bn = jaxbn.Gather(jaxbn.BatchNorm(momentum=0.9))
        >>> params, state = bn.init(2)
        >>> microbatches = jnp.arange(24.0).reshape(3, 4, 2)
        >>> def step(state, x):
        ...     y, state = bn.apply(params, state, x, training=True)
        ...     return state, y.mean()
        ...
        >>> gathered, _ = jax.lax.scan(step, jaxbn.gather(state), microbatches)
        >>> state = jaxbn.track_gathered(gathered)
        >>> print(state.mean.round(3))
        [1.1 1.2]

    Attributes:
        inner: A `BatchNorm`, a `BatchRenorm` or a `GhostBatchNorm`. What ghost batches
            gather is always the pooled moments of the whole batch.

    Raises:
        TypeError: inner is another kind of normalizer.

    Differs from accumulating gradients with a plain norm, which tracks each microbatch
    for itself: as many updates, of variances that leave out how far the means of the
    microbatches lie apart.
    """

    inner: Normalizer[Params, State]

    def __post_init__(self) -> None:
        require("Gather", self.inner, "standardize", "track", "correction", "running")

    @property
    def wrapped(self) -> Any:
        """What normalizes."""
        return self.inner

    @overload
    def apply(
        self,
        params: Params,
        state: Gathered,
        x: ArrayLike,
        training: bool | Array,
        *_: Any,
        **options: Any,
    ) -> tuple[Array, Gathered]: ...

    @overload
    def apply(
        self,
        params: Params,
        state: State,
        x: ArrayLike,
        training: bool | Array,
        *_: Any,
        **options: Any,
    ) -> tuple[Array, State]: ...

    @in_our_words
    def apply(
        self,
        params: Params,
        state: Any,
        x: ArrayLike,
        training: bool | Array,
        *_: Any,
        **options: Any,
    ) -> tuple[Array, Any]:
        """Returns the normalized `x` and the state after it.

        Takes the arguments of `inner.apply`, and raises what it does.
        """
        if not isinstance(state, Gathered):
            return self.inner.apply(params, state, x, training, **options)
        mode, flag = split_mode(training)
        pooling = _Pooling(self.inner)
        if mode:
            return pooling.apply(
                params, state.start, x, True, pooled=state.batch, **options
            )
        y = self.inner.apply(params, state.start, x, training, **options)[0]
        inner, weights = self.wrapped, options.get("weights")
        axes = inner.feature_axes
        if not divided_axes(axes, jnp.shape(x))[0]:
            # One example, which all its axes are features of.
            x, axes = jnp.asarray(x)[None], tuple(range(1, jnp.ndim(x) + 1))
            weights = None if weights is None else jnp.asarray(weights)[None]
        if getattr(inner, "bank", None) is None:
            batch = moments(x, feature_axes=axes, weights=weights)
        else:
            batch = moments_by_domain(inner, x, axes, weights, options["domains"])
        if inner.axis_name is not None:
            groups = inner.axis_index_groups
            batch = sync_moments(batch, inner.axis_name, axis_index_groups=groups)
        tracking = {
            name: value for name, value in options.items() if name not in NOT_TRACKED
        }
        after = pooling.track(state.start, batch, pooled=state.batch, **tracking)
        if flag is None:
            return y, after._replace(stats=state.stats)
        stats = jax.tree.map(
            lambda new, old: jnp.where(flag, new, old), after.stats, state.stats
        )
        return y, after._replace(stats=stats)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class _Pooling(Wrapper[Any, Any]):
    """A normalizer that pools the moments of a batch with earlier ones before it tracks."""

    inner: Normalizer[Any, Any]

    @property
    def wrapped(self) -> Any:
        return self.inner

    @property
    def ghost_batches(self) -> GhostBatches | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The division of `inner`, of which all elements are always pooled."""
        ghosts = self.wrapped.ghost_batches
        return None if ghosts is None else ghosts._replace(averaged=False)

    def check(self, state: Any, x: Array, tracks: bool, *, pooled: Any, **options: Any):
        self.wrapped.check(state, x, tracks, **options)

    def correction(self, state: Any, batch: Moments, *, pooled: Any, **options: Any):
        # A batch is corrected by its own moments, not by the pooled ones.
        return self.wrapped.correction(state, batch, **options)

    def track(self, state: Any, batch: Moments, *, pooled: Moments, **options: Any) -> Any:
        batch = Moments(
            *(
                reshard_like(new.astype(old.dtype), old)
                for new, old in zip(lax.stop_gradient(batch[:3]), pooled, strict=True)
            )
        )
        pooled = merge_moments(pooled, batch)
        return Gathered(self.wrapped.track(state, pooled, **options), state, pooled)
