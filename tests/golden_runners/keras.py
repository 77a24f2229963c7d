"""Runs the cases that were recorded from Keras 3, through jaxbn.convert."""

import jax.numpy as jnp

from jaxbn import convert
from tests.golden_runners.convert import run_layer

SETTINGS = {"axis", "momentum", "epsilon", "renorm_momentum", "renorm_clipping"}
INITIALIZERS = {f"{name}_initializer" for name in ("beta", "gamma")}
INITIALIZERS |= {"moving_mean_initializer", "moving_variance_initializer"}
FLAGS = {"center", "scale", "renorm"}
REGULAR = {"beta_constraint", "gamma_constraint", "gamma_regularizer"}
NAMES = {"scale": "gamma", "bias": "beta"}


def run(case):
    """Runs every step of a case; what is not known is an error."""
    assert set(case.kwargs) <= SETTINGS | INITIALIZERS | FLAGS | REGULAR, case.kwargs
    settings = {name: v for name, v in case.kwargs.items() if name in SETTINGS}

    def read(arrays):
        layer = convert.from_keras(arrays, dtype=case.meta["layer_dtype"], **settings)
        bn = getattr(layer.bn, "bn", layer.bn)
        assert bn.use_bias == case.kwargs.get("center", True)
        assert (bn is not layer.bn) == case.kwargs.get("renorm", False)
        return layer

    options = {}
    if not case.meta["trainable"]:
        # A frozen layer runs inference whatever the call says.
        options["training"] = lambda step: False
    if "gamma_regularizer" in case.kwargs:
        factor = case.kwargs["gamma_regularizer"]["l2"]
        options["penalty"] = lambda params: factor * (params.scale**2).sum()
    if REGULAR & set(case.kwargs):
        options["project"] = lambda params: project(case, params)
    run_layer(case, read, convert.to_keras, NAMES, **options)


def project(case, params):
    """Returns the params after the constraints of the layer."""
    scale, bias = params
    if "gamma_constraint" in case.kwargs:
        limit = case.kwargs["gamma_constraint"]["max_norm"]
        norm = jnp.sqrt((scale**2).sum())
        scale = scale * (jnp.clip(norm, 0, limit) / (1e-7 + norm))
    if "beta_constraint" in case.kwargs:
        assert case.kwargs["beta_constraint"] == "non_neg"
        bias = jnp.maximum(bias, 0)
    return params._replace(scale=scale, bias=bias)
