"""Converts `hk.BatchNorm` of Haiku: its params and its zero-debiased averages."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._norm_names import HAIKU
from jaxbn._state import BatchStats
from jaxbn._typing import Axes
from jaxbn.convert._array_names import LayerArrays, Naming
from jaxbn.convert._arrays import (
    checked,
    expanded,
    per_feature,
    plain,
    share,
    steps_of,
    to_layer,
    to_stats,
)
from jaxbn.convert._converted import Converted, read_one, write_one
from jaxbn.convert._haiku_averages import coarsest, shares, weight_of
from jaxbn.convert._whole_model import Found, find, with_defaults, with_options_of

_AVERAGES = {
    f"{role}{kind}": (f"state/*/~/{role}_ema/{name}",)
    for role in ("mean", "var")
    for name, kind in (("average", ""), ("hidden", "_hidden"), ("counter", "_counter"))
}
_PARAMS = {role: (f"params/*/{HAIKU[role]}",) for role in ("scale", "bias")}
_HAIKU = Naming("Haiku", "/", _PARAMS | _AVERAGES)

# As `hk.get_channel_index` reads them: NCHW and NC... are of the first kind, NHWC and BTD
# of the second.
_CHANNELS = {1: r"channels_first|NC[^C]*", -1: r"channels_last|N[^C]*C|(BT|TB)[^D]*D"}


def from_haiku(
    arrays: Mapping[str, Any],
    prefix: str = "",
    *,
    decay_rate: float,
    eps: float = 1e-5,
    axis: Sequence[int] | None = None,
    data_format: str = "channels_last",
) -> Converted[BatchNorm, BatchStats]:
    """Returns a batch norm of Haiku's params and state.

    `bn` debiases, and the state holds the average with the share of it that the counter
    stands for, so that the next batch moves it as it would have in Haiku.

    Args:
        arrays: `{"params": params, "state": state}`.
        prefix: The name of the module: `resnet/~/bn`.
        decay_rate: As the module was made with. What the state tells of it must agree.
        eps: As the module was made with.
        axis: The axes that the module averages over; None for all but the channels.
        data_format: As the module was made with: "channels_first", "NHWC" and the like.

    Returns:
        A `Converted`.

    Raises:
        ValueError: The layer or one of its averages is missing; an array has the wrong
            shape, is not finite, or a variance is negative; the averages do not fit
            `decay_rate` and the counter.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> ema = lambda value: {
        ...     "average": np.full((1, 3), value, "f"),
        ...     "hidden": np.full((1, 3), value * 0.19, "f"),
        ...     "counter": np.int32(2),
        ... }
        >>> state = {"bn/~/mean_ema": ema(5.0), "bn/~/var_ema": ema(2.0)}
        >>> arrays = {"params": {}, "state": state}
        >>> layer = convert.from_haiku(arrays, "bn", decay_rate=0.9)
        >>> print(layer.state.mean, layer.state.weight.round(2))
        [5. 5. 5.] [0.19 0.19 0.19]

    References:
        Haiku, `hk.BatchNorm` and `hk.ExponentialMovingAverage`.
    """
    read = _reader(decay_rate, eps, axis, data_format)
    return read_one(_HAIKU, arrays, prefix, read, _write)


def to_haiku(
    layer: Converted[Any, Any], prefix: str = "", *, ndim: int | None = None
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Returns the entries of a batch norm in Haiku's params and state.

    Give the module `decay_rate = bn.momentum` and `eps = bn.epsilon`. It tracks the
    biased variance. An average that is not debiased is written with a counter so high
    that nothing is left to debias.

    Args:
        layer: A converted layer, or `Converted(bn, params, state)`.
        prefix: The name of the module.
        ndim: The rank of x, which the shapes in Haiku have; of a layer that came from
            Haiku it is known.

    Returns:
        `{"params": {module: arrays}, "state": {module: arrays}}`.

    Raises:
        TypeError: `bn` is no `BatchNorm`, or `ndim` is missing.
        ValueError: A value does not fit the shape or dtype that it had; momentum is None
            or 1.

    Example:
        >>> import jaxbn
        >>> from jaxbn import convert
        >>> bn = jaxbn.BatchNorm(debias=True)
        >>> trees = convert.to_haiku(convert.Converted(bn, *bn.init(3)), "bn", ndim=4)
        >>> trees["params"]["bn"]["scale"].shape, list(trees["state"])
        ((1, 1, 1, 3), ['bn/~/mean_ema', 'bn/~/var_ema'])
    """
    write = functools.partial(_write, ndim=ndim)
    trees: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}, "state": {}}
    for name, array in write_one(_HAIKU, layer, prefix, write).items():
        collection, _, rest = name.partition("/")
        module, _, leaf = rest.rpartition("/")
        trees[collection].setdefault(module, {})[leaf] = array
    return trees


