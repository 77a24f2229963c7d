"""What Keras and TensorFlow 1 share: one set of variables, with batch renormalization."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.batch_renorm import BatchRenorm, RenormStats
from jaxbn._layers.renorm_limits import RenormLimits
from jaxbn._norm_names import TENSORFLOW
from jaxbn._state import BatchStats
from jaxbn._typing import Axes, DTypeLike
from jaxbn.convert._array_names import Part
from jaxbn.convert._arrays import (
    Values,
    checked,
    expanded,
    per_feature,
    plain,
    to_params,
    to_stats,
)
from jaxbn.convert._converted import Converted
from jaxbn.convert._debias import steps_of

# The fused kernel raises a smaller epsilon to this.
FUSED_EPSILON = 1.001e-5
_RENORM = ("std", "renorm_mean", "renorm_std")
_CLIPPING = {"rmin": "r_min", "rmax": "r_max", "dmax": "d_max"}
_NO_CLIPPING = RenormLimits(r_min=0.0, r_max=float("inf"), d_max=float("inf"))


def read_variables(
    part: Part,
    *,
    axis: Any,
    momentum: float,
    epsilon: float,
    fused: bool,
    renorm_momentum: float,
    renorm_clipping: Mapping[str, float] | None,
    dtype: DTypeLike | None = None,
) -> Values:
    """Returns the layer of variables under these names, a `BatchRenorm` where it is one."""
    part.require("mean", "var")
    axes: Axes = tuple(axis) if isinstance(axis, (list, tuple)) else axis
    if isinstance(axes, tuple) and len(axes) == 1:
        (axes,) = axes
    read = checked(part, tuple(TENSORFLOW), axes)
    renorm = "renorm_mean" in read.arrays
    fused = fused and not renorm and part.need("mean").ndim == 1
    notes = read.notes + _debiased(part)
    if fused and epsilon < FUSED_EPSILON:
        notes += (f"epsilon {epsilon:g} raised to {FUSED_EPSILON:g}, as fused layers do",)
        epsilon = FUSED_EPSILON
    params, param_dtype = to_params(read)
    bn = BatchNorm(
        feature_axes=axes,
        momentum=momentum,
        epsilon=epsilon,
        ddof=int(fused),
        use_scale=params.scale is not None,
        use_bias=params.bias is not None,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    if not renorm:
        stats = to_stats(read.arrays["mean"], read.arrays["var"])
        return Values(bn, params, BatchStats(*stats), notes)
    part.require(*_RENORM)
    stats = to_stats(*(read.arrays[role] for role in RenormStats._fields))
    limits = _limits(renorm_clipping)
    layer = BatchRenorm(bn, momentum=renorm_momentum, limits=limits)
    return Values(layer, params, RenormStats(*stats), notes)


def _debiased(part: Part) -> tuple[str, ...]:
    """Tells of a moving mean that is debiased there, and goes on as a plain one here."""
    if "old_renorm" in part.arrays:
        raise ValueError(
            f"{part.names['old_renorm']} is of a TensorFlow before 1.15, whose renorm "
            "statistics are sums that were not debiased yet. Divide renorm_mean and "
            "renorm_stddev by their weights, and leave the weights out."
        )
    if "local_step" not in part.arrays:
        return ()
    return (
        f"zero-debiased mean after {part.count('local_step')} steps goes on as a plain "
        "average; jaxbn.tf1.batch_norm goes on exactly",
    )


def _limits(clipping: Mapping[str, float] | None) -> RenormLimits:
    unknown = set(clipping or ()) - set(_CLIPPING)
    if unknown:
        raise ValueError(
            f"renorm_clipping has the keys {sorted(_CLIPPING)}, got {sorted(unknown)}. "
            "Pass it as the layer was made with."
        )
    return _NO_CLIPPING._replace(**{_CLIPPING[k]: v for k, v in (clipping or {}).items()})


def write_variables(
    layer: Converted, kept: Mapping[str, np.ndarray], ndim: int | None = None
) -> dict[str, np.ndarray]:
    """Returns the variables of a layer by their roles."""
    if isinstance(layer.bn, BatchRenorm):
        bn = layer.bn.bn
        arrays = per_feature(layer.params, **layer.state._asdict())
    else:
        bn = plain(layer.bn, "Keras")
        arrays = per_feature(layer.params, mean=layer.state.mean, var=layer.state.var)
    if not kept and isinstance(bn.feature_axes, tuple):
        arrays = expanded(arrays, bn.feature_axes, ndim)
    if "local_step" in kept:
        counted = int(kept["local_step"].reshape(()))
        arrays["biased"] = arrays["mean"]
        steps = steps_of(bn, None, counted, "TensorFlow 1")
        arrays["local_step"] = np.asarray(steps, np.int64)
    return arrays
