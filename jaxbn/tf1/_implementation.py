"""What computes a layer for inputs of one shape and dtype: a normalizer of the core."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxbn._axes import canonical_axes, feature_shape, reduction_axes
from jaxbn._dtypes import at_least_float32
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.batch_renorm import BatchRenorm
from jaxbn._layers.ghost_batch_norm import GhostBatchNorm
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._typing import Axes, Shape
from jaxbn.tf1._paths import Path, choose_path, refuse_wide
from jaxbn.tf1._variables import BIASED, LOCAL_STEP, variable_shape

_MOVING = ("moving_mean", "moving_variance")
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


class Form(NamedTuple):
    """A layer for inputs of one shape and dtype.

    Attributes:
        path: Which implementation TensorFlow used.
        normalizer: What the core uses.
        features: The shape of the core's arrays.
        shape: That of TensorFlow's variables.
        dtype: Their dtype.
    """

    path: Path
    normalizer: Any
    features: Shape
    shape: Shape
    dtype: jnp.dtype


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Settings:
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

    def __post_init__(self):
        # The core refuses what it cannot compute with; better now than at the first batch.
        self._normalizer(Path(fused=False, layer_class=True), jnp.dtype(jnp.float32))

    def path(self, ndim: int) -> Path:
        """Returns which implementation TensorFlow used for inputs of rank `ndim`."""
        return choose_path(
            ndim,
            canonical_axes(self.axes, (1,) * ndim),
            fused=self.fused,
            contrib=self.contrib,
            class_suffices=self.class_suffices,
        )

    def form(self, shape: Shape, dtype: jnp.dtype) -> Form:
        """Returns the layer for inputs of `shape` and `dtype`, or raises if it is none."""
        axes = canonical_axes(self.axes, shape)
        path = self.path(len(shape))
        if path.fused:
            refuse_wide(dtype, "Pass fused=False.")
        virtual = self.virtual_batch_size is not None
        if virtual and 0 in axes:
            raise ValueError(
                f"virtual_batch_size={self.virtual_batch_size} divides axis 0, the batch, "
                f"but axis={self.axes} names it as a feature of inputs of shape {shape}. "
                "Leave axis 0 out of it."
            )
        dtype = dtype if path.legacy else at_least_float32(dtype)
        return Form(
            path=path,
            normalizer=self._normalizer(path, dtype),
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

    def params_shapes(self, form: Form) -> dict[str, Shape]:
        """Returns the names and shapes of the trained variables."""
        used = {"gamma": self.scale, "beta": self.center}
        return {name: form.shape for name, use in used.items() if use}

    def state_shapes(
        self, form: Form, state: Mapping[str, Any], debiases: bool
    ) -> dict[str, Shape]:
        """Returns the names and shapes of the tracked variables."""
        names = _MOVING if self.renorm_decay is None else _MOVING + _RENORM
        shapes: dict[str, Shape] = dict.fromkeys(names, form.shape)
        # Inference neither needs nor minds what debiases the moving mean.
        if debiases or (self.zero_debias and BIASED in state):
            shapes |= {BIASED: form.shape, LOCAL_STEP: ()}
        return shapes

    def _normalizer(self, path: Path, dtype: jnp.dtype) -> Any:
        layer = BatchNorm(
            feature_axes=self.axes,
            epsilon=path.floor(self.epsilon),
            use_scale=self.scale,
            use_bias=self.center,
            ddof=1 if path.fused else 0,
            param_dtype=dtype,
        )
        if self.renorm_decay is not None:
            layer = BatchRenorm(layer, momentum=self.renorm_decay)
        if self.virtual_batch_size is not None:
            layer = GhostBatchNorm(
                layer, self.virtual_batch_size, layout="strided", tracking="averaged"
            )
        return layer
