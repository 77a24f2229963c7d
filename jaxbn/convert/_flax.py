"""Converts Flax: `linen.BatchNorm` in variables, and `nnx.BatchNorm` in pure dicts."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._fold.pairs import as_plain
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._norm_names import FLAX, spellings
from jaxbn._state import BatchStats
from jaxbn._typing import Axes, DTypeLike
from jaxbn.convert._array_names import LayerArrays, Naming, flatten
from jaxbn.convert._arrays import checked, per_feature, plain, to_layer, to_stats
from jaxbn.convert._converted import Converted, nested, read_one, write_one
from jaxbn.convert._whole_model import Found, find, with_defaults, with_options_of

_PLAIN = spellings(FLAX, "/", ("", "/value", "/raw_value"), others={})
_NNX = Naming("Flax NNX", "/", _PLAIN)


def _linen(above: str) -> Naming:
    """Returns the names of linen's variables that lie below a node of a tree, if any."""
    heads = dict.fromkeys(("scale", "bias"), "params/")
    heads |= dict.fromkeys(("mean", "var"), "batch_stats/")
    texts = {r: tuple(above + heads[r] + text for text in _PLAIN[r]) for r in heads}
    return Naming("Flax linen", "/", texts)


_LINEN = _linen("")


def from_flax(
    arrays: Mapping[str, Any],
    prefix: str = "",
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    axis: Axes = -1,
    dtype: DTypeLike | None = None,
) -> Converted[BatchNorm, BatchStats]:
    """Returns a batch norm of Flax.

    Args:
        arrays: The variables of linen, `{"params": ..., "batch_stats": ...}`; or the pure
            dict of an NNX model, `nnx.to_pure_dict(nnx.state(model))`, also as Orbax
            restores an `nnx.State`, with a {"value": array} for each variable.
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
    read = functools.partial(
        _read, momentum=momentum, epsilon=epsilon, axis=axis, dtype=dtype
    )
    return read_one(_naming(arrays), as_plain(arrays), prefix, read, _write)


def to_flax(
    layer: Converted[Any, Any], prefix: str = "", *, nnx: bool = False
) -> dict[str, Any]:
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


@with_options_of(from_flax)
def find_flax(
    arrays: Mapping[str, Any], **options: Any
) -> Found[Converted[BatchNorm, BatchStats]]:
    """Returns all batch norms of a Flax model.

    Args:
        arrays: As `from_flax`.
        **options: The keywords of `from_flax`, for all of them.

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
    read = functools.partial(_read, **with_defaults(from_flax, options))
    return find(_naming(arrays), as_plain(arrays), read, _write)


def _naming(arrays: Mapping[str, Any]) -> Naming:
    above = set()
    for name in flatten(arrays, "/"):
        nodes = name.split("/")
        if "batch_stats" in nodes:
            above.add("".join(f"{n}/" for n in nodes[: nodes.index("batch_stats")]))
    if len(above) > 1:
        raise ValueError(
            f"there are several batch_stats, below {sorted(above)}: of a model and of its "
            "average? Pass one of these parts of the tree."
        )
    return _linen(above.pop()) if above else _NNX


def _read(
    found: LayerArrays,
    *,
    momentum: float,
    epsilon: float,
    axis: Axes,
    dtype: DTypeLike | None,
) -> Converted[BatchNorm, BatchStats]:
    found.require("mean", "var")
    read = checked(found, ("scale", "bias", "mean", "var"))
    mean, var = to_stats(read.arrays["mean"], read.arrays["var"])
    bn, params = to_layer(read, feature_axes=axis, momentum=momentum, epsilon=epsilon)
    has_params = params.scale is not None or params.bias is not None
    bn = dataclasses.replace(
        bn, dtype=bn.param_dtype if dtype is None and has_params else dtype
    )
    notes = read.notes + _stacked(bn, mean.ndim)
    return Converted(bn, params, BatchStats(mean, var), notes)


def _stacked(bn: BatchNorm, ndim: int) -> tuple[str, ...]:
    axes = 1 if isinstance(bn.feature_axes, int) else len(bn.feature_axes)
    if ndim == axes:
        return ()
    return (f"{ndim} axes for {axes} feature axes: layers stacked by scan or vmap?",)


def _write(
    layer: Converted[BatchNorm, BatchStats], kept: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    plain(layer.bn, "Flax")
    return per_feature(layer.params, mean=layer.state.mean, var=layer.state.var)
