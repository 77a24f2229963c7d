"""What is drawn: a normalizer, inputs of all kinds, and perhaps one mistake in them.

Everything is drawn from small sets, so that many draws share what was compiled.
"""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxbn
from jaxbn import convert
from tests.laws import oracle
from tests.laws.mistakes import MISTAKES, STEPS, possible

DEVICES = 2


def leaky(x):
    return jnp.where(x > 0, x, 0.25 * x)


def gelu(y):
    return y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


# Each activation with what it is in NumPy.
ACTIVATIONS = {
    None: lambda y: y,
    jax.nn.relu: lambda y: np.where(y < 0, 0, y),
    jnp.tanh: np.tanh,
    jax.nn.gelu: gelu,
    leaky: lambda y: np.where(y > 0, y, 0.25 * y),
}
# Shapes of x by where its features are; 4 rows or 8 divide into ghost batches of 2 and 4.
SHAPES = {
    -1: [(4, 2), (8, 3), (4, 3, 2), (1, 4), (0, 2), (8, 2, 2, 2)],
    1: [(4, 3, 2), (8, 2, 2, 2), (0, 2, 3)],
    (-1, 1): [(4, 3, 2), (4, 2, 3, 2)],
    0: [(3, 4)],
    (-1, -2): [(4, 2, 2)],
}
NUMBERS = st.sampled_from([float, np.float32, np.float64, np.array, jnp.float32])
FLAGS = st.sampled_from([bool, np.bool_, np.array])
WHOLE = st.sampled_from([int, np.int64, np.array])
DTYPES = "float32", "bfloat16", "float16", "float64"
DATA = (
    "normal", "normal", "constant", "far", "tiny", "large", "hidden", "unsound", "overflow",
)  # fmt: skip
WEIGHTS = None, "rows", "mask", "full", "positions", "zeros"


@dataclasses.dataclass
class Draw:
    """One configuration, and the inputs of some steps of it."""

    wrap: str
    settings: dict[str, Any]  # of the BatchNorm at the heart
    around: dict[str, Any]  # of what is around it
    training: Any
    xs: np.ndarray
    weights: np.ndarray | None
    residual: np.ndarray | None
    options: dict[str, Any]  # further keywords of apply
    spread: tuple[bool, bool]  # rows, features
    wide: bool  # with float64
    features: tuple[int, ...]
    mistake: str | None = None

    def layer(self, **more: Any) -> Any:
        bn: Any = jaxbn.BatchNorm(**{**self.settings, **more})
        around = dict(self.around)
        ghosts = {n: around.pop(n) for n in GHOSTS if n in around}
        if self.wrap in ("renorm", "ghosts_renorm"):
            bn = jaxbn.BatchRenorm(bn, **around)
        if self.wrap == "ema":
            bn = convert.EmaBatchNorm(bn)
        return jaxbn.GhostBatchNorm(bn, **ghosts) if "ghosts" in self.wrap else bn


GHOSTS = "virtual_batch_size", "layout", "tracking"
WRAPS = "plain", "plain", "plain", "renorm", "ghosts", "ghosts_renorm", "ema"


