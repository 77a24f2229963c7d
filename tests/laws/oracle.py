"""The truth in float64 NumPy, written from the papers; shares no code with jaxbn.

A normalizer is read as a description (its fields), never called. Params and state are
dicts of float64 arrays.
"""

import dataclasses
from typing import Any

import numpy as np

import jaxbn
from jaxbn import convert


def tree(values):
    """Returns a NamedTuple of arrays as a dict of float64 (or complex128) arrays."""
    return {
        name: None if value is None else np.asarray(value).astype(_wide(value))
        for name, value in values._asdict().items()
    }


def _wide(value):
    return np.complex128 if np.iscomplexobj(np.asarray(value)) else np.float64


def settings(normalizer):
    """Returns the `BatchNorm` at the heart of a normalizer."""
    if hasattr(normalizer, "ids"):
        return settings(normalizer.inner.bn)
    if isinstance(normalizer, jaxbn.GhostBatchNorm):
        return settings(normalizer.inner)
    return getattr(normalizer, "bn", normalizer)


def apply(normalizer, params, state, x, training, weights=None, held=None, adjustment=None):
    """Returns `(y, state)` of any normalizer of the library.

    `held` is an x and a state that take the place of the given ones in what no gradient
    flows through, so that finite differences leave it out too.
    """
    if hasattr(normalizer, "ids"):
        return by_domain(normalizer, params, state, x, training, weights, held)
    bn = settings(normalizer)
    axes = reduced(x, bn.feature_axes)
    if weights is not None:
        weights = align(weights, x, axes)
        x = np.where((weights > 0) | np.isfinite(x), x, 0)
    wide = {name: np.expand_dims(state[name], axes) for name in ("mean", "var")}
    if not training:
        return affine(bn, params, x, wide["mean"], wide["var"], axes), state

    groups = ghosts(normalizer, len(x))
    parts = [
        moments(x[rows], bn.feature_axes, None if weights is None else weights[rows])
        for rows in groups
    ]
    batch = merge(normalizer, parts)
    r: Any = 1.0
    d: Any = 0.0
    if isinstance(core(normalizer), jaxbn.BatchRenorm):
        held_x, held_state = (x, state) if held is None else held
        held_parts = [
            moments(
                held_x[rows], bn.feature_axes, None if weights is None else weights[rows]
            )
            for rows in groups
        ]
        r, d = correction(core(normalizer), held_state, merge(normalizer, held_parts))
        r, d = np.expand_dims(r, axes), np.expand_dims(d, axes)
    state = tracked(normalizer, state, *(np.squeeze(m, axes) for m in batch))
    if isinstance(normalizer, convert.EmaBatchNorm):
        # It normalizes with what it tracks, of which the batch is a part.
        sound = (batch[2] == 0) | np.isfinite(batch[0]) & np.isfinite(batch[1])
        after = (np.expand_dims(state[name], axes) for name in ("mean", "var"))
        parts = [(*(np.where(sound, m, np.nan) for m in after), batch[2])]
    if adjustment is not None:
        s, o = (np.expand_dims(np.asarray(a, np.float64), axes) for a in adjustment)
        r, d = r * s, d * s + o
    y = np.empty_like(x)
    for rows, (mean, var, total) in zip(groups, parts, strict=True):
        mean, var = (
            np.where(total > 0, new, wide[name])
            for name, new in (("mean", mean), ("var", var))
        )
        y[rows] = affine(bn, params, x[rows], mean, var, axes, r, d)
    return y, state


def by_domain(placed, params, state, x, training, weights, held):
    """Returns `(y, state)` of a bank: in each domain, the rows of others weigh nothing."""
    layer, ids = placed.inner, np.resize(placed.ids, len(x))
    axes = reduced(x, settings(placed).feature_axes)
    weights = np.ones(x.shape) if weights is None else align(weights, x, axes)
    y, states = np.full_like(x, np.nan), []
    for domain in range(layer.num_domains):

        def own(bank, domain=domain):
            return {name: None if a is None else a[domain] for name, a in bank.items()}

        mine = align(ids == domain, x, axes)
        held_own = None if held is None else (held[0], own(held[1]))
        own_params = own(params) if layer.affine == "separate" else params
        arrays = own_params, own(state), x, training, weights * mine, held_own
        result, after = apply(layer.bn, *arrays)
        y = np.where(mine > 0, result, y)
        states.append(after)
    stacked = {
        name: None if a is None else np.stack([after[name] for after in states])
        for name, a in states[0].items()
    }
    return y, stacked


