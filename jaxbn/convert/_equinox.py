"""Converts `eqx.nn.BatchNorm` of Equinox, in both of its modes."""

import functools
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from jaxbn.convert._array_names import Naming
from jaxbn.convert._converted import Converted, read_one, write_one
from jaxbn.convert._equinox_arrays import Equinox, Variance, read_arrays, write_arrays
from jaxbn.convert._whole_model import Found, find, with_defaults, with_options_of

_EQUINOX = Naming(
    "Equinox",
    ".",
    {
        "scale": ("*.weight",),
        "bias": ("*.bias",),
        "hidden_mean": ("*.hidden_mean",),
        "hidden_var": ("*.hidden_var",),
        "counter": ("*.counter",),
        "mean": ("*.running_mean",),
        "var": ("*.running_var",),
        "first_time": ("*.first_time",),
    },
    required_roles=("hidden_mean", "hidden_var", "first_time"),
)


def from_equinox(
    arrays: Mapping[str, Any],
    prefix: str = "",
    *,
    momentum: float = 0.99,
    eps: float = 1e-5,
    variance: Variance = "used",
) -> Equinox:
    r"""Returns a batch norm of Equinox.

    The arrays of `eqx.nn.BatchNorm`, taken from the module and from its `State`:

    * `weight` and `bias`, unless `channelwise_affine=False`;
    * with `mode="batch"`, `hidden_mean` and `hidden_var`, which are
      `state.get(module.batch_state_index)`, and `counter`,
      `state.get(module.batch_counter)`. `bn` is then a `BatchNorm` that debiases;
    * with `mode="ema"`, `running_mean` and `running_var`, which are
      `state.get(module.ema_state_index)`, and `first_time`,
      `state.get(module.ema_first_time_index)`. `bn` is then an `EmaBatchNorm`.

    With `mode="batch"`, Equinox starts the hidden variance h at 1 and yet divides it by
    1 - m^t after t batches, so that its inference sees the variance of the batches plus
    m^t / (1 - m^t): 101.9 for 2.9 after one batch at m = 0.99.

    Args:
        arrays: The arrays under the names above, after the name of the module and a dot.
        prefix: The name of the module.
        momentum: As the module was made with.
        eps: As the module was made with.
        variance: With `mode="batch"`, "used" for the variance that Equinox normalizes
            with, h / (1 - m^t); "intended" for (h - m^t) / (1 - m^t), that of the batches.

    Returns:
        A `Converted`. Channels are at axis 1, since x has its batch axis here.

    Raises:
        ValueError: The layer or one of its arrays is missing, has the wrong shape, is not
            finite, or a variance is negative, the intended one included.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> arrays = {
        ...     "hidden_mean": np.full(3, 0.05, "f"),
        ...     "hidden_var": np.full(3, 1.02, "f"),
        ...     "counter": np.int32(1),
        ... }
        >>> for variance in ("used", "intended"):
        ...     print(convert.from_equinox(arrays, variance=variance).state.var.round(2))
        [102. 102. 102.]
        [3. 3. 3.]

    References:
        Equinox 0.13, `eqx.nn.BatchNorm`.
    """
    read = _reader(momentum, eps, variance)
    return read_one(_EQUINOX, arrays, prefix, read, _writer(variance))


def to_equinox(
    layer: Converted[Any, Any], prefix: str = "", *, variance: Variance = "used"
) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch norm of Equinox, under the names of `from_equinox`.

    Those of `mode="ema"` for an `EmaBatchNorm`, of `mode="batch"` for a `BatchNorm`. Give
    the module `momentum = bn.momentum` and `eps = bn.epsilon`.

    Args:
        layer: A converted layer, or `Converted(bn, params, state)`.
        prefix: The name of the module.
        variance: "used", so that Equinox normalizes with the variance of the state;
            "intended" for the way back of a layer that was read so.

    Returns:
        Arrays by their names.

    Raises:
        TypeError: `bn` is neither a `BatchNorm` nor an `EmaBatchNorm`.
        ValueError: A value does not fit the shape or dtype that it had; momentum is None
            or 1.

    Example:
        >>> import jaxbn
        >>> from jaxbn import convert
        >>> bn = jaxbn.BatchNorm(debias=True, use_scale=False, use_bias=False)
        >>> list(convert.to_equinox(convert.Converted(bn, *bn.init(3)), "norm"))
        ['norm.hidden_mean', 'norm.hidden_var', 'norm.counter']
    """
    return write_one(_EQUINOX, layer, prefix, _writer(variance))


@with_options_of(from_equinox)
def find_equinox(arrays: Mapping[str, Any], **options: Any) -> Found[Equinox]:
    """Returns all batch norms among arrays named as `from_equinox` tells.

    Args:
        arrays: The arrays by the names of modules.
        **options: The keywords of `from_equinox`, for all of them.

    Returns:
        A `Found`.

    Raises:
        ValueError: What `from_equinox` raises, with every layer that it concerns.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> len(convert.find_equinox({"norm.weight": np.ones(3)}).layers)
        0
    """
    options = with_defaults(from_equinox, options)
    return find(_EQUINOX, arrays, _reader(**options), _writer(options["variance"]))


def _reader(momentum: float, eps: float, variance: Variance) -> Any:
    if variance not in get_args(Variance):
        raise ValueError(
            f'variance must be "used" or "intended", got {variance!r}. Choose "used" to '
            "go on exactly as Equinox would."
        )
    return functools.partial(read_arrays, momentum=momentum, eps=eps, variance=variance)


def _writer(variance: Variance) -> Any:
    return functools.partial(write_arrays, variance=variance)
