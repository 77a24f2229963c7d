"""Any normalizer as a linen module."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._accumulation.gather import Gather
from jaxbn._flax.core_call import check_mode
from jaxbn._flax.gathered_leaves import gathered_like
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.functions import InitApply
from jaxbn._layers.required import require
from jaxbn._modules.leaves import kinds_of, leaf_names, num_features_of, with_leaves
from jaxbn._typing import Array
from jaxbn.linen._variables import gathering, statistic, tracks, training_of


@in_our_words
class Norm(nn.Module):
    """Any normalizer as a linen module: renormalization, ghost batches, one of your own.

    The leaves of its params are variables of the collection "params", those of its state
    of "batch_stats", under the names of their fields.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn, jaxbn.linen
        >>> layer = jaxbn.linen.Norm(jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 2))
        >>> x = jnp.arange(4.0)[:, None]
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> y, updates = layer.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"]
        ... )
        >>> print(y.round(3).ravel(), sorted(updates["batch_stats"]))
        [-1.  1. -1.  1.] ['mean', 'var']

    Attributes:
        normalizer: What normalizes; a value with `init` and `apply`. The feature axes
            are its `feature_axes`, or those of the layer that it wraps, or else -1.
        use_running_average: As for `BatchNorm`.
        init_options: Keywords for `normalizer.init`, such as `scale_init`.

    Differs from `BatchNorm` in the dtype of the result, which is what the normalizer
    makes it: x's, unless asked otherwise.
    """

    normalizer: InitApply[Any, Any]
    use_running_average: bool | None = None
    init_options: Mapping[str, Any] | None = None

    def __post_init__(self):
        check_mode(self.use_running_average)
        require("Norm", self.normalizer, "init")
        super().__post_init__()

    @nn.compact
    @in_our_words
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        update_stats: bool = True,
        **options: Any,
    ) -> Array:
        """Returns the normalized `x`, and updates the running statistics in training.

        While the variables are made, x is normalized as in inference.

        Args:
            x: What the normalizer takes.
            use_running_average: As for `BatchNorm`.
            update_stats: As for `BatchNorm`.
            **options: Keywords of `normalizer.apply`, such as `weights`.

        Returns:
            An array of the shape of x.

        Raises:
            ValueError: As `BatchNorm` does.
        """
        training = training_of(self, self.use_running_average, use_running_average)
        num_features = num_features_of(self.normalizer, jnp.shape(x))
        init_options = self.init_options or {}
        kinds = kinds_of(self.normalizer, num_features, init_options)
        names = leaf_names(*kinds)
        # Flax compares only the shapes of variables that exist, so `init` need not run.
        start = kinds
        if not all(self.has_variable("params", name) for name in names[0]) or not all(
            self.has_variable("batch_stats", name) for name in names[1]
        ):
            start = self.normalizer.init(num_features, **init_options)
        params = [
            self.param(name, lambda _, leaf=leaf: _as_array(leaf))
            for name, leaf in zip(names[0], jax.tree.leaves(start[0]), strict=True)
        ]
        stats = [
            statistic(self, name, lambda leaf=leaf: _as_array(leaf))
            for name, leaf in zip(names[1], jax.tree.leaves(start[1]), strict=True)
        ]
        tracking = tracks(self, training, update_stats)
        more = gathering(self, names[1], update_stats)
        normalizer: Any = Gather(self.normalizer) if more else self.normalizer  # pyright: ignore
        state = with_leaves(kinds[1], [stat.value for stat in stats])
        state = gathered_like(state, [variable.value for variable in more])
        y, state = normalizer.apply(
            with_leaves(kinds[0], params),
            state,
            jnp.asarray(x),
            False if self.is_initializing() else training,
            **options,
        )
        if tracking or more:
            for variable, leaf in zip([*stats, *more], jax.tree.leaves(state), strict=True):
                variable.value = leaf
        return y


def _as_array(leaf: Any) -> Array:
    """Returns a leaf, or of a kind an array like it, whose shape alone Flax looks at."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jnp.asarray(leaf)