def core(normalizer):
    if hasattr(normalizer, "ids"):
        return core(normalizer.inner.bn)
    return normalizer.inner if isinstance(normalizer, jaxbn.GhostBatchNorm) else normalizer


def ghosts(normalizer, rows):
    """Returns the indices of the rows of each ghost batch."""
    if not isinstance(normalizer, jaxbn.GhostBatchNorm) or not rows:
        return [np.arange(rows)]
    size = normalizer.virtual_batch_size
    count = rows // size
    if normalizer.layout == "strided":
        return [np.arange(j, rows, count) for j in range(count)]
    return [np.arange(j * size, (j + 1) * size) for j in range(count)]


def merge(normalizer, parts):
    """Returns the moments to track, given those of the ghost batches."""
    mean, var, total = (np.stack(field) for field in zip(*parts, strict=True))
    if getattr(normalizer, "tracking", "pooled") == "averaged":
        used = total > 0
        count = np.maximum(used.sum(0), 1)
        return tuple((field * used).sum(0) / count for field in (mean, var, total))
    whole = total.sum(0)
    safe = np.where(whole > 0, whole, 1)
    pooled = (total * mean).sum(0) / safe
    return pooled, (total * (var + np.abs(mean - pooled) ** 2)).sum(0) / safe, whole


def correction(layer, state, batch):
    """Returns r and d of batch renormalization (algorithm 1 of the paper)."""
    mean, var, total = (np.squeeze(m).reshape(state["mean"].shape) for m in batch)
    floor = np.sqrt(layer.bn.epsilon)
    scale = np.maximum(state["renorm_std"], floor)
    r = np.clip(np.sqrt(var + layer.bn.epsilon) / scale, *layer.limits[:2])
    d = np.clip(
        (mean - state["renorm_mean"]) / scale, -layer.limits.d_max, layer.limits.d_max
    )
    return np.where(total > 0, r, 1), np.where(total > 0, d, 0)


def tracked(normalizer, state, mean, var, total):
    """Returns the running statistics of any normalizer after a batch of these moments."""
    layer = core(normalizer)
    if isinstance(layer, jaxbn.BatchRenorm):
        return track_renorm(layer, state, mean, var, total)
    if isinstance(layer, convert.EmaBatchNorm):
        return track_ema(layer.bn, state, mean, var, total)
    return track(layer, state, mean, var, total)


def track_ema(bn, state, mean, var, total):
    """Returns a plain average that the first batch starts: Equinox's older mode."""
    plain = track(bn, {**state, "weight": None}, mean, var, total)
    with np.errstate(invalid="ignore"):
        first = track(
            dataclasses.replace(bn, momentum=0.0),
            {**state, "weight": None},
            mean,
            var,
            total,
        )
    started = state["weight"] > 0
    after = {n: np.where(started, plain[n], first[n]) for n in ("mean", "var")}
    sound = (total > 0) & np.isfinite(mean) & np.isfinite(var)
    return {**after, "weight": np.where(sound, 1.0, state["weight"])}


def track_renorm(layer, state, mean, var, total):
    """Returns the running statistics of batch renormalization after a batch."""
    std = np.sqrt(var + layer.bn.epsilon)
    sound = (total > 0) & np.isfinite(mean) & np.isfinite(std)

    def average(name, new, momentum):
        return np.where(sound, momentum * state[name] + (1 - momentum) * new, state[name])

    after = {
        "mean": average("mean", mean, layer.bn.momentum),
        "std": average("std", std, layer.bn.momentum),
        "renorm_mean": average("renorm_mean", mean, layer.momentum),
        "renorm_std": average("renorm_std", std, layer.momentum),
    }
    var = np.maximum(after["std"] ** 2 - layer.bn.epsilon, 0)
    return {**after, "var": np.where(sound, var, state["var"])}


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


def affine(bn, params, x, mean, var, axes, r: Any = 1.0, d: Any = 0.0):
    y = (x - mean) / np.sqrt(var + bn.epsilon) * r + d
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
        some = new_weight > 0
        keep = np.where(some, bn.momentum * weight / np.where(some, new_weight, 1), 1)
    else:
        new_weight, keep = None, bn.momentum

    def average(old, new):
        return np.where(sound, keep * old + (1 - keep) * np.where(sound, new, 0), old)

    return {
        "mean": average(state["mean"], mean),
        "var": average(state["var"], var),
        "weight": None if weight is None else np.where(sound, new_weight, weight),
    }


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
