"""Runs the cases that were recorded from Equinox, through jaxbn.convert."""

import functools

import numpy as np

from jaxbn import convert
from tests.golden_runners.case import assert_near
from tests.golden_runners.convert import run_layer

KNOWN = {"mode", "momentum", "eps", "channelwise_affine"}
# Said by every step, by the arrays, or of no effect on one device.
WITHOUT_EFFECT = {"inference", "dtype", "axis_name", "input_size"}
NAMES = {"scale": "weight", "bias": "bias"}


def run(case):
    """Runs every step of a case; what is not known is an error.

    With `mode="batch"`, the state as it was intended goes on from the beginning, and the
    state as Equinox uses it from the first batch on; only their inference differs.
    """
    assert set(case.kwargs) <= KNOWN | WITHOUT_EFFECT, case.kwargs
    if case.kwargs.get("mode", "legacy") != "batch":
        # Before the first batch, inference reads memory that nothing was written to.
        written = {
            id(step): step["training"] or not case[step["state_after"]["first_time"]]
            for step in case.steps
        }
        compares = lambda step: written[id(step)]
        return run_layer(case, reader(case), write, NAMES, compares=compares)
    trained = [index for index, step in enumerate(case.steps) if step["training"]]
    first = min(trained, default=len(case.steps))
    run_layer(case, reader(case), write, NAMES, end=first)
    if trained:
        run_layer(case, reader(case), write, NAMES, start=first + 1)
    intended = functools.partial(write, variance="intended")
    compares = lambda step: step["training"]
    run_layer(case, reader(case, "intended"), intended, NAMES, compares=compares)
    check_intended(case)


def reader(case, variance="used"):
    momentum, eps = case.kwargs.get("momentum", 0.99), case.kwargs.get("eps", 1e-5)
    affine = case.kwargs.get("channelwise_affine", True)

    def read(arrays):
        assert {"weight", "bias"} & arrays.keys() == (
            {"weight", "bias"} if affine else set()
        )
        if arrays.get("first_time"):
            # The buffers hold nothing yet, and were not recorded.
            empty = np.full(case.meta["shape"][1], np.nan, np.float32)
            arrays = {**arrays, "running_mean": empty, "running_var": empty}
        layer = convert.from_equinox(arrays, momentum=momentum, eps=eps, variance=variance)
        assert layer.bn.init(2)[0]._fields == layer.params._fields
        return layer

    return read


def write(layer, variance="used"):
    arrays = convert.to_equinox(layer, variance=variance)
    if arrays.get("first_time"):
        del arrays["running_mean"], arrays["running_var"]
    return arrays


def check_intended(case):
    """The variance without what Equinox adds is the debiased average of the batches'."""
    momentum = case.kwargs.get("momentum", 0.99)
    average, seen = 0.0, 0.0
    for step in case.steps:
        arrays = {name: case[key] for name, key in step["state_after"].items()}
        if step["training"]:
            x = case[step["x"]].astype(np.float64)
            var = x.var((0, *range(2, x.ndim)))
            average = momentum * average + (1 - momentum) * var
            seen = momentum * seen + 1 - momentum
        if not seen:
            continue
        layer = reader(case, "intended")(arrays)
        # What is left of the 1 that it started at was rounded together with it.
        tolerance = case.tolerance / seen
        assert_near(layer.state.var, average / seen, tolerance, "intended variance")
