"""Any normalizer as an Equinox layer."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._accumulation.gather import Gather
from jaxbn._accumulation.state import Gathered
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.functions import InitApply
from jaxbn._layers.required import require
from jaxbn._typing import Array, PyTree
from jaxbn.equinox._state import read, training_of


@in_our_words
class Norm(eqx.nn.StatefulLayer):
    """Any normalizer as an Equinox layer: renormalization, ghost batches, one of your own.

    Its params are the field `params`, its state is in the `eqx.nn.State`. Under
    `jax.vmap`, x is one example: give the normalizer an `axis_name`, and `feature_axes` as
    they are in an example, so 0 for channels first.

    Example:
        >>> import equinox as eqx, jax.numpy as jnp, jaxbn, jaxbn.equinox
        >>> ghost = jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 2)
        >>> layer, state = eqx.nn.make_with_state(jaxbn.equinox.Norm)(ghost, 1)
        >>> y, state = layer(jnp.arange(4.0)[:, None], state)
        >>> print(y.round(3).ravel(), layer.params.scale)
        [-1.  1. -1.  1.] [1.]

    Args:
        normalizer: What normalizes; a value with `init` and `apply`.
        input_size: What `normalizer.init` takes: the number of channels.
        inference: As for `BatchNorm`.
        **init_options: Keywords for `normalizer.init`, such as `scale_init`.

    Attributes:
        params: What `normalizer.init` returned first.
        state_index: `state.get` of it is the state of the normalizer.

    Differs from `BatchNorm` in the dtype of the result, which is what the normalizer
    makes it: x's, unless asked otherwise.
    """

    params: PyTree
    state_index: eqx.nn.StateIndex[PyTree]
    inference: bool
    normalizer: InitApply[Any, Any] = eqx.field(static=True)
    input_size: int | tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        normalizer: InitApply[Any, Any],
        input_size: int | tuple[int, ...],
        *,
        inference: bool = False,
        **init_options: Any,
    ):
        require("Norm", normalizer, "init")
        self.normalizer = normalizer
        self.input_size = input_size
        self.inference = inference
        training_of(self, None)
        self.params, state = normalizer.init(input_size, **init_options)
        self.state_index = eqx.nn.StateIndex(state)

    @in_our_words
    def __call__(
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        *,
        key: Any = None,
        inference: bool | Array | None = None,
        update_stats: bool = True,
        **options: Any,
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the normalized `x`, and the state after it.

        Args:
            x: What the normalizer takes.
            state: As `eqx.nn.make_with_state` or the last call returned it.
            key: Ignored, as every layer of Equinox takes one.
            inference: As for `BatchNorm`.
            update_stats: As for `BatchNorm`.
            **options: Keywords of `normalizer.apply`, such as `weights`.

        Returns:
            `(y, state)`.

        Raises:
            TypeError: state is no `eqx.nn.State`; inference is no boolean.
            ValueError: state is that of another model; what the normalizer raises.
        """
        training = training_of(self, inference)
        before = read(self, state, self.state_index)
        gathers = isinstance(before, Gathered)
        normalizer: Any = Gather(self.normalizer) if gathers else self.normalizer  # pyright: ignore
        x = jnp.asarray(x)
        y, after = normalizer.apply(self.params, before, x, training, **options)
        if update_stats and (gathers or training is not False):
            state = state.set(self.state_index, after)
        return y, state
