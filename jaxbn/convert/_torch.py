"""Converts `BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm` in state dicts of PyTorch."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._norm_names import TORCH, spellings
from jaxbn._state import BatchStats
from jaxbn.convert._array_names import LayerArrays, Naming
from jaxbn.convert._arrays import checked, per_feature, plain, to_layer, to_stats
from jaxbn.convert._converted import Converted, read_one, write_one
from jaxbn.convert._whole_model import Found, find, with_defaults, with_options_of

_TORCH = Naming("PyTorch", ".", spellings(TORCH, "."))


def from_torch(
    arrays: Mapping[str, Any],
    prefix: str = "",
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    feature_axes: int = 1,
) -> Converted[BatchNorm, BatchStats]:
    """Returns a batch norm of a PyTorch state dict.

    `bn` has channels at axis 1, one minus the momentum, `momentum=None` for the cumulative
    average that goes on from `num_batches_tracked`, and `ddof=1`, since PyTorch tracks the
    unbiased variance.

    Args:
        arrays: A state dict of arrays, or of tensors.
        prefix: The name of the module: `layer1.0.bn2`.
        eps: As the module was made with.
        momentum: As the module was made with: the weight of the new batch, or None.
        feature_axes: The axis of the channels in x: 1 in PyTorch; -1 in MLX, which names
            arrays as PyTorch does, and for a model of which only the weights came here.

    Returns:
        A `Converted`.

    Raises:
        ValueError: The layer or its running statistics are missing; an array has the
            wrong shape, is not finite, or a variance is negative; momentum is None and
            there is no `num_batches_tracked`.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> stats = {"bn.running_mean": np.zeros(3, "f"), "bn.running_var": np.ones(3, "f")}
        >>> layer = convert.from_torch(stats, "bn", momentum=0.25)
        >>> layer.bn.momentum, layer.bn.ddof, layer.bn.use_scale
        (0.75, 1, False)

    References:
        PyTorch, `torch.nn.modules.batchnorm`.
    """
    read = _reader(eps, momentum, feature_axes)
    return read_one(_TORCH, arrays, prefix, read, _write)


def to_torch(layer: Converted[Any, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the entries of a batch norm in a PyTorch state dict.

    Give the module `momentum = 1 - bn.momentum` and `eps = bn.epsilon`. A module tracks
    the unbiased variance, and debiases nothing. `num_batches_tracked` is the one that came
    with the layer, or 0: PyTorch reads it only with `momentum=None`.

    Args:
        layer: A converted layer, or `Converted(bn, params, state)`.
        prefix: The name of the module.

    Returns:
        Arrays by their names; `torch.as_tensor` makes them tensors.

    Raises:
        TypeError: `bn` is no `BatchNorm`.
        ValueError: A value does not fit the shape or dtype that it had.

    Example:
        >>> import jaxbn
        >>> from jaxbn import convert
        >>> bn = jaxbn.BatchNorm(feature_axes=1, use_scale=False, use_bias=False)
        >>> convert.to_torch(convert.Converted(bn, *bn.init(2)))["running_var"]
        array([1., 1.], dtype=float32)
    """
    return write_one(_TORCH, layer, prefix, _write)


@with_options_of(from_torch)
def find_torch(
    arrays: Mapping[str, Any], **options: Any
) -> Found[Converted[BatchNorm, BatchStats]]:
    """Returns all batch norms of a PyTorch state dict.

    What has running statistics is one; layer norms and group norms, which have none, are
    left. An instance norm that tracks statistics has the same names, and is taken for one.

    Args:
        arrays: A state dict of arrays, or of tensors.
        **options: The keywords of `from_torch`, for all of them.

    Returns:
        A `Found`.

    Raises:
        ValueError: What `from_torch` raises, with every layer that it concerns.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> stats = {"bn.running_mean": np.zeros(3, "f"), "bn.running_var": np.ones(3, "f")}
        >>> list(convert.find_torch(stats | {"fc.bias": np.zeros(3)}).layers)
        ['bn']
    """
    return find(_TORCH, arrays, _reader(**with_defaults(from_torch, options)), _write)


def _reader(eps: float, momentum: float | None, feature_axes: int) -> Any:
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"PyTorch's momentum must lie in [0, 1], got {momentum}. Pass the one that the "
            "module was made with, the weight of the new batch."
        )
    return functools.partial(_read, eps=eps, momentum=momentum, feature_axes=feature_axes)


def _read(
    found: LayerArrays, *, eps: float, momentum: float | None, feature_axes: int
) -> Converted[BatchNorm, BatchStats]:
    found.require("mean", "var")
    read = checked(found, ("scale", "bias", "mean", "var"))
    mean, var = to_stats(read.arrays["mean"], read.arrays["var"])
    weight = None
    if momentum is None:
        count = np.full(read.features, found.count("count"), var.dtype)
        (weight,) = to_stats(count)
    decay = None if momentum is None else 1 - momentum
    bn, params = to_layer(
        read, feature_axes=feature_axes, momentum=decay, epsilon=eps, ddof=1
    )
    return Converted(bn, params, BatchStats(mean, var, weight), read.notes)


def _write(
    layer: Converted[BatchNorm, BatchStats], kept: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    bn, state = plain(layer.bn, "PyTorch"), layer.state
    arrays = per_feature(layer.params, mean=state.mean, var=state.var)
    if bn.momentum is None:
        assert state.weight is not None
        arrays["count"] = np.asarray(np.max(state.weight), np.int64)
    elif "count" in kept or not kept:
        arrays["count"] = np.asarray(kept.get("count", 0), np.int64)
    return arrays
