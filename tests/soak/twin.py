"""The same training in float64 NumPy, by one process that nobody interrupts."""

import numpy as np

from tests.laws import oracle
from tests.soak.plan import LAYERS, Plan


def train(plan: Plan) -> dict[str, np.ndarray]:
    """Returns the arrays of all layers after the last step."""
    layers = []
    for _ in range(LAYERS):
        params, state = plan.layer.init(plan.features)
        layers.append([oracle.tree(params), oracle.tree(state)])
    for step in range(plan.steps):
        x, weights, dy = plan.batch(step)
        x, dy = x.astype(np.float64), dy.astype(np.float64)
        for index, layer in enumerate(layers):
            params, state = layer
            bare = {"scale": None, "bias": None}
            normal, layer[1] = oracle.apply(plan.layer, bare, state, x, True, weights)
            y = normal * params["scale"] + params["bias"]
            gradients = {"scale": (dy[index] * normal).sum(0), "bias": dy[index].sum(0)}
            layer[0] = {
                name: value - plan.rate * gradients[name] / plan.rows
                for name, value in params.items()
            }
            x = np.tanh(y)
    return {
        f"{index}.{part}.{name}": array
        for index, pair in enumerate(layers)
        for part, values in zip(("params", "state"), pair, strict=True)
        for name, array in values.items()
        if array is not None
    }
