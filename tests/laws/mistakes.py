"""The mistakes that a draw may have: what each changes, and in which modes it is one.

A mistake is a function of a draw, which it changes; it returns whether it could.
"""

from typing import Any, cast

import numpy as np

import jaxbn

STEPS = 2


def _set(where, **values):
    def change(made):
        target = getattr(made, where)
        if where == "around" and not set(values) <= set(target):
            return False
        target.update(values)
        return True

    return change


def _field(**values):
    def change(made):
        for name, value in values.items():
            setattr(made, name, value(made))
        return True

    return change


def _of_other_features(made):
    """Returns an x in which each axis of features is longer."""
    shape = np.array(made.xs.shape[1:])
    shape[np.atleast_1d(made.settings["feature_axes"])] += 5
    return np.ones((len(made.xs), *shape), "f")


MISTAKES = {
    "momentum_text": _set("settings", momentum="0.9"),
    "momentum_above": _set("settings", momentum=np.float32(1.5)),
    "momentum_nan": _set("settings", momentum=np.array(np.nan)),
    "momentum_vector": _set("settings", momentum=np.ones(1)),
    "epsilon_zero": _set("settings", epsilon=np.float64(0)),
    "epsilon_flag": _set("settings", epsilon=True),
    "ddof_negative": _set("settings", ddof=np.int64(-1)),
    "ddof_float": _set("settings", ddof=1.0),
    "flag_text": _set("settings", use_scale="false"),
    "flag_number": _set("settings", use_bias=1),
    "axis_beyond": _set("settings", feature_axes=np.int64(7)),
    "axis_twice": _set("settings", feature_axes=(1, 1)),
    "axis_text": _set("settings", feature_axes="C"),
    "dtype_whole": _set("settings", dtype=np.int32),
    "dtype_text": _set("settings", param_dtype="bf17"),
    "activation": _set("settings", activation="relu"),
    "axis_name": _set("settings", axis_name=("a", 1)),
    "unknown_axis": _set("settings", axis_name="nowhere"),
    "groups": _set("settings", axis_index_groups=[[0], [0]]),
    "foreign": _set("settings", eps=1e-5),
    "size_zero": _set("around", virtual_batch_size=0),
    "size_odd": _set("around", virtual_batch_size=np.int64(5)),
    "size_float": _set("around", virtual_batch_size=2.0),
    "layout": _set("around", layout="rows"),
    "tracking": _set("around", tracking="mean"),
    "limits": _set("around", limits=jaxbn.RenormLimits(r_max=0.5)),
    "limits_text": _set("around", limits=jaxbn.RenormLimits(d_max=cast(Any, "5"))),
    "momentum_of_renorm": _set("around", momentum=-0.5),
    "training_text": _field(training=lambda made: "yes"),
    "training_number": _field(training=lambda made: 1),
    "training_vector": _field(training=lambda made: np.array([True])),
    "x_whole": _field(xs=lambda made: np.ones(made.xs.shape, int)),
    "x_features": _field(xs=_of_other_features),
    "weights_shape": _field(weights=lambda made: np.ones((STEPS, 5, 1, 1, 1, 1), "f")),
    "weights_complex": _field(
        weights=lambda made: np.ones((STEPS, made.xs.shape[1]), np.complex64)
    ),
    "residual_shape": _field(residual=lambda made: np.ones((*made.xs.shape, 1), "f")),
    "adjustment_single": _set("options", adjustment=np.ones(2, "f")),
    "adjustment_shape": _set("options", adjustment=(np.ones(9, "f"), np.ones(9, "f"))),
    "option": _set("options", epsilon=1e-3),
    "momentum_override": _set("options", momentum=np.float32(2)),
    "momentum_override_vector": _set("options", momentum=np.ones(2, "f")),
    "weights_negative": _field(
        weights=lambda made: -np.ones((STEPS, *made.xs.shape[1:]), "f")
    ),
}
# Of these only the values tell, which are unknown where they are traced.
CONCRETE = {"weights_negative"}
# Of these the arrays are not split over devices.
OF_ARRAYS = {"x_whole", "x_features", "weights_shape", "weights_complex", "residual_shape"}
WHOLE_BATCH = "eager", "jit", "remat", "scan"


def possible(mode):
    names = [n for n in MISTAKES if mode in WHOLE_BATCH or n not in OF_ARRAYS]
    return [n for n in names if mode == "eager" or n not in CONCRETE]
