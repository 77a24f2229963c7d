"""Ghost batches: normalize parts of the batch each by their own statistics."""

import dataclasses
from typing import Any, Literal

import jax

from jaxbn._layers.checks import in_our_words
from jaxbn._layers.ghost_batches import GhostBatches
from jaxbn._layers.normalizer import Normalizer, Params, State
from jaxbn._layers.required import require
from jaxbn._layers.wrapper import Wrapper
from jaxbn._values.canonical import as_whole

LAYOUTS = ("contiguous", "strided")
TRACKINGS = ("pooled", "averaged")


@jax.tree_util.register_static
@in_our_words
@dataclasses.dataclass(frozen=True, repr=False)
class GhostBatchNorm(Wrapper[Params, State]):
    """Normalization by the statistics of ghost batches, parts of the batch.

    In training, the rows of x (its axis 0) are divided into ghost batches of
    `virtual_batch_size`, each normalized by its own mean and variance, as if it were a
    batch on a device of its own. Inference is that of `inner`, for batches of any size.
    With a `BatchRenorm` inside, r and d are taken from the merged statistics and shared.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> layer = jaxbn.GhostBatchNorm(jaxbn.BatchNorm(momentum=0.0), 2)
        >>> params, state = layer.init(1)
        >>> x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
        >>> y, state = layer.apply(params, state, x, training=True)
        >>> print(y.round(3).ravel(), state.mean)
        [-1.  1. -1.  1.] [6.5]

    Attributes:
        inner: A `BatchNorm` or a `BatchRenorm`.
        virtual_batch_size: The rows of a ghost batch. It must divide the batch.
        layout: "contiguous" makes neighbouring rows a ghost batch; "strided" makes rows
            j, j + G, j + 2G, ... the j-th of G ghost batches, as TensorFlow 1 did.
        tracking: "pooled" tracks the statistics of the whole batch, exactly; "averaged"
            tracks the plain averages of the means and variances of the ghost batches, as
            TensorFlow 1 did, which leaves out how far the means lie apart.

    Raises:
        TypeError: inner is not a layer that can be divided; the size is not an int.
        ValueError: The size is not positive; layout or tracking is unknown.

    References:
        Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017.

    Differs from `tf.layers.batch_normalization(virtual_batch_size=...)` in layout and
    tracking unless asked otherwise, and in that inference needs no divisible batch.
    """

    inner: Normalizer[Params, State]
    virtual_batch_size: int
    _: dataclasses.KW_ONLY
    layout: Literal["contiguous", "strided"] = "contiguous"
    tracking: Literal["pooled", "averaged"] = "pooled"

    def __post_init__(self) -> None:
        if getattr(self.inner, "ghost_batches", None) is not None:
            raise TypeError(
                "GhostBatchNorm divides a BatchNorm or a BatchRenorm, whose statistics it "
                f"can merge, got {type(self.inner).__name__}. Ghost batches within ghost "
                "batches are ghost batches of the smaller size."
            )
        require(
            "GhostBatchNorm", self.inner, "standardize", "track", "correction", "running"
        )
        size = as_whole("virtual_batch_size", self.virtual_batch_size, "Use e.g. 32.")
        object.__setattr__(self, "virtual_batch_size", size)
        if size < 1:
            raise ValueError(
                f"virtual_batch_size must be positive, got {size}. Use e.g. 32."
            )
        for name, known in (("layout", LAYOUTS), ("tracking", TRACKINGS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}. Choose one of {known}.")

    @property
    def wrapped(self) -> Any:
        """What the ghost batches are normalized by."""
        return self.inner

    @property
    def ghost_batches(self) -> GhostBatches:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How the batch is divided in training."""
        return GhostBatches(
            size=self.virtual_batch_size,
            strided=self.layout == "strided",
            averaged=self.tracking == "averaged",
        )
