"""Runs the recorded cases of the articles' own programs, as `examples/tf1` has them."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_runners.tf1_arguments import ACTIVATIONS
from tests.golden_runners.tf1_checks import Traced, arrays, check, descend, known, near

EXAMPLES = Path(__file__).parents[2] / "examples" / "tf1"
SHADOWS = {"ema_mean": "mean", "ema_variance": "variance"}


@functools.cache
def example(name):
    """Returns a program of the examples, which are no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_handwritten(case):
    """Runs the layer of an article; a training pass updates its averages by itself."""
    assert case.meta["training"] == "placeholder"
    layer, before_activation = layers(case)

    def forward(training, params, state, x, dy):
        def apply(params, x):
            return layer(params, state, x, training=training)

        y, backward, updated = jax.vjp(apply, params, x, has_aux=True)
        by_params, by_x = backward(dy)
        plain, _ = before_activation(params, state, x, training=training)
        return y, {**by_params, "x": by_x}, updated, plain

    traced = Traced(forward, placeholder=True)
    params, state = split(arrays(case, case.meta["init_state"]))
    for index, step in enumerate(case.steps):
        known(step, "op", "training", "x", "dy", "y", "grads", "bn_output", "sgd",
              "state_after")  # fmt: skip
        assert step["op"] == ("train" if step["training"] else "infer"), step["op"]
        what = f"step {index}:"
        given = arrays(case, {name: step[name] for name in ("x", "dy")})
        y, gradients, state, plain = traced(
            step["training"], params, state, given["x"], given["dy"]
        )
        near(case, y, step["y"], f"{what} y")
        if "bn_output" in step:
            near(case, plain, step["bn_output"], f"{what} before the activation")
        # The gradients of what the mean takes away again cancel.
        total = np.abs(given["dy"]).sum()
        terms = dict.fromkeys(step["grads"], total)
        check(case, named(gradients), step["grads"], f"{what} gradient of", terms)
        if step["sgd"] is not None:
            sgd = {**step["sgd"], "params": [renamed(k) for k in step["sgd"]["params"]]}
            params = descend(params, {k: gradients[k] for k in params}, sgd)
        terms = dict.fromkeys(step["state_after"], max(1.0, 0.1 * total))
        check(case, named({**params, **state}), step["state_after"], f"{what} state", terms)
    traced.check()


def layers(case):
    """Returns the layer of a case, with its activation and without."""
    if case.meta["api"].endswith("003"):
        layer = functools.partial(example("handwritten_dropout").bn_layer, **case.kwargs)
        assert case.meta["conv"] is case.meta["activation"] is None
        return layer, layer
    conv = dict(case.meta["conv"])
    kernel = case[case.meta["init_state"]["conv_kernel"]]
    assert conv.pop("filters") == kernel.shape[-1]
    layer = functools.partial(
        example("handwritten_images").conv_layer, **conv, **case.kwargs
    )
    identity = lambda x: x
    activation = ACTIVATIONS[case.meta["activation"]] or identity
    return (
        functools.partial(layer, activation=activation),
        functools.partial(layer, activation=identity),
    )


def renamed(name):
    """Returns the name of a recorded variable in the examples."""
    return SHADOWS.get(name, name.removeprefix("conv_"))


def split(variables):
    state = {SHADOWS[name]: variables[name] for name in SHADOWS}
    params = {renamed(k): v for k, v in variables.items() if k not in SHADOWS}
    return params, state


def named(variables):
    """Returns variables of the examples under their recorded names."""
    names = {short: long for long, short in SHADOWS.items()}
    names |= {name: f"conv_{name}" for name in ("kernel", "bias")}
    return {names.get(name, name): value for name, value in variables.items()}


def run_network(case):
    """Runs the network of an article: a fed flag, cross entropy, gradient descent."""
    kwargs = dict(case.kwargs)
    lr, sizes = kwargs.pop("lr"), kwargs.pop("sizes")

    def forward(training, params, state, x, labels):
        def loss(params):
            logits, updated = example("dense_elu").network(
                params, state, x, training, **kwargs
            )
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -picked.mean(), (logits, updated)

        return jax.value_and_grad(loss, has_aux=True)(params)

    traced = Traced(forward, placeholder=True)
    params, state = nested(arrays(case, case.meta["init_state"]))
    assert params["hidden1"]["kernel"].shape == tuple(sizes[:2])
    for index, step in enumerate(case.steps):
        known(step, "op", "training", "x", "labels", "y", "loss", "state_after")
        assert step["op"] == ("net_train" if step["training"] else "net_infer"), step["op"]
        what = f"step {index}:"
        given = arrays(case, {name: step[name] for name in ("x", "labels")})
        (loss, (logits, state)), gradients = traced(
            step["training"], params, state, given["x"], given["labels"]
        )
        near(case, logits, step["y"], f"{what} logits")
        near(case, loss, step["loss"], f"{what} loss")
        if step["training"]:
            params = jax.tree.map(lambda p, g: p - lr * g, params, gradients)
        # A bias before a normalization has a gradient of 0, and of rounding alone here.
        terms = dict.fromkeys(step["state_after"], 1.0)
        got = {**flat(params), **flat(state)}
        check(case, got, step["state_after"], f"{what} state", terms)
    traced.check()


def nested(variables):
    """Returns params and state by layer, given names such as bn1.moving_mean."""
    params, state = {}, {}
    for name, value in variables.items():
        layer, variable = name.split(".")
        tree = state if variable.startswith("moving_") else params
        tree.setdefault(layer, {})[variable] = value
    return params, state


def flat(tree):
    return {f"{k}.{name}": v for k, layer in tree.items() for name, v in layer.items()}
