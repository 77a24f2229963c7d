"""Batch normalization for Equinox: change the import, and inference is right."""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._accumulation.gather import Gather
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.ema_batch_norm import EmaBatchNorm
from jaxbn._modules.inputs import as_inexact, batch_norm, dtype_of_all, positive
from jaxbn._state import BatchNormParams
from jaxbn._typing import Array, DTypeLike
from jaxbn.equinox._state import (
    MeanAndVar,
    check_channels,
    check_stats,
    join,
    read,
    split,
    split_any,
    training_of,
)

Index = eqx.nn.StateIndex[MeanAndVar]


@in_our_words
class BatchNorm(eqx.nn.StatefulLayer):
    r"""Batch normalization with the arguments and the call of Equinox's layer.

    For one example under `jax.vmap(..., axis_name=...)`, as in Equinox, or without
    `axis_name` for a whole batch. Channels come first.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jaxbn.equinox
        >>> layer, state = eqx.nn.make_with_state(jaxbn.equinox.BatchNorm)(1, "batch")
        >>> over_batch = lambda layer: jax.vmap(
        ...     layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        ... )
        >>> y, state = over_batch(layer)(jnp.array([[1.0], [3.0]]), state)
        >>> print(y.round(3).ravel(), *state.get(layer.batch_state_index))
        [-1.  1.] [2.] [1.]
        >>> y, state = over_batch(eqx.nn.inference_mode(layer))(jnp.array([[2.0]]), state)
        >>> print(y)
        [[0.]]

    Args:
        input_size: The number of channels C of x.
        axis_name: The name of the mapped axis, or a sequence of names, over which the
            batch is spread: that of the `jax.vmap` over examples, and those of devices.
            None for a layer that takes whole batches.
        eps: Added to the variance inside the square root.
        channelwise_affine: Whether a trained weight and bias are applied.
        momentum: The decay of the running statistics.
        inference: Whether x is normalized with the running statistics instead of those
            of the batch; `eqx.nn.inference_mode` changes it, and the call may override it.
        dtype: The dtype of weight, bias and running statistics, the latter at least
            float32; None for JAX's default.
        mode: "batch" trains on the statistics of the batch; "ema", and "legacy", on the
            running ones, which includes those of the batch.
        feature_axes: The axis of the channels in x; None for 0 with axis_name, 1 without.

    Attributes:
        batch_state_index: `state.get` of it is the running mean and variance, in
            `mode="batch"`.
        ema_state_index: The same in `mode="ema"`.
        seen_index: What the running averages have seen so far.

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", 2015. Equinox 0.13, `eqx.nn.BatchNorm`.

    Differs from Equinox on purpose in this: with `mode="batch"`, inference normalizes with
    the average variance of the batches, whereas Equinox's hidden variance starts at 1 and
    is divided by 1 - m^t all the same, which leaves 1 / t too much at first: 101.9 for 2.93
    after one step of momentum 0.99; `state.get` returns the averages that inference uses.
    With `mode="ema"`, inference before the first batch uses mean 0 and variance 1, not
    memory that nothing was written to. The default is `mode="batch"`, where Equinox's
    warns and is "ema". The variance keeps its digits when the mean is large; a batch that
    is not finite leaves the running statistics as they were, and no gradient flows into
    them. The result has the dtype of x, weight and bias together in both modes. States
    that Equinox saved go through `jaxbn.equinox.replace`.
    """

    weight: Array | None
    bias: Array | None
    batch_state_index: Index | None
    ema_state_index: Index | None
    seen_index: eqx.nn.StateIndex[Array]
    inference: bool
    input_size: int = eqx.field(static=True)
    axis_name: Any = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    mode: Literal["batch", "ema"] = eqx.field(static=True)
    feature_axes: int | None = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable] | None = None,
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        mode: Literal["batch", "ema", "legacy"] = "batch",
        *,
        feature_axes: int | None = None,
    ):
        if mode not in ("batch", "ema", "legacy"):
            raise ValueError(
                f'mode must be "batch" or "ema", got {mode!r}. Choose "batch", to train '
                "on the statistics of the batch."
            )
        self.inference = inference
        self.input_size = input_size
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.eps = positive(eps)
        self.channelwise_affine = channelwise_affine
        self.momentum = momentum
        self.mode = "batch" if mode == "batch" else "ema"
        self.feature_axes = feature_axes
        training_of(self, None)
        # Makes sure of all other settings, too.
        bn = self._normalizer(jnp.zeros((), dtype))
        params, stats = bn.init(input_size)
        self.weight, self.bias = params
        entry, seen = split(stats)
        batch = self.mode == "batch"
        self.batch_state_index = eqx.nn.StateIndex(entry) if batch else None
        self.ema_state_index = None if batch else eqx.nn.StateIndex(entry)
        self.seen_index = eqx.nn.StateIndex(seen)

    @in_our_words
    def __call__(
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        *,
        key: Any = None,
        inference: bool | Array | None = None,
        weights: ArrayLike | None = None,
        update_stats: bool = True,
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the normalized `x`, and the state after it.

        Args:
            x: One example (C, ...), or without axis_name a batch (N, C, ...).
            state: As `eqx.nn.make_with_state` or the last call returned it.
            key: Ignored, as every layer of Equinox takes one.
            inference: Overrides the attribute of that name; may be traced.
            weights: A boolean mask or non-negative weights, as `jaxbn.BatchNorm.apply`
                takes them: under `jax.vmap` a scalar weighs an example.
            update_stats: False to leave the running statistics alone, as for the second
                pass of SAM, or a discriminator that looks at generated images.

        Returns:
            `(y, state)`.

        Raises:
            NameError: There is no mapped axis of the name `axis_name`, in training.
            TypeError: state is no `eqx.nn.State`; inference is no boolean.
            ValueError: x does not have the channels of the layer, or state is that of
                another one.
        """
        training = training_of(self, inference)
        x = as_inexact(x)
        check_channels(self, x.shape, self._axis)
        index = state_index_of(self)
        entry = read(self, state, index)
        check_stats(entry, self.input_size)
        y, after = Gather(self._normalizer(x)).apply(
            BatchNormParams(self.weight, self.bias),
            join(entry, read(self, state, self.seen_index)),
            x,
            training,
            weights=weights,
        )
        gathers = not isinstance(entry, MeanAndVar)
        if update_stats and (gathers or training is not False):
            entry, seen = split_any(after)
            state = state.set(index, entry).set(self.seen_index, seen)
        return y, state

    @property
    def _axis(self) -> int:
        if self.feature_axes is not None:
            return self.feature_axes
        return 1 if self.axis_name is None else 0

    def _normalizer(self, x: Array) -> Any:
        """Returns the core's layer for inputs like `x`."""
        affine = self.channelwise_affine
        # Not yet there while the layer is made.
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        bn = batch_norm(
            feature_axes=self._axis,
            momentum=self.momentum,
            epsilon=self.eps,
            use_scale=affine,
            use_bias=affine,
            debias=self.mode == "batch",
            axis_name=self.axis_name,
            dtype=dtype_of_all(x, weight, bias),
            param_dtype=x.dtype if weight is None else weight.dtype,
        )
        return bn if self.mode == "batch" else EmaBatchNorm(bn)


def state_index_of(layer: BatchNorm) -> Any:
    """Returns where the running mean and variance of a layer are in a `State`."""
    return layer.batch_state_index if layer.mode == "batch" else layer.ema_state_index
