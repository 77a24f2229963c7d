"""Which of its implementations TensorFlow 1.15 used for a layer, and how they differed."""

from typing import NamedTuple

import jax.numpy as jnp


class Path(NamedTuple):
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
        return max(epsilon, 1.001e-5) if self.fused else epsilon


def refuse_wide(dtype: jnp.dtype, remedy: str) -> None:
    """Raises for a dtype that the fused kernel did not take."""
    if dtype == jnp.float64:
        raise TypeError(
            f"the fused batch normalization of TensorFlow takes no {dtype}. {remedy}"
        )


def choose_path(
    ndim: int, axes: tuple[int, ...], *, fused: bool, contrib: bool, class_suffices: bool
) -> Path:
    """Returns the path for inputs of rank `ndim` with the feature `axes`.

    Args:
        ndim: The rank of the inputs.
        axes: The feature axes, non-negative.
        fused: Whether the caller allows the fused kernel and no option rules it out.
        contrib: Whether `tf.contrib.layers.batch_norm` was called.
        class_suffices: Whether no option is used that the class of `tf.layers` lacked.
    """
    by_helper = contrib and fused and (ndim == 2 or (ndim == 4 and not class_suffices))
    if by_helper or not class_suffices:
        return Path(fused=by_helper, layer_class=False)
    return Path(fused=fused and ndim == 4 and axes in ((1,), (3,)), layer_class=True)
