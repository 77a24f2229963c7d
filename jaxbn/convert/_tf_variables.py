"""Reads and writes the variables that Keras and TensorFlow 1 share, those of renorm too."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.batch_renorm import BatchRenorm, RenormStats
from jaxbn._norm_names import TENSORFLOW
from jaxbn._state import BatchStats
from jaxbn._typing import Axes, DTypeLike
from jaxbn.convert._array_names import LayerArrays
from jaxbn.convert._arrays import (
    checked,
    expanded,
    per_feature,
    plain,
    steps_of,
    to_layer,
    to_stats,
)
from jaxbn.convert._converted import Converted
from jaxbn.tf1._arguments import FUSED_EPSILON, to_limits

TensorFlow: TypeAlias = (
    Converted[BatchNorm, BatchStats] | Converted[BatchRenorm, RenormStats]
)


def read_variables(
    found: LayerArrays,
    *,
    axis: Any,
    momentum: float,
    epsilon: float,
    fused: bool,
    renorm_momentum: float,
    renorm_clipping: Mapping[str, float] | None,
    dtype: DTypeLike | None = None,
) -> TensorFlow:
    """Returns the layer of variables under these names, a `BatchRenorm` where it is one."""
    found.require("mean", "var")
    axes: Axes = tuple(axis) if isinstance(axis, (list, tuple)) else axis
    if isinstance(axes, tuple) and len(axes) == 1:
        (axes,) = axes
    read = checked(found, tuple(TENSORFLOW), axes)
    renorm = "renorm_mean" in read.arrays
    fused = fused and not renorm and found.need("mean").ndim == 1
    notes = read.notes + _debiased(found)
    if fused and epsilon < FUSED_EPSILON:
        notes += (f"epsilon {epsilon:g} raised to {FUSED_EPSILON:g}, as fused layers do",)
        epsilon = FUSED_EPSILON
    bn, params = to_layer(
        read,
        feature_axes=axes,
        momentum=momentum,
        epsilon=epsilon,
        ddof=int(fused),
        dtype=dtype,
    )
    if not renorm:
        stats = to_stats(read.arrays["mean"], read.arrays["var"])
        return Converted(bn, params, BatchStats(*stats), notes)
    found.require("std", "renorm_mean", "renorm_std")
    stats = to_stats(*(read.arrays[role] for role in RenormStats._fields))
    limits = to_limits(renorm_clipping)
    layer = BatchRenorm(bn, momentum=renorm_momentum, limits=limits)
    return Converted(layer, params, RenormStats(*stats), notes)


def _debiased(found: LayerArrays) -> tuple[str, ...]:
    """Tells of a moving mean that is debiased there, and goes on as a plain one here."""
    if "old_renorm" in found.arrays:
        raise ValueError(
            f"{found.names['old_renorm']} is of a TensorFlow before 1.15, whose renorm "
            "statistics are sums that were not debiased yet. Divide renorm_mean and "
            "renorm_stddev by their weights, and leave the weights out."
        )
    if "local_step" not in found.arrays:
        return ()
    return (
        f"zero-debiased mean after {found.count('local_step')} steps goes on as a plain "
        "average; jaxbn.tf1.batch_norm goes on exactly",
    )


def write_variables(
    layer: TensorFlow, kept: Mapping[str, np.ndarray], ndim: int | None = None
) -> dict[str, np.ndarray]:
    """Returns the variables of a layer by their roles."""
    stats = layer.state._asdict()
    # A BatchRenorm holds the BatchNorm with its settings in `bn`.
    inner: Any = layer.bn
    bn = plain(inner.bn if "renorm_mean" in stats else inner, "Keras")
    stats.pop("weight", None)
    arrays = per_feature(layer.params, **stats)
    if not kept and isinstance(bn.feature_axes, tuple):
        arrays = expanded(arrays, bn.feature_axes, ndim)
    if "local_step" in kept:
        counted = int(kept["local_step"].reshape(()))
        arrays["biased"] = arrays["mean"]
        steps = steps_of(bn, None, counted, "TensorFlow 1")
        arrays["local_step"] = np.asarray(steps, np.int64)
    return arrays
