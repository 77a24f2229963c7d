"""The truth in float64 NumPy, written from the papers; shares no code with jaxbn.

A normalizer is read as a description (its fields), never called. Params and state are
dicts of float64 arrays.
"""

import numpy as np

import jaxbn


def tree(values):
    """Returns a NamedTuple of arrays as a dict of float64 (or complex128) arrays."""
    return {
        name: None if value is None else np.asarray(value).astype(_wide(value))
        for name, value in values._asdict().items()
    }


def _wide(value):
    return np.complex128 if np.iscomplexobj(np.asarray(value)) else np.float64


def apply(normalizer, params, state, x, training, weights=None):
    """Returns `(y, state)` of any normalizer of the library."""
    return _ORACLES[type(normalizer)](normalizer, params, state, x, training, weights)


def moments(x, feature_axes, weights=None):
    """Returns mean, biased variance and total weight, each with x's rank."""
    axes = reduced(x, feature_axes)
    w = np.ones(x.shape) if weights is None else align(weights, x, axes)
    x = np.where(w > 0, x, 0)
    total = w.sum(axes, keepdims=True)
    safe = np.where(total > 0, total, 1)
    mean = (w * x).sum(axes, keepdims=True) / safe
    var = (w * np.abs(x - mean) ** 2).sum(axes, keepdims=True) / safe
    return mean, var, total


def reduced(x, feature_axes):
    features = np.atleast_1d(feature_axes) % x.ndim
    return tuple(axis for axis in range(x.ndim) if axis not in features)


def align(weights, x, axes):
    weights = np.asarray(weights, np.float64)
    if weights.ndim < x.ndim:
        shape = [1] * x.ndim
        for axis, size in zip(axes, weights.shape, strict=False):
            shape[axis] = size
        weights = weights.reshape(shape)
    return np.broadcast_to(weights, x.shape)


def affine(bn, params, x, mean, var, axes):
    y = (x - mean) / np.sqrt(var + bn.epsilon)
    if params["scale"] is not None:
        y = y * np.expand_dims(params["scale"], axes)
    if params["bias"] is not None:
        y = y + np.expand_dims(params["bias"], axes)
    return y


def track(bn, state, mean, var, total):
    """Returns the running statistics after a batch of the given moments (section 3.1)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bessel = np.where(total > bn.ddof, total / (total - bn.ddof), 1.0)
    var = var * bessel
    sound = (total > 0) & np.isfinite(mean) & np.isfinite(var)
    weight = state["weight"]
    if bn.momentum is None:
        new_weight = weight + 1
        keep = weight / new_weight
    elif weight is not None:
        # The zero-debiased average: the hidden average from 0, over its total weight.
        new_weight = bn.momentum * weight + (1 - bn.momentum)
        keep = bn.momentum * weight / new_weight
    else:
        new_weight, keep = None, bn.momentum

    def average(old, new):
        return np.where(sound, keep * old + (1 - keep) * np.where(sound, new, 0), old)

    return {
        "mean": average(state["mean"], mean),
        "var": average(state["var"], var),
        "weight": None if weight is None else np.where(sound, new_weight, weight),
    }


def _batch_norm(bn, params, state, x, training, weights):
    axes = reduced(x, bn.feature_axes)
    if weights is not None:
        counts = align(weights, x, axes) > 0
        x = np.where(counts | np.isfinite(x), x, 0)
    mean, var = (np.expand_dims(state[name], axes) for name in ("mean", "var"))
    if training:
        batch = moments(x, bn.feature_axes, weights)
        mean, var = (
            np.where(batch[2] > 0, new, old)
            for new, old in zip(batch, (mean, var), strict=False)
        )
        state = track(bn, state, *(np.squeeze(m, axes) for m in batch))
    return affine(bn, params, x, mean, var, axes), state


_ORACLES = {jaxbn.BatchNorm: _batch_norm}


def gradient(function, values, step=1e-5):
    """Returns the gradient of a function of a dict of arrays, by central differences."""
    gradients = {}
    for name, value in values.items():
        if value is None:
            continue
        gradients[name] = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            size = step * max(1.0, abs(value[index]))
            sides = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * size
                sides.append(function({**values, name: moved}))
            gradients[name][index] = (sides[0] - sides[1]) / (2 * size)
    return gradients
