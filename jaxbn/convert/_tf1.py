"""Converts the variables of TensorFlow 1's `tf.layers` and `tf.contrib.layers`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._norm_names import ENDINGS, TENSORFLOW, spellings
from jaxbn.convert._array_names import Naming
from jaxbn.convert._converted import Converted, read_one, write_one
from jaxbn.convert._tf_variables import TensorFlow, read_variables, write_variables
from jaxbn.convert._whole_model import Found, find, with_defaults, with_options_of

_SHADOW = "/ExponentialMovingAverage"
_SPELLINGS: dict[str, tuple[str, ...]] = {
    **spellings(TENSORFLOW, "/", ("", *ENDINGS)),
    "biased": ("*/moving_mean/biased",),
    "local_step": ("*/moving_mean/local_step",),
    "old_renorm": ("*/renorm_mean_weight", "*/renorm_stddev_weight"),
}
_TF1 = Naming("TensorFlow 1", "/", _SPELLINGS)
_AVERAGED = Naming(
    "TensorFlow 1",
    "/",
    {role: (texts[0] + _SHADOW, *texts) for role, texts in _SPELLINGS.items()},
)


def from_tf1(
    arrays: Mapping[str, Any],
    prefix: str = "",
    *,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    fused: bool = True,
    renorm_momentum: float = 0.99,
    renorm_clipping: Mapping[str, float] | None = None,
    averages: bool = False,
) -> TensorFlow:
    """Returns a batch norm of a TensorFlow 1 checkpoint.

    Args:
        arrays: The variables by their names, such as `tf.train.load_checkpoint(path)` gives
            them: `{n: reader.get_tensor(n) for n in reader.get_variable_to_shape_map()}`.
        prefix: The scope of the layer: `resnet/batch_normalization_3`.
        axis: As the layer was made with; 1 for `data_format="NCHW"`.
        momentum: As the layer was made with; of `tf.contrib` the `decay`, 0.999 there.
        epsilon: As the layer was made with.
        fused: True for inputs of rank 4, and of rank 2 in `tf.contrib`, unless the layer
            was made with `fused=False`: the kernel tracks the unbiased variance and raises
            epsilon to at least 1.001e-5. Several axes, renormalization and
            virtual_batch_size were never fused, and are told by the variables.
        renorm_momentum: As the layer was made with, where it renormalizes.
        renorm_clipping: As the layer was made with, where it renormalizes.
        averages: Whether to take the shadow of a variable, as
            `gamma/ExponentialMovingAverage`, where there is one.

    Returns:
        A `Converted`, with a `BatchRenorm` where there are renorm statistics.

    Raises:
        ValueError: The layer or its moving statistics are missing; an array has the wrong
            shape, is not finite, or a variance is negative.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> bn = {"bn/moving_mean": np.zeros(3, "f"), "bn/moving_variance": np.ones(3, "f")}
        >>> convert.from_tf1(bn, "bn").bn.ddof
        1

    References:
        TensorFlow 1.15, `tf.layers.batch_normalization`, `tf.contrib.layers.batch_norm`.

    Differs from `jaxbn.tf1`, which keeps TensorFlow's names, arguments and quirks.
    """
    read = functools.partial(
        read_variables,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        fused=fused,
        renorm_momentum=renorm_momentum,
        renorm_clipping=renorm_clipping,
    )
    naming = _AVERAGED if averages else _TF1
    return read_one(naming, arrays, prefix, read, write_variables)


def to_tf1(
    layer: Converted[Any, Any], prefix: str = "", *, ndim: int | None = None
) -> dict[str, np.ndarray]:
    """Returns the variables of a batch norm of TensorFlow 1 by their names.

    Args:
        layer: A converted layer, or `Converted(bn, params, state)`.
        prefix: The scope of the layer.
        ndim: The rank of x, needed where there are several feature axes.

    Returns:
        Arrays by their names.

    Raises:
        TypeError: `bn` is neither a `BatchNorm` nor a `BatchRenorm`; `ndim` is missing.
        ValueError: A value does not fit the shape or dtype that it had.

    Example:
        >>> import jaxbn
        >>> from jaxbn import convert
        >>> bn = jaxbn.BatchNorm(use_scale=False)
        >>> list(convert.to_tf1(convert.Converted(bn, *bn.init(2)), "bn"))
        ['bn/beta', 'bn/moving_mean', 'bn/moving_variance']
    """
    return write_one(_TF1, layer, prefix, functools.partial(write_variables, ndim=ndim))


@with_options_of(from_tf1)
def find_tf1(arrays: Mapping[str, Any], **options: Any) -> Found[TensorFlow]:
    """Returns all batch norms of a TensorFlow 1 checkpoint.

    The slots of optimizers and, unless asked for, the shadows of averages are left.

    Args:
        arrays: As `from_tf1`.
        **options: The keywords of `from_tf1`, for all of them.

    Returns:
        A `Found`.

    Raises:
        ValueError: What `from_tf1` raises, with every layer that it concerns.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> bn = {"bn/moving_mean": np.zeros(3, "f"), "bn/moving_variance": np.ones(3, "f")}
        >>> convert.find_tf1(bn | {"bn/gamma/Adam": np.zeros(3)}).left
        ('bn/gamma/Adam',)
    """
    options = with_defaults(from_tf1, options)
    naming = _AVERAGED if options.pop("averages") else _TF1
    return find(
        naming, arrays, functools.partial(read_variables, **options), write_variables
    )
