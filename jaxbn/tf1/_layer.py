"""The layer over named variables that `batch_normalization` and `batch_norm` return."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._dtypes import as_dtype, as_float, at_least_float32, widened
from jaxbn._layers.checks import split_mode
from jaxbn._layers.renorm_limits import RenormLimits
from jaxbn._norm_names import TENSORFLOW
from jaxbn._state import BatchNormParams, BatchStats, RenormStats
from jaxbn._statistics.running import stored
from jaxbn._typing import Array, DTypeLike, Initializer, Key, Shape
from jaxbn._values.journeys import Value
from jaxbn.tf1._arguments import of_rank
from jaxbn.tf1._implementation import Settings, ShapedLayer
from jaxbn.tf1._moving_averages import without_bias
from jaxbn.tf1._variables import (
    BIASED,
    LOCAL_STEP,
    Variables,
    check_variables,
    in_shape,
    to_fields,
    to_variables,
)

Regularizer = Callable[[Array], Array | None]
Constraint = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Layer(Value):
    """A batch normalization of TensorFlow 1: five pure functions over dicts of variables.

    Made by `batch_normalization` and `batch_norm`, which document the arguments. It is
    cheap to make, and may be made inside a jitted step from traced arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbn import tf1
        >>> layer = tf1.batch_normalization(momentum=0.5)
        >>> params, state = layer.init((2, 1))
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = layer.apply(params, state, x, training=True)
        >>> print(sorted(params), {name: str(array) for name, array in state.items()})
        ['beta', 'gamma'] {'moving_mean': '[1.]', 'moving_variance': '[1.]'}

        A layer that is applied twice, and updated later, as from `UPDATE_OPS`:

        >>> ya, _ = layer.apply(params, state, x, training=True)
        >>> yb, _ = layer.apply(params, state, x + 4, training=True)
        >>> state = layer.run_updates(params, state, x, training=True)
        >>> state = layer.run_updates(params, state, x + 4, training=True)
        >>> print(state["moving_mean"])
        [3.75]
    """

    settings: Settings
    decay: float | Array
    training: bool | Array
    trainable: bool
    limits: RenormLimits | None
    initializers: Mapping[str, Initializer | None]
    regularizers: Mapping[str, Regularizer | None]
    constraints: Mapping[str, Constraint | None] = dataclasses.field(default_factory=dict)
    adjustment: Callable[[Shape], tuple[Array, Array]] | None = None
    batch_weights: ArrayLike | None = None
    activation_fn: Callable[[Array], Array] | None = None

    def init(
        self, shape: Shape, dtype: DTypeLike = jnp.float32, *, key: Key | None = None
    ) -> tuple[Variables, Variables]:
        """Returns the variables that TensorFlow would have made, with their first values.

        Args:
            shape: The shape of the inputs.
            dtype: The dtype of the inputs.
            key: A key for initializers that draw random numbers.

        Returns:
            `(params, state)`: dicts under TensorFlow's names, in its shapes and dtypes, so
            that the arrays of a checkpoint can be put in their place; but a state that
            TensorFlow kept in float16 is float32, as its averages would stall. A layer made
            with a constant is_training=False has no variables for zero debiasing.

        Raises:
            TypeError: The dtype is not floating, or is one that TensorFlow refused; an
                initializer needs a key.
            ValueError: The axis or the virtual batch size does not fit the shape.
        """
        dtype = as_dtype(dtype)
        assert dtype is not None
        shaped = self.settings.for_inputs(tuple(shape), dtype)
        initializers = {
            f"{field}_init": in_shape(initializer, shaped.shape)
            for field, name in TENSORFLOW.items()
            if (initializer := self.initializers.get(name)) is not None
        }
        fields = shaped.normalizer.init(shaped.features, key=key, **initializers)
        kinds = shaped.dtype, at_least_float32(shaped.dtype)
        params, state = (
            to_variables(part, shaped.shape, kind)
            for part, kind in zip(fields, kinds, strict=True)
        )
        if self._debiases(self.training):
            state[BIASED] = jnp.zeros(shaped.shape, kinds[1])
            state[LOCAL_STEP] = jnp.zeros((), kinds[1])
        return params, state

    def apply(
        self,
        params: Variables,
        state: Variables,
        x: ArrayLike,
        training: bool | Array | None = None,
    ) -> tuple[Array, Variables]:
        """Returns the normalized `x`, and the state after TensorFlow's update operations.

        Dropping the new state is not running them. In inference, and where TensorFlow made
        no such operations (`trainable=False`, see the functions), it is the old state.

        Args:
            params: As `init` returned them, or trained since.
            state: As `init` or the last call returned it.
            x: The inputs; the size of their batch may differ from call to call.
            training: A bool, or a boolean scalar array, which may be traced. None for
                that of the layer.

        Returns:
            `(y, state)`: an array of the shape and dtype of x, and a dict like `state`,
            which training widens to float32 where it holds less.

        Raises:
            TypeError: x is not floating, or of a dtype that TensorFlow refused; training is
                not a boolean.
            ValueError: params or state do not belong to this layer and x; the virtual
                batch size does not divide the batch.
        """
        training = self.training if training is None else training
        mode, _ = split_mode(training)
        x = as_float(x)
        shaped = self.settings.for_inputs(x.shape, x.dtype)
        self.settings.check_batch(x.shape)
        debiases = self._debiases(training)
        state = state if mode is False else widened(state)
        check_variables("params", params, self.settings.params_shapes(shaped))
        check_variables("state", state, self.settings.state_shapes(shaped, state, debiases))

        kind = BatchStats if self.limits is None else RenormStats
        stats = to_fields(kind, state, shaped.features)
        if debiases:
            # Training updates the biased average; inference reads the debiased one.
            stats = stats._replace(mean=jnp.where(training, state[BIASED], stats.mean))
        before, trained = stats, to_fields(BatchNormParams, params, shaped.features)
        options = self._options(shaped, x, mode)
        y, stats = shaped.normalizer.apply(trained, stats, x, training, **options)
        y = y if self.activation_fn is None else self.activation_fn(y)
        if mode is False or (shaped.implementation.layer_class and not self.trainable):
            return y, state
        dtype = at_least_float32(shaped.dtype)
        if dtype != stats.var.dtype:
            # Legacy variables have the dtype of the inputs, which may hold less.
            kept = jax.tree.map(lambda a: a.astype(dtype), before)
            stats = stored(kept, stats, jnp.ones_like(stats.var))
        updated = {**state, **to_variables(stats, shaped.shape, dtype)}
        return y, self._debiased(state, updated, training) if debiases else updated

    def run_updates(
        self,
        params: Variables,
        state: Variables,
        x: ArrayLike,
        training: bool | Array | None = None,
    ) -> Variables:
        """Returns the state after TensorFlow's update operations, without the output.

        For updates that are run later than the forward pass, and for a layer that is
        applied several times: TensorFlow updated it once for each application.

        Args:
            params: As for `apply`.
            state: As for `apply`.
            x: As for `apply`.
            training: As for `apply`.

        Returns:
            The new state, as `apply` returns it.

        Raises:
            TypeError, ValueError: As `apply` does.
        """
        return self.apply(params, state, x, training)[1]

    def penalty(self, params: Variables, ndim: int = 4) -> Array:
        """Returns the sum of the regularization losses, 0 where TensorFlow made none.

        Args:
            params: As `init` returned them, or trained since.
            ndim: The rank of the inputs. It matters only to a contrib layer that is fused
                for ranks 2 and 4 and on the legacy path, without losses, for others.

        Returns:
            A scalar.
        """
        if self.settings.contrib and self.settings.implementation(ndim).legacy:
            return jnp.zeros(())
        losses = (
            regularizer(params[name])
            for name, regularizer in self.regularizers.items()
            if regularizer is not None and name in params
        )
        return sum((loss for loss in losses if loss is not None), jnp.zeros(()))

    def project(self, params: Variables) -> Variables:
        """Returns `params` after the constraints, which follow every optimizer update.

        Args:
            params: As the optimizer left them.

        Returns:
            A dict like `params`.
        """
        constrained = {
            name: constraint(params[name])
            for name, constraint in self.constraints.items()
            if constraint is not None and name in params
        }
        return {**params, **constrained}

    def _debiases(self, training: bool | Array) -> bool:
        """Tells whether TensorFlow made variables for zero debiasing in this mode."""
        return self.settings.zero_debias and split_mode(training)[0] is not False

    def _options(self, shaped: ShapedLayer, x: Array, mode: bool | None) -> dict[str, Any]:
        """Returns what this call of the normalizer of the core takes beyond the usual."""
        options: dict[str, Any] = {"momentum": self.decay}
        if self.limits is not None:
            options["limits"] = self.limits
        if mode is False:
            return options
        if self.batch_weights is not None:
            options["weights"] = self.batch_weights
        if self.adjustment is not None and not shaped.implementation.legacy:
            pair = map(jnp.asarray, self.adjustment(x.shape))
            options["adjustment"] = tuple(of_rank(array, x.ndim) for array in pair)
        return options

    def _debiased(
        self, state: Variables, updated: Variables, training: bool | Array
    ) -> Variables:
        """Returns `updated`, whose moving mean is the biased one, as TensorFlow left it."""
        biased, step = updated["moving_mean"], state[LOCAL_STEP] + 1
        mean = without_bias(biased, step, self.decay)
        after = {**updated, "moving_mean": mean, BIASED: biased, LOCAL_STEP: step}
        return jax.tree.map(lambda new, old: jnp.where(training, new, old), after, state)
