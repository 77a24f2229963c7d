"""One device and arrays of real sizes: every formulation for CPUs equals float64 NumPy.

How sums are made on a CPU depends on the bytes of x, its dtype and its layout, and on
there being one device, while the other tests run with eight and with small arrays. So
`python -m tests.laws.test_real_sizes` is a process of its own.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn

KIB, MIB = 1 << 10, 1 << 20
FEATURES = 24
MOMENTUM, EPSILON = 0.9, 1e-5
# Errors relative to the largest value. Rounding to half precision is within its own. Older
# XLA adds up the tiles in another order: 1.2e-6 of a gradient, seen on JAX 0.7.2.
ROUNDING = {
    "float32": 1e-6 if jax.__version_info__ >= (0, 10) else 2e-6,
    "float16": 1e-3,
    "bfloat16": 6e-3,
}
SUMMED = 4e-6


class Case(NamedTuple):
    """One layer: x has about so many bytes, and `offset` is mean / standard deviation."""

    dtype: str
    size: int
    features_last: bool
    activation: str | None = None
    residual: bool = False
    offset: float = 0.5

    def shape(self):
        """Returns a shape whose number of rows is a prime, so that tiles leave a rest."""
        count = self.size // jnp.dtype(self.dtype).itemsize // FEATURES
        rows, image = (7, (5, 3)) if self.size < MIB else (67, (18, 16))
        height = max(count // rows // image[1], 1)
        image = (height, image[1])
        return (rows, *image, FEATURES) if self.features_last else (rows, FEATURES, *image)


# Below and above 64 KiB, 6 MiB (where the backward pass has other sums, but in float16) and
# 40 MiB (where the forward pass has).
SIZES = {
    "float32": (40 * KIB, 300 * KIB, 7 * MIB, 42 * MIB),
    "bfloat16": (40 * KIB, 300 * KIB, 7 * MIB),
    "float16": (40 * KIB, 300 * KIB, 2 * MIB),
}
KINDS = ((None, False), ("relu", False), ("relu", True))
CASES = [
    Case(dtype, size, last, *kind)
    for dtype, sizes in SIZES.items()
    for size, last, kind in itertools.product(sizes, (True, False), KINDS)
    # The largest would take minutes in every layout: the forward pass does not see a ReLU.
    # The smallest has the formulation that all other tests have.
    if 64 * KIB < size < 40 * MIB
    or kind == (None, False)
    or (last and kind == ("relu", True))
]
# A mean at which E[x^2] - E[x]^2 has lost digits, so that x is read again.
CASES += [Case("float32", size, last, offset=9.0) for size in SIZES["float32"]
          for last in (True, False) if size < 40 * MIB]  # fmt: skip


def draw(case, rng):
    """Returns x, the cotangent and the residual or None, in the dtype of the case."""
    shape = case.shape()

    def normal():
        return rng.standard_normal(shape, np.float32)

    spread = np.linspace(0.5, 2.0, FEATURES, dtype=np.float32)
    spread = spread if case.features_last else spread[:, None, None]
    x = (normal() + case.offset) * spread
    arrays = x, normal(), normal() if case.residual else None
    return tuple(None if a is None else a.astype(jnp.dtype(case.dtype)) for a in arrays)


def truth(case, params, x, dy, residual):
    """Returns all results in float64, and the cotangent, 0 where a ReLU is undecided."""
    axes = (0, 1, 2) if case.features_last else (0, 2, 3)
    scale, bias = (np.expand_dims(np.float64(p), axes) for p in params)
    centered = x.astype(np.float64)
    mean = centered.mean(axes, keepdims=True)
    centered -= mean
    var = np.square(centered).mean(axes, keepdims=True)
    inverse = 1 / np.sqrt(var + EPSILON)
    normalized = centered * inverse
    y = normalized * scale + bias
    if residual is not None:
        y += residual
    if case.activation is not None:
        dy = np.where(np.abs(y) < 1e-4, 0, dy).astype(dy.dtype)
    d = dy.astype(np.float64)
    if case.activation is not None:
        d *= y > 0
        np.maximum(y, 0, out=y)
    by_bias = d.mean(axes, keepdims=True)
    by_scale = (d * normalized).mean(axes, keepdims=True)
    by_x = scale * inverse * (d - by_bias - normalized * by_scale)
    count = x.size // FEATURES
    want = {
        "y": y,
        "gradient of x": by_x,
        "gradient of scale": by_scale.ravel() * count,
        "gradient of bias": by_bias.ravel() * count,
        "mean": (1 - MOMENTUM) * mean.ravel(),
        "var": MOMENTUM + (1 - MOMENTUM) * var.ravel(),
    }
    if residual is not None:
        want["gradient of residual"] = d
    return want, dy


def measure(case):
    """Returns the error of every result, relative to its largest value."""
    bn = jaxbn.BatchNorm(
        feature_axes=-1 if case.features_last else 1,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        activation=jax.nn.relu if case.activation else None,
    )
    params, state = bn.init(FEATURES)
    params = params._replace(
        scale=jnp.linspace(0.5, 1.5, FEATURES), bias=jnp.linspace(-1.0, 1.0, FEATURES)
    )
    x, dy, residual = draw(case, np.random.default_rng(0))
    want, dy = truth(case, params, x, dy, residual)

    @jax.jit
    def step(params, state, x, dy, residual):
        def forward(params, x, residual):
            return bn.apply(params, state, x, True, residual=residual)

        y, backward, after = jax.vjp(forward, params, x, residual, has_aux=True)
        return y, after, backward(dy)

    y, after, gradients = step(params, state, x, dy, residual)
    by_params, by_x, by_residual = gradients
    got = {
        "y": y,
        "gradient of x": by_x,
        "gradient of scale": by_params.scale,
        "gradient of bias": by_params.bias,
        "mean": after.mean,
        "var": after.var,
        "gradient of residual": by_residual,
    }
    return {
        name: float(np.abs(np.asarray(got[name], np.float64) - value).max())
        / float(np.abs(value).max())
        for name, value in want.items()
    }


def test_every_formulation_equals_float64():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.laws.test_real_sizes"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(CASES)
    wrong = []
    for case, errors in zip(CASES, lines, strict=True):
        rounding = ROUNDING[case.dtype]
        for name, error in errors.items():
            large = name in ("y", "gradient of x", "gradient of residual")
            if not error <= (rounding if large else SUMMED):
                wrong.append(f"{case}: {name} is wrong by {error:.2g}")
    assert not wrong, "\n".join(wrong)


def main():
    assert jax.device_count() == 1
    for case in CASES:
        print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
