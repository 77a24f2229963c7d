"""Flax: `linen.BatchNorm` in variables trees, and `nnx.BatchNorm` in pure dicts."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._norm_names import FLAX
from jaxbn._state import BatchStats
from jaxbn._typing import Axes, DTypeLike
from jaxbn.convert._array_names import Dialect, Part
from jaxbn.convert._arrays import (
    Values,
    checked,
    per_feature,
    plain,
    to_params,
    to_stats,
)
from jaxbn.convert._converted import Converted, nested, read_one, write_one
from jaxbn.convert._whole_model import Found, find

_LINEN = Dialect(
    "Flax linen",
    "/",
    {
        "scale": ("params/*/scale",),
        "bias": ("params/*/bias",),
        "mean": ("batch_stats/*/mean",),
        "var": ("batch_stats/*/var",),
    },
)
_NNX = Dialect("Flax NNX", "/", {role: (f"*/{name}",) for role, name in FLAX.items()})


def from_flax(
    arrays: Mapping[str, Any],
    prefix: str = "",
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    axis: Axes = -1,
    dtype: DTypeLike | None = None,
) -> Converted:
    """Returns a batch norm of Flax.

    Args:
        arrays: The variables of linen, `{"params": ..., "batch_stats": ...}`; or the pure
            dict of an NNX model, `nnx.to_pure_dict(nnx.state(model))`.
        prefix: The path of the module, with slashes: `Block_0/BatchNorm_0`, `layers/0/bn`.
        momentum: As the module was made with.
        epsilon: As the module was made with.
        axis: As the module was made with: the feature axis, or axes.
        dtype: As the module was made with. Without, Flax gives a result of the widest of
            x's dtype and that of the params, which here is at least that of the params.

    Returns:
        A `Converted`.

    Raises:
        ValueError: The layer or its statistics are missing; an array has the wrong shape,
            is not finite, or a variance is negative.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> stats = {"mean": np.zeros(3, "f"), "var": np.ones(3, "f")}
        >>> variables = {"params": {}, "batch_stats": {"BatchNorm_0": stats}}
        >>> convert.from_flax(variables, "BatchNorm_0").bn.momentum
        0.99

    References:
        Flax, `flax.linen.BatchNorm` and `flax.nnx.BatchNorm`.

    Differs from the module in the variance, which is exact here and E[x^2] - E[x]^2 there
    unless `use_fast_variance=False`.
    """
    read = _reader(momentum, epsilon, axis, dtype)
    return read_one(_dialect(arrays), arrays, prefix, read, _write)


def to_flax(layer: Converted, prefix: str = "", *, nnx: bool = False) -> dict[str, Any]:
    """Returns the entries of a batch norm in the variables of Flax.

    Flax tracks the biased variance and debiases nothing.

    Args:
        layer: A converted layer, or `Converted(bn, params, state)`.
        prefix: The path of the module, with slashes.
        nnx: Whether the entries are those of an NNX model.

    Returns:
        Nested dicts: `{"params": ..., "batch_stats": ...}`, or an NNX pure dict.

    Raises:
        TypeError: `bn` is no `BatchNorm`.
        ValueError: A value does not fit the shape or dtype that it had.

    Example:
        >>> import jaxbn
        >>> from jaxbn import convert
        >>> bn = jaxbn.BatchNorm(use_bias=False)
        >>> variables = convert.to_flax(convert.Converted(bn, *bn.init(2)), "bn")
        >>> print({name: list(tree["bn"]) for name, tree in variables.items()})
        {'params': ['scale'], 'batch_stats': ['mean', 'var']}
    """
    return nested(write_one(_NNX if nnx else _LINEN, layer, prefix, _write), "/")


def find_flax(
    arrays: Mapping[str, Any],
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    axis: Axes = -1,
    dtype: DTypeLike | None = None,
) -> Found:
    """Returns all batch norms of a Flax model.

    Args:
        arrays: As `from_flax`.
        momentum: As `from_flax`, for all of them.
        epsilon: As `from_flax`, for all of them.
        axis: As `from_flax`, for all of them.
        dtype: As `from_flax`, for all of them.

    Returns:
        A `Found`.

    Raises:
        ValueError: What `from_flax` raises, with every layer that it concerns.

    Example:
        >>> import numpy as np
        >>> from jaxbn import convert
        >>> norm = {"scale": np.ones(3), "mean": np.zeros(3), "var": np.ones(3)}
        >>> norm = {name: array.astype(np.float32) for name, array in norm.items()}
        >>> found = convert.find_flax({"layers": {0: {"norm": norm}}})   # of NNX
        >>> list(found.layers), found.layers["layers/0/norm"].bn.use_bias
        (['layers/0/norm'], False)
    """
    return find(_dialect(arrays), arrays, _reader(momentum, epsilon, axis, dtype), _write)


def _dialect(arrays: Mapping[str, Any]) -> Dialect:
    is_linen = any(str(name).split("/")[0] == "batch_stats" for name in arrays)
    return _LINEN if is_linen else _NNX


def _reader(momentum: float, epsilon: float, axis: Axes, dtype: DTypeLike | None) -> Any:
    return functools.partial(
        _read, momentum=momentum, epsilon=epsilon, axis=axis, dtype=dtype
    )


def _read(
    part: Part, *, momentum: float, epsilon: float, axis: Axes, dtype: DTypeLike | None
) -> Values:
    part.require("mean", "var")
    read = checked(part, ("scale", "bias", "mean", "var"))
    params, param_dtype = to_params(read)
    mean, var = to_stats(read.arrays["mean"], read.arrays["var"])
    has_params = params.scale is not None or params.bias is not None
    bn = BatchNorm(
        feature_axes=axis,
        momentum=momentum,
        epsilon=epsilon,
        use_scale=params.scale is not None,
        use_bias=params.bias is not None,
        dtype=param_dtype if dtype is None and has_params else dtype,
        param_dtype=param_dtype,
    )
    return Values(bn, params, BatchStats(mean, var), read.notes + _stacked(bn, mean.ndim))


def _stacked(bn: BatchNorm, ndim: int) -> tuple[str, ...]:
    axes = 1 if isinstance(bn.feature_axes, int) else len(bn.feature_axes)
    if ndim == axes:
        return ()
    return (f"{ndim} axes for {axes} feature axes: layers stacked by scan or vmap?",)


def _write(layer: Converted, kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    plain(layer.bn, "Flax")
    return per_feature(layer.params, mean=layer.state.mean, var=layer.state.var)
