"""Runs the cases that were recorded from Keras 3, through jaxbn.convert."""

import jax.numpy as jnp
import numpy as np

from jaxbn import convert
from tests.golden_runners.convert import run_layer
from tests.golden_runners.tf1_arguments import encoded

SETTINGS = {"axis", "momentum", "epsilon", "renorm_momentum", "renorm_clipping"}
# What was drawn is in the recorded state. One device is synchronized with itself.
WITHOUT_EFFECT = {"beta_initializer", "gamma_initializer", "moving_mean_initializer"}
WITHOUT_EFFECT |= {"moving_variance_initializer", "name", "synchronized"}
FLAGS = {"center", "scale", "renorm", "dtype", "trainable"}
NAMES = {"scale": "gamma", "bias": "beta"}
KINDS = {
    f"{name}_{what}" for name in ("beta", "gamma") for what in ("regularizer", "constraint")
}
WORDS = {
    "l1": {"l1": 0.01},
    "l2": {"l2": 0.01},
    "l1_l2": {"l1": 0.01, "l2": 0.01},
    "non_neg": {"constraint": "non_neg"},
    "unit_norm": {"constraint": "unit_norm"},
    "max_norm": {"constraint": "max_norm", "max_value": 2.0},
}


def run(case):
    """Runs every step of a case; what is not known is an error."""
    known = SETTINGS | WITHOUT_EFFECT | FLAGS | KINDS
    assert set(case.kwargs) <= known, set(case.kwargs) - known
    settings = {name: v for name, v in case.kwargs.items() if name in SETTINGS}
    policy = case.kwargs.get("dtype", case.meta.get("layer_dtype", "float32"))

    def read(arrays):
        # A policy such as mixed_bfloat16 computes in that dtype with float32 variables.
        layer = convert.from_keras(arrays, dtype=policy.removeprefix("mixed_"), **settings)
        bn = getattr(layer.bn, "bn", layer.bn)
        assert bn.use_bias == case.kwargs.get("center", True)
        assert bn.use_scale == case.kwargs.get("scale", True)
        assert (bn is not layer.bn) == case.kwargs.get("renorm", False)
        return layer

    def rounding(x, step):
        """Keras adds x times a slope to an offset: the mean cancels between them."""
        if not step["training"] or "mask" in step:
            return 0.0
        axes = tuple(np.delete(range(x.ndim), case.kwargs.get("axis", -1)))
        var = x.astype(np.float64).var(axes).min()
        return np.abs(x).max() / np.sqrt(var + case.kwargs.get("epsilon", 1e-3))

    options = {"rounding": rounding}
    frozen = not case.kwargs.get("trainable", case.meta.get("trainable", True))
    if frozen:
        # A frozen layer runs inference whatever the call says, and has no penalty.
        options["training"] = lambda step: False
    penalties = of_kind(case, "regularizer")
    if penalties and not frozen:
        options["penalty"] = lambda params: total(penalties, params)
    constraints = of_kind(case, "constraint")
    if constraints:
        options["project"] = lambda params: params._replace(
            **{
                name: function(getattr(params, name))
                for name, function in constraints.items()
            }
        )
    run_layer(case, read, convert.to_keras, NAMES, **options)


def of_kind(case, kind):
    """Returns the regularizers, or the constraints, of the params that the layer has."""
    has = {"scale": case.kwargs.get("scale", True), "bias": case.kwargs.get("center", True)}
    found = {name: case.kwargs.get(f"{NAMES[name]}_{kind}") for name in NAMES if has[name]}
    return {name: decoded(value) for name, value in found.items() if value is not None}


def decoded(value):
    """Returns the function of an argument: a word, a dict of numbers, or a named one."""
    if isinstance(value, str):
        value = WORDS[value]
    if value.keys() <= {"reg", "l", "l1", "l2"}:
        given = {name: number for name, number in value.items() if name != "reg"}
        if "l" in given:
            given = {value["reg"].removeprefix("keras_"): given["l"]}
        return penalty(**given)
    if len(value) == 1:
        # Such as {"max_norm": 1.0} and {"min_max_norm": {"min_value": 0.5}}.
        ((word, given),) = value.items()
        given = given if isinstance(given, dict) else {"max_value": given}
        if word in WORDS or word == "min_max_norm":
            return encoded({"constraint": word, **given})
    return encoded(value)


def penalty(l1=0.0, l2=0.0):
    """Returns Keras' regularizer on JAX, whose gradient of |w| at 0 is 1."""
    return lambda w: l1 * jnp.abs(w).sum() + l2 * jnp.square(w).sum()


def total(penalties, params):
    return sum(function(getattr(params, name)) for name, function in penalties.items())
