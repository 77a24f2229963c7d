"""Gathering: the moments of several batches, pooled, and tracked as those of one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._accumulation.state import Gathered
from jaxbn._layers.apply import apply_layer
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.batch_renorm import BatchRenorm
from jaxbn._layers.ghost_batch_norm import GhostBatchNorm
from jaxbn._layers.normalizer import split_mode
from jaxbn._sharding import reshard_like
from jaxbn._state import BatchNormParams
from jaxbn._statistics.moments import Moments, merge_moments, moments
from jaxbn._statistics.sync import sync_moments
from jaxbn._typing import Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Gather:
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

    inner: BatchNorm | BatchRenorm | GhostBatchNorm

    def __post_init__(self):
        if not isinstance(self.inner, (BatchNorm, BatchRenorm, GhostBatchNorm)):
            raise TypeError(
                "Gather pools the moments of a BatchNorm, BatchRenorm or GhostBatchNorm, "
                f"got {type(self.inner).__name__}. Wrap the layer itself."
            )

    def init(
        self, num_features: int | tuple[int, ...], **options: Any
    ) -> tuple[BatchNormParams, Any]:
        """Returns the params and the state of `inner`; takes the keywords of its `init`."""
        return self.inner.init(num_features, **options)

    def apply(
        self,
        params: BatchNormParams,
        state: Any,
        x: Array,
        training: bool | Array,
        **options: Any,
    ) -> tuple[Array, Any]:
        """Returns the normalized `x` and the state after it.

        Takes the arguments of `inner.apply`, and raises what it does.
        """
        if not isinstance(state, Gathered):
            return self.inner.apply(params, state, x, training, **options)
        mode, flag = split_mode(training)
        ghost = self.inner if isinstance(self.inner, GhostBatchNorm) else None
        layer = _Pooling(ghost.inner if ghost is not None else self.inner)  # pyright: ignore
        if mode:
            groups = None if ghost is None else ghost._groups()._replace(averaged=False)
            return apply_layer(
                layer,
                params,
                state.start,
                x,
                True,
                groups=groups,
                pooled=state.batch,
                **options,
            )
        y, _ = self.inner.apply(params, state.start, x, training, **options)
        bn = layer._settings()
        weights = options.get("weights")
        batch = moments(x, feature_axes=bn.feature_axes, weights=weights)
        if bn.axis_name is not None:
            groups = bn.axis_index_groups
            batch = sync_moments(batch, bn.axis_name, axis_index_groups=groups)
        known = {"momentum", "limits"} & set(options)
        _, after = layer._track(
            batch,
            state.start,
            pooled=state.batch,
            **{name: options[name] for name in known},
        )
        if flag is None:
            return y, after._replace(stats=state.stats)
        stats = jax.tree.map(
            lambda new, old: jnp.where(flag, new, old), after.stats, state.stats
        )
        return y, after._replace(stats=stats)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Pooling:
    """A layer, as `apply_layer` asks for one, that pools before it tracks."""

    layer: BatchNorm | BatchRenorm

    def _settings(self) -> BatchNorm:
        return self.layer._settings()

    def _stats_fields(self) -> tuple[type, set[str]]:
        return self.layer._stats_fields()

    def _check(
        self, state: Any, x: Array, tracks: bool, *, pooled: Moments, **options: Any
    ):
        self.layer._check(state, x, tracks, **options)

    def _track(self, batch: Moments, state: Any, *, pooled: Moments, **options: Any):
        # What corrects this batch is its own, as without gathering.
        correction, _ = self.layer._track(batch, state, **options)
        batch = lax.stop_gradient(batch)
        batch = Moments(
            *(
                reshard_like(new.astype(old.dtype), old)
                for new, old in zip(batch, pooled, strict=True)
            )
        )
        pooled = merge_moments(pooled, batch)
        _, stats = self.layer._track(pooled, state, **options)
        return correction, Gathered(stats, state, pooled)
