"""Converts `BatchNormalization` of Keras 3 and tf.keras by the paths of its variables."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._norm_names import ENDINGS, TENSORFLOW, spellings
from jaxbn._typing import DTypeLike
from jaxbn.convert._array_names import Naming
from jaxbn.convert._converted import Converted, read_one, write_one
from jaxbn.convert._tf_variables import TensorFlow, read_variables, write_variables
from jaxbn.convert._whole_model import Found, find, with_defaults, with_options_of

# The collections of Keras' variables in Orbax, and those of MXNet, which has its names.
_PARAMS, _STATS = ("trainable_variables/", "arg:"), ("non_trainable_variables/", "aux:")
_KERAS = Naming(
    "Keras",
    "/",
    {
        role: (
            *texts,
            *(
                head + text
                for head in (_PARAMS if role in ("scale", "bias") else _STATS)
                for text in texts
            ),
        )
        for role, texts in spellings(TENSORFLOW, "/_", ("", *ENDINGS)).items()
    },
)


def from_keras(
    arrays: Mapping[str, Any],
    prefix: str = "",
    *,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    fused: bool = False,
    renorm_momentum: float = 0.99,
    renorm_clipping: Mapping[str, float] | None = None,
    dtype: DTypeLike | None = "float32",
) -> TensorFlow:
    """Returns a batch norm of Keras.

    Args:
        arrays: The variables, `model.variables`, or arrays by their paths, `v.path` in
            Keras 3, `v.name` in tf.keras, whose names end in `:0`; also as object
            checkpoints of TensorFlow 2 name them, or MXNet, whose `axis` is 1.
        prefix: The path of the layer: `sequential/batch_normalization`.
        axis: As the layer was made with.
        momentum: As the layer was made with.
        epsilon: As the layer was made with.
        fused: True for images (rank 4) in the tf.keras of TensorFlow 2, whose fused kernel
            tracks the unbiased variance and raises epsilon to at least 1.001e-5. False for
            Keras 3, and for inputs of other ranks.
        renorm_momentum: As the layer was made with, where it renormalizes.
        renorm_clipping: As the layer was made with, where it renormalizes.
        dtype: The compute dtype of the layer, to which Keras casts its input; None for
            that of x.

    Returns:
        A `Converted`, with a `BatchRenorm` where there are renorm statistics.

    Raises:
        ValueError: The layer or its moving statistics are missing; two variables have one
            path; an array has the wrong shape, is not finite, or a variance is negative.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> bn = {"moving_mean": np.zeros(3, "f"), "moving_variance": np.ones(3, "f")}
        >>> layer = convert.from_keras({"bn": bn}, "bn", epsilon=1e-6, fused=True)
        >>> layer.bn.epsilon, layer.notes
        (1.001e-05, ('epsilon 1e-06 raised to 1.001e-05, as fused layers do',))

    References:
        Keras, `keras.layers.BatchNormalization`.
    """
    read = functools.partial(
        read_variables,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        fused=fused,
        renorm_momentum=renorm_momentum,
        renorm_clipping=renorm_clipping,
        dtype=dtype,
    )
    return read_one(_KERAS, arrays, prefix, read, write_variables)


def to_keras(
    layer: Converted[Any, Any], prefix: str = "", *, ndim: int | None = None
) -> dict[str, np.ndarray]:
    """Returns the variables of a batch norm of Keras by their paths.

    Give the layer `momentum = bn.momentum` and `epsilon = bn.epsilon`.

    Args:
        layer: A converted layer, or `Converted(bn, params, state)`.
        prefix: The path of the layer.
        ndim: The rank of x, needed where there are several feature axes.

    Returns:
        Arrays by their paths.

    Raises:
        TypeError: `bn` is neither a `BatchNorm` nor a `BatchRenorm`; `ndim` is missing.
        ValueError: A value does not fit the shape or dtype that it had.

    Example:
        >>> import jaxbn
        >>> from jaxbn import convert
        >>> bn = jaxbn.BatchNorm(epsilon=1e-3)
        >>> list(convert.to_keras(convert.Converted(bn, *bn.init(2)), "bn"))
        ['bn/gamma', 'bn/beta', 'bn/moving_mean', 'bn/moving_variance']
    """
    write = functools.partial(write_variables, ndim=ndim)
    return write_one(_KERAS, layer, prefix, write)


@with_options_of(from_keras)
def find_keras(arrays: Mapping[str, Any], **options: Any) -> Found[TensorFlow]:
    """Returns all batch norms of a Keras model.

    Args:
        arrays: As `from_keras`.
        **options: The keywords of `from_keras`, for all of them.

    Returns:
        A `Found`.

    Raises:
        ValueError: What `from_keras` raises, with every layer that it concerns.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> len(convert.find_keras({"dense/kernel": np.ones((2, 2))}).layers)
        0
    """
    read = functools.partial(read_variables, **with_defaults(from_keras, options))
    return find(_KERAS, arrays, read, write_variables)