@st.composite
def draws(draw, mode: str) -> Draw:
    over_devices = mode in ("pmap", "shard_map", "named_vmap")
    one_of = lambda *values: draw(st.sampled_from(values))
    wrap = one_of(*WRAPS)
    axes = one_of(
        -1, -1, 1, (-1, 1), (-1, -2), *([] if over_devices or "g" in wrap else [0])
    )
    shape = one_of(*SHAPES[axes])
    if over_devices:
        shape = (DEVICES * shape[0], *shape[1:])
    dtype, wrapped = one_of(*DTYPES), "renorm" in wrap or wrap == "ema"
    settings = {
        "feature_axes": one_of(*_spellings(axes)),
        "momentum": draw(NUMBERS)(one_of(0.5, 0.875)),
        "epsilon": draw(NUMBERS)(one_of(2.0**-10, 2.0**-17)),
        "use_scale": draw(FLAGS)(one_of(True, True, False)),
        "use_bias": draw(FLAGS)(one_of(True, True, False)),
        "activation": one_of(*ACTIVATIONS),
        "dtype": one_of(None, None, "float32", jnp.bfloat16),
        "param_dtype": one_of(
            "float32", np.float32, "float16", *["float64"] * (dtype == "float64")
        ),
    }
    if "renorm" not in wrap:
        settings["ddof"] = draw(WHOLE)(one_of(0, 1))
    if not wrapped:
        kind = one_of("plain", "debias", "cumulative")
        settings |= {"debias": {"debias": True}, "cumulative": {"momentum": None}}.get(
            kind, {}
        )
    if over_devices:
        settings["axis_name"] = "d"
    around: dict[str, Any] = {}
    if "renorm" in wrap:
        limits = jaxbn.RenormLimits(*draw(st.tuples(*map(st.sampled_from, _LIMITS))))
        around = {"momentum": draw(NUMBERS)(0.75), "limits": limits}
    if "ghosts" in wrap:
        size = one_of(
            *(
                s
                for s in (1, 2, 4)
                if shape[0] % (s * (DEVICES if over_devices else 1)) == 0
            )
        )
        around |= {
            "virtual_batch_size": draw(WHOLE)(size),
            "layout": one_of("contiguous", "strided"),
            "tracking": one_of("pooled", "averaged"),
        }
    data = one_of(*DATA)
    weights = "rows" if data == "hidden" else one_of(*WEIGHTS)
    xs, w = _inputs(draw(st.integers(0, 3)), shape, axes, dtype, data, weights)
    options = {}
    if one_of(*[False] * 3, True):
        options["momentum"] = draw(NUMBERS)(one_of(0.0, 0.25, 1.0))
    features = tuple(shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axes)))
    if wrap != "ema" and one_of(*[False] * 3, True):
        options["adjustment"] = (
            np.full(features, 1.5, "f"),
            np.linspace(-1, 1, features[0], dtype="f").reshape(
                -1, *[1] * (len(features) - 1)
            )
            + np.zeros(features, "f"),
        )
    residual = (
        np.cos(xs).astype(xs.dtype)
        if one_of(True, False, False) and data in ("normal", "tiny")
        else None
    )
    training = one_of(True, True, np.True_, "traced", False, "traced_inference")
    made = Draw(
        wrap,
        settings,
        around,
        training,
        xs,
        w,
        residual,
        options,
        (one_of(True, False), one_of(True, False)),
        dtype == "float64",
        features,
    )
    if draw(st.integers(0, 9)) < 3:
        mistake = draw(st.sampled_from(possible(mode)))
        if mistake == "unknown_axis":
            made.training = True  # in inference the axis is not looked for
        made.mistake = mistake if MISTAKES[mistake](made) else None
    return made


_LIMITS = (0.5, 1.0), (1.0, 2.0, np.inf), (0.0, 0.5, np.inf)


def _spellings(axes):
    if isinstance(axes, tuple):
        return axes, list(axes), tuple(map(np.int64, axes))
    return axes, np.int64(axes), (axes,)


def _inputs(seed, shape, axes, dtype, data, weights):
    rng = np.random.default_rng(seed)
    kept = oracle.reduced(np.zeros(shape), axes)
    features = tuple(1 if a in kept else n for a, n in enumerate(shape))
    x = rng.normal(size=(STEPS, *shape))
    center = rng.normal(size=features)
    big = {"float16": 1e4, "float64": 1e30}.get(dtype, 1e10)
    x = {
        "constant": 0 * x + center * 3,
        "far": x + 1e4 * (1 + np.abs(center)) if dtype != "float16" else x + 900 * center,
        "tiny": 1e-6 * x,
        "large": big * x,
        "overflow": {"float16": 6e4, "float64": 1e200}.get(dtype, 1e25) * np.sign(x),
    }.get(data, 2 * x + 3 * center)
    x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    reduced = tuple(shape[a] for a in kept)
    of = {
        "rows": reduced[:1],
        "mask": reduced[:1],
        "zeros": reduced[:1],
        "full": shape,
        "positions": reduced,
    }.get(weights or "")
    w: Any = (
        None if of is None else rng.choice([0.0, 0.5, 1.0, 3.0], (STEPS, *of)).astype("f")
    )
    if weights == "mask":
        w = w > 0
    if weights == "zeros":
        w = 0 * w
    if data in ("hidden", "unsound") and x.size:
        for step in range(STEPS):
            where = np.zeros(shape, bool)
            where.reshape(-1)[:: 1 + seed] = True
            if data == "hidden":
                where &= oracle.align(w[step], x[step], kept) == 0
            else:
                # One bad element of one feature.
                where[:] = False
                where.reshape(-1)[seed % where.size] = True
            x[step][where] = (np.nan, np.inf, -np.inf)[seed % 3]
    return x, w
