"""Chooses the implementation that TensorFlow 1.15 used, and a normalizer equal to it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxbn._axes import canonical_axes, feature_shape, reduction_axes
from jaxbn._dtypes import at_least_float32
from jaxbn._kernels.normalize import check_epsilon
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.batch_renorm import BatchRenorm
from jaxbn._layers.ghost_batch_norm import GhostBatchNorm
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._typing import Axes, Shape
from jaxbn._values.canonical import as_flag, as_whole
from jaxbn._values.journeys import Value
from jaxbn.tf1._arguments import FUSED_EPSILON, check_decay
from jaxbn.tf1._variables import BIASED, LOCAL_STEP, variable_shape

_MOVING = ("moving_mean", "moving_variance")
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


class Implementation(NamedTuple):
    """One implementation of batch normalization in TensorFlow 1.15.

    Attributes:
        fused: Whether the fused kernel ran: it tracked the unbiased variance, raised
            epsilon to 1.001e-5 and took no float64.
        layer_class: Whether the class behind `tf.layers` ran: it made no update operations
            for `trainable=False`. The code of `tf.contrib` always made them.
    """

    fused: bool
    layer_class: bool

    @property
    def legacy(self) -> bool:
        """Whether this is contrib's unfused code.

        It made its variables in the dtype of the inputs and knew neither regularizers nor
        an adjustment.
        """
        return not self.fused and not self.layer_class

    def floor(self, epsilon: float) -> float:
        """Returns the epsilon that the kernel used."""
        return max(epsilon, FUSED_EPSILON) if self.fused else epsilon


def refuse_wide(dtype: jnp.dtype, remedy: str) -> None:
    """Raises for a dtype that the fused kernel did not take."""
    if dtype == jnp.float64:
        raise TypeError(
            f"the fused batch normalization of TensorFlow takes no {dtype}. {remedy}"
        )


class ShapedLayer(NamedTuple):
    """A layer for inputs of one shape and dtype.

    Attributes:
        implementation: Which implementation TensorFlow used.
        normalizer: What the core uses.
        features: The shape of the core's arrays.
        shape: That of TensorFlow's variables.
        dtype: Their dtype; that of a state is at least float32.
    """

    implementation: Implementation
    normalizer: Any
    features: Shape
    shape: Shape
    dtype: jnp.dtype


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Settings(Value):
    """The hyperparameters that decide what is computed, as the two functions take them.

    Attributes:
        axes: The axis or axes of the features.
        epsilon: Added to the variance.
        center: Whether there is a beta.
        scale: Whether there is a gamma.
        fused: Whether the fused kernel is wanted and no option rules it out.
        renorm_decay: The decay of the renorm statistics; None without renorm.
        virtual_batch_size: The rows of a ghost batch; None without.
        contrib: Whether contrib was called.
        class_suffices: Whether no option is used that the class of `tf.layers` lacked.
        zero_debias: Whether the moving mean is debiased.
    """

    axes: Axes
    epsilon: float
    center: bool
    scale: bool
    fused: bool
    renorm_decay: float | None = None
    virtual_batch_size: int | None = None
    contrib: bool = False
    class_suffices: bool = True
    zero_debias: bool = False

    def __post_init__(self) -> None:
        settled: dict[str, Any] = {"epsilon": check_epsilon(self.epsilon)}
        flags = "center", "scale", "fused", "contrib", "class_suffices", "zero_debias"
        settled |= {name: as_flag(name, getattr(self, name)) for name in flags}
        if self.virtual_batch_size is not None:
            size = as_whole("virtual_batch_size", self.virtual_batch_size, "Use e.g. 32.")
            settled["virtual_batch_size"] = size
        if self.renorm_decay is not None:
            settled["renorm_decay"] = check_decay("renorm_decay", self.renorm_decay)
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        # Built here so that invalid settings raise now and not at the first batch.
        self._normalizer(
            Implementation(fused=False, layer_class=True), jnp.dtype(jnp.float32)
        )

    def implementation(self, ndim: int) -> Implementation:
        """Returns which implementation TensorFlow used for inputs of rank `ndim`."""
        images, plain = ndim == 4, self.class_suffices
        by_helper = ndim == 2 or (images and not plain)
        if self.contrib and self.fused and by_helper:
            return Implementation(fused=True, layer_class=False)
        if not plain:
            return Implementation(fused=False, layer_class=False)
        axes = canonical_axes(self.axes, (1,) * ndim)
        fused = self.fused and images and axes in ((1,), (3,))
        return Implementation(fused=fused, layer_class=True)

    def for_inputs(self, shape: Shape, dtype: jnp.dtype) -> ShapedLayer:
        """Returns the layer for inputs of `shape` and `dtype`, or raises if it is none."""
        axes = canonical_axes(self.axes, shape)
        implementation = self.implementation(len(shape))
        if implementation.fused:
            refuse_wide(dtype, "Pass fused=False.")
        virtual = self.virtual_batch_size is not None
        if virtual and 0 in axes:
            raise ValueError(
                f"virtual_batch_size={self.virtual_batch_size} divides axis 0, the batch, "
                f"but axis={self.axes} names it as a feature of inputs of shape {shape}. "
                "Leave axis 0 out of it."
            )
        dtype = dtype if implementation.legacy else at_least_float32(dtype)
        return ShapedLayer(
            implementation=implementation,
            normalizer=self._normalizer(implementation, dtype),
            features=feature_shape(self.axes, shape),
            shape=variable_shape(shape, axes, virtual),
            dtype=dtype,
        )

    def check_batch(self, shape: Shape) -> None:
        """Raises unless the batch divides into ghost batches, in either mode."""
        if self.virtual_batch_size is not None:
            GhostBatches(self.virtual_batch_size).check(
                shape, reduction_axes(self.axes, shape)
            )

    def params_shapes(self, layer: ShapedLayer) -> dict[str, Shape]:
        """Returns the names and shapes of the trained variables."""
        used = {"gamma": self.scale, "beta": self.center}
        return {name: layer.shape for name, use in used.items() if use}

    def state_shapes(
        self, layer: ShapedLayer, state: Mapping[str, Any], debiases: bool
    ) -> dict[str, Shape]:
        """Returns the names and shapes of the tracked variables."""
        names = _MOVING if self.renorm_decay is None else _MOVING + _RENORM
        shapes: dict[str, Shape] = dict.fromkeys(names, layer.shape)
        # Inference takes a state with or without the variables of zero debiasing.
        if debiases or (self.zero_debias and BIASED in state):
            shapes |= {BIASED: layer.shape, LOCAL_STEP: ()}
        return shapes

    def _normalizer(self, implementation: Implementation, dtype: jnp.dtype) -> Any:
        layer: Any = BatchNorm(
            feature_axes=self.axes,
            epsilon=implementation.floor(self.epsilon),
            use_scale=self.scale,
            use_bias=self.center,
            ddof=1 if implementation.fused else 0,
            param_dtype=dtype,
        )
        if self.renorm_decay is not None:
            layer = BatchRenorm(layer, momentum=self.renorm_decay)
        if self.virtual_batch_size is not None:
            layer = GhostBatchNorm(
                layer, self.virtual_batch_size, layout="strided", tracking="averaged"
            )
        return layer
