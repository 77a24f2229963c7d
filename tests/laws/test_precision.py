"""How many digits y and the gradients keep, far from 0: nearly all that float32 has.

The truth is float64 NumPy on the x that float32 holds, and an error is relative to the
largest value of an array. A mean that was only rounded would already be too far off.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.laws.styles import DEVICES, STYLES, flat, value_and_gradients

OPTIMIZED = True
GOALS = {"y": 6e-7, "x": 1e-6, "scale": 2e-5, "bias": 2e-5}
RATIOS = (1.0, 1e2, 1e3, 1e4, 1e5)  # |mean| / standard deviation
STD = np.array([0.5, 1.0, 1.5, 2.0])
SIGNS = np.array([1.0, -1.0, 1.0, 1.0])
SCALE, BIAS = np.linspace(0.5, 1.5, 4), np.linspace(-1.0, 1.0, 4)
EPSILON = 1e-5

BN = jaxbn.BatchNorm(epsilon=EPSILON)
LIMITS = jaxbn.RenormLimits(0.5, 2.0, 3.0)
RENORM = jaxbn.BatchRenorm(BN, limits=LIMITS)
# How many ghost batches the rows of a device, or all rows of a plain program, make.
GHOSTS = 4
LAYERS = {
    "plain": lambda rows: BN,
    "weights": lambda rows: BN,
    "ghosts": lambda rows: jaxbn.GhostBatchNorm(BN, rows // GHOSTS),
    "gather": lambda rows: jaxbn.Gather(BN),
    "renorm": lambda rows: RENORM,
    "ghosts_renorm_weights": lambda rows: jaxbn.GhostBatchNorm(
        RENORM, rows // GHOSTS, layout="strided", tracking="averaged"
    ),
}
# Each place with its style, or None for one device, and the rows for each device. Arrays
# below and above 64 KiB are summed in different ways.
PLACES = {
    "one_device_small": (None, 40),
    "one_device": (None, 6000),
    "pmap_small": ("pmap", 40),
    "pmap": ("pmap", 6000),
    "shard_map": ("shard_map", 6000),
    "auto_jit": ("auto_jit", 6000),
}


def program_of(case, place):
    """Returns a program of arrays with leading axes of devices and rows, and its groups.

    Groups are the indices of the rows, devices joined, that share their statistics.
    """
    style, rows = PLACES[place]
    make, devices = (None, 1) if style is None else STYLES[style]
    size = rows * DEVICES // devices
    layer, groups = LAYERS[case](size), np.zeros(size, int)
    if isinstance(layer, jaxbn.GhostBatchNorm):
        strided = layer.layout == "strided"
        groups = (
            np.arange(size) % GHOSTS if strided else np.arange(size) // (size // GHOSTS)
        )
    groups = np.tile(groups, devices)

    @jax.jit
    def on_one_device(params, state, *batch):
        y, after, by_params, by_x = value_and_gradients(layer, params, state, *flat(batch))
        shape = batch[0].shape
        return y.reshape(shape), after, by_params, by_x.reshape(shape)

    return layer, on_one_device if make is None else make(layer), groups


def draw(ratio, rows, weighted):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(DEVICES, rows, 4)) + ratio * SIGNS
    x = (x * STD).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], x.shape[:2]).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(weights) if weighted else None, jnp.asarray(dy)


def start(layer, ratio):
    """Returns params, and a state that renormalization corrects by about a third."""
    params, state = layer.init(4)
    params = params._replace(
        scale=jnp.asarray(SCALE, jnp.float32), bias=jnp.asarray(BIAS, jnp.float32)
    )
    if isinstance(layer, jaxbn.Gather):
        return params, jaxbn.gather(state)
    if hasattr(state, "renorm_mean"):
        mean, std = STD * (ratio * SIGNS + 0.3), STD * 1.2
        state = state._replace(
            renorm_mean=jnp.asarray(mean, jnp.float32),
            renorm_std=jnp.asarray(std, jnp.float32),
        )
    return params, state


def truth(params, state, x, weights, dy, groups):
    """Returns y and the gradients of sum(y dy), in float64; arrays of rows and features."""
    scale, bias = (np.asarray(p, np.float64) for p in params)
    x, dy = (np.asarray(a, np.float64).reshape(-1, 4) for a in (x, dy))
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    weights = weights.reshape(-1, 1)
    parts = [groups == group for group in np.unique(groups)]
    totals, means, variances = (np.zeros((len(parts), 4)) for _ in range(3))
    for i, rows in enumerate(parts):
        w = weights[rows]
        totals[i] = w.sum()
        means[i] = (w * x[rows]).sum(0) / w.sum()
        variances[i] = (w * (x[rows] - means[i]) ** 2).sum(0) / w.sum()
    r, d = np.ones(4), np.zeros(4)
    if hasattr(state, "renorm_mean"):
        # One group is pooled as well as averaged.
        std = np.sqrt(variances.mean(0) + EPSILON)
        known = np.maximum(np.asarray(state.renorm_std, np.float64), np.sqrt(EPSILON))
        away = means.mean(0) - np.asarray(state.renorm_mean, np.float64)
        r, d = np.clip(std / known, *LIMITS[:2]), away / known
        d = np.clip(d, -LIMITS.d_max, LIMITS.d_max)
    normalized, by_x = np.empty_like(x), np.empty_like(x)
    for rows, mean, var, total in zip(parts, means, variances, totals, strict=True):
        inverse = 1 / np.sqrt(var + EPSILON)
        normalized[rows] = (x[rows] - mean) * inverse
        share, g, n = weights[rows] / total, dy[rows] * scale * r, normalized[rows]
        by_x[rows] = inverse * (g - share * (g.sum(0) + n * (g * n).sum(0)))
    corrected = normalized * r + d
    return {
        "y": corrected * scale + bias,
        "x": by_x,
        "scale": (dy * corrected).sum(0),
        "bias": dy.sum(0),
    }


def errors(made, case, place, ratio):
    layer, program, groups = made
    params, state = start(layer, ratio)
    batch = draw(ratio, PLACES[place][1], "weights" in case)
    y, _, by_params, by_x = program(params, state, *batch)
    got = {"y": y, "x": by_x, "scale": by_params.scale, "bias": by_params.bias}
    want = truth(params, state, *batch, groups)
    return {
        name: float(
            np.abs(np.asarray(got[name], np.float64).reshape(value.shape) - value).max()
            / np.abs(value).max()
        )
        for name, value in want.items()
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", LAYERS)
def test_y_and_gradients_keep_their_digits(case, place):
    program = program_of(case, place)
    for ratio in RATIOS:
        for name, error in errors(program, case, place, ratio).items():
            what = "y" if name == "y" else f"the gradient of {name}"
            assert error <= GOALS[name], f"{what} is wrong by {error:.2g} at {ratio:g}"