@with_options_of(from_haiku)
def find_haiku(
    arrays: Mapping[str, Any], **options: Any
) -> Found[Converted[BatchNorm, BatchStats]]:
    """Returns all batch norms of Haiku's params and state.

    Args:
        arrays: `{"params": params, "state": state}`.
        **options: The keywords of `from_haiku`, for all of them.

    Returns:
        A `Found`.

    Raises:
        ValueError: What `from_haiku` raises, with every layer that it concerns.

    Example:
        >>> from jaxbn import convert
        >>> trees = {"params": {"linear": {}}, "state": {}}
        >>> len(convert.find_haiku(trees, decay_rate=0.9).layers)
        0
    """
    return find(_HAIKU, arrays, _reader(**with_defaults(from_haiku, options)), _write)


def _reader(
    decay_rate: float, eps: float, axis: Sequence[int] | None, data_format: str
) -> Any:
    channels = [c for c, names in _CHANNELS.items() if re.fullmatch(names, data_format)]
    if not channels:
        raise ValueError(
            f"data_format must be one that Haiku takes, got {data_format!r}. Pass what the "
            'module was made with, such as "channels_first" or "NHWC".'
        )
    return functools.partial(
        _read, decay=decay_rate, eps=eps, axis=axis, channels=channels[0]
    )


def _read(
    found: LayerArrays,
    *,
    decay: float,
    eps: float,
    axis: Sequence[int] | None,
    channels: int,
) -> Converted[BatchNorm, BatchStats]:
    mean = found.need("mean")
    axes: Axes = channels
    if axis is not None:
        reduced = {a % mean.ndim for a in axis}
        axes = tuple(a for a in range(mean.ndim) if a not in reduced)
        _check_negative(found, axis, mean.shape)
    found.require("var", "mean_hidden", "var_hidden")
    roles = ("scale", "bias", "mean", "var", "mean_hidden", "var_hidden")
    where = (channels % mean.ndim,) if isinstance(axes, int) and mean.ndim else axes
    read = checked(found, roles, where)
    steps, also = found.count("mean_counter"), found.count("var_counter")
    if also != steps:
        raise ValueError(
            f"{found.names['mean_counter']} is {steps}, but {found.names['var_counter']} "
            f"is {also}. Both count the same batches."
        )
    weight = weight_of(found, read.arrays, decay, steps)
    mean, var, seen = to_stats(
        read.arrays["mean"], read.arrays["var"], np.full(read.features, weight)
    )
    bn, params = to_layer(read, feature_axes=axes, momentum=decay, epsilon=eps, debias=True)
    return Converted(bn, params, BatchStats(mean, var, seen), read.notes)


def _check_negative(found: LayerArrays, axis: Sequence[int], shape: Any) -> None:
    for role in ("scale", "bias"):
        array = found.arrays.get(role)
        if array is not None and array.shape != shape and min(axis) < 0:
            raise ValueError(
                f"{found.names[role]} has the shape {array.shape} but the statistics have "
                f"{shape}: Haiku gives scale and offset the size of x at the negative ones "
                f"of axis={axis}. Convert without scale and offset, and apply them to y."
            )


def _write(
    layer: Converted[BatchNorm, BatchStats],
    kept: Mapping[str, np.ndarray],
    ndim: int | None = None,
) -> dict[str, np.ndarray]:
    bn, state = plain(layer.bn, "Haiku"), layer.state
    counted = int(kept["mean_counter"].reshape(())) if "mean_counter" in kept else None
    steps = steps_of(bn, state, counted, "Haiku")
    weight = share(bn.momentum or 0.0, steps)
    if counted is not None:
        # A share that was read and is unchanged goes back with the counter it came with.
        dtype = coarsest([kept["mean"], kept["var"]])
        for seen in shares(bn.momentum or 0.0, counted, dtype):
            if state.weight is not None and np.allclose(state.weight, seen, rtol=1e-6):
                steps, weight = counted, seen
    arrays = per_feature(layer.params, mean=state.mean, var=state.var)
    if not kept:
        arrays = expanded(arrays, bn.feature_axes, ndim)
    for role in ("mean", "var"):
        arrays[f"{role}_hidden"] = arrays[role] * arrays[role].dtype.type(weight)
        arrays[f"{role}_counter"] = np.asarray(steps, np.int32)
    return arrays
