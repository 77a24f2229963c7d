"""Any normalizer as a Haiku module."""

from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._dtypes import widened
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.functions import InitApply
from jaxbn._layers.required import require
from jaxbn._modules.leaves import kinds_of, leaf_names, num_features_of, with_leaves
from jaxbn._typing import Array
from jaxbn.haiku._arguments import training_of
from jaxbn.haiku._state import check_stats, has_state, missing_stats


@in_our_words
class Norm(hk.Module):
    """Any normalizer as a Haiku module: renormalization, ghost batches, one of your own.

    The leaves of its params are parameters, those of its state are state, under the names
    of their fields.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jaxbn, jaxbn.haiku
        >>> ghost = jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 2)
        >>> model = hk.transform_with_state(lambda x: jaxbn.haiku.Norm(ghost)(x, True))
        >>> x = jnp.arange(4.0)[:, None]
        >>> params, state = model.init(None, x)
        >>> y, state = model.apply(params, state, None, x)
        >>> print(y.round(3).ravel(), sorted(state["norm"]))
        [-1.  1. -1.  1.] ['mean', 'var']

    Args:
        normalizer: What normalizes; a value with `init` and `apply`. The feature axes
            are its `feature_axes`, or those of the layer that it wraps, or else -1.
        init_options: Keywords for `normalizer.init`, such as `scale_init`.
        name: The name of the module.

    Differs from `BatchNorm` in the dtype of the result, which is what the normalizer
    makes it: x's, unless asked otherwise.
    """

    def __init__(
        self,
        normalizer: InitApply[Any, Any],
        init_options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        require("Norm", normalizer, "init")
        self.normalizer = normalizer
        self.init_options = dict(init_options or {})

    @in_our_words
    def __call__(
        self,
        inputs: ArrayLike,
        is_training: bool | Array,
        *,
        update_stats: bool = True,
        **options: Any,
    ) -> Array:
        """Returns the normalized `inputs`, and updates the running statistics in training.

        While the variables are made, inputs are normalized as in inference.

        Args:
            inputs: What the normalizer takes.
            is_training: As for `BatchNorm`.
            update_stats: As for `BatchNorm`.
            **options: Keywords of `normalizer.apply`, such as `weights`.

        Returns:
            An array of the shape of inputs.

        Raises:
            TypeError: is_training is no boolean.
            ValueError: There are no statistics in the state, or those of another layer.
        """
        training = training_of(is_training)
        x = jnp.asarray(inputs)
        num_features = num_features_of(self.normalizer, x.shape)
        kinds = kinds_of(self.normalizer, num_features, self.init_options)
        names = leaf_names(*kinds)
        start = kinds
        if hk.running_init() or not all(map(has_state, names[1])):
            if training is False and not hk.running_init():
                raise missing_stats(self)
            start = self.normalizer.init(num_features, **self.init_options)
        params = [
            hk.get_parameter(name, leaf.shape, leaf.dtype, _returning(leaf))
            for name, leaf in zip(names[0], jax.tree.leaves(start[0]), strict=True)
        ]
        stats = [
            hk.get_state(name, leaf.shape, leaf.dtype, _returning(leaf))
            for name, leaf in zip(names[1], jax.tree.leaves(start[1]), strict=True)
        ]
        for stat, kind in zip(stats, jax.tree.leaves(kinds[1]), strict=True):
            check_stats(self, stat.shape, kind.shape, x.shape)
        y, after = self.normalizer.apply(
            with_leaves(kinds[0], params),
            widened(with_leaves(kinds[1], stats)),
            x,
            False if hk.running_init() else training,
            **options,
        )
        if training is not False and update_stats:
            for name, leaf in zip(names[1], jax.tree.leaves(after), strict=True):
                hk.set_state(name, leaf)
        return y


def _returning(leaf: Any) -> Any:
    """Returns an initializer whose result is `leaf`, of which the shape and dtype are."""
    return lambda shape, dtype: jnp.asarray(leaf)
