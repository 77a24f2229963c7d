"""Runs the cases that were recorded from Haiku, through jaxbn.convert."""

import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import convert
from tests.golden_runners.convert import near, run_layer

KNOWN = {"create_scale", "create_offset", "decay_rate", "eps", "axis", "data_format"}
# What was drawn is in the recorded state. One device is synchronized with itself.
WITHOUT_EFFECT = {"scale_init", "offset_init", "name", "cross_replica_axis"}
WITHOUT_EFFECT |= {"cross_replica_axis_index_groups"}
NAMES = {"scale": "scale", "bias": "offset"}


def run(case):
    """Runs every step of a case; what is not known is an error."""
    if case.meta["api"] == "haiku.ExponentialMovingAverage":
        return run_average(case)
    assert set(case.kwargs) <= KNOWN | WITHOUT_EFFECT, case.kwargs
    flags = {"create_scale", "create_offset"} | WITHOUT_EFFECT
    settings = {name: v for name, v in case.kwargs.items() if name not in flags}

    def read(arrays):
        layer = convert.from_haiku(in_trees(arrays), "bn", **settings)
        assert layer.bn.use_scale == case.kwargs["create_scale"]
        assert layer.bn.use_bias == case.kwargs["create_offset"]
        return layer

    local = case.meta["test_local_stats"]
    training = lambda step: step["training"] or local
    run_layer(case, read, write, NAMES, training=training)


def in_trees(arrays):
    """Returns recorded arrays as Haiku keeps them; the records leave out `~`."""
    params = {name: array for name, array in arrays.items() if "/" not in name}
    state = {}
    for name, array in arrays.items():
        if "/" in name:
            average, leaf = name.split("/")
            state.setdefault(f"bn/~/{average}", {})[leaf] = array
    return {"params": {"bn": params} if params else {}, "state": state}


def write(layer):
    trees = convert.to_haiku(layer, "bn")
    state = {
        f"{module.removeprefix('bn/~/')}/{leaf}": array
        for module, arrays in trees["state"].items()
        for leaf, array in arrays.items()
    }
    return {**trees["params"].get("bn", {}), **state}


def run_average(case):
    """An average of any values is a `jaxbn.Ema`; a warm-up is a decay of 0."""
    assert set(case.kwargs) <= {"decay", "zero_debias", "warmup_length", "name"}, (
        case.kwargs
    )
    decay, debias = case.kwargs["decay"], case.kwargs.get("zero_debias", True)
    warmup = case.kwargs.get("warmup_length", 0)
    ema = jaxbn.Ema(decay, debias=debias)
    state = ema.init(jnp.asarray(case[case.meta["init_state"]["average"]]))
    for count, step in enumerate(case.steps, start=1):
        assert step["op"] == "ema_update"
        value = jnp.asarray(case[step["value"]])
        state = ema.update(state, value, decay=0.0 if count <= warmup else decay)
        weight = 1.0 if state.weight is None else state.weight
        after = step["state_after"]
        near(case, ema.value(state), step["returned"], "average")
        near(case, ema.value(state) * weight, after["hidden"], "hidden")
        np.testing.assert_array_equal(count - warmup, case[after["counter"]])
