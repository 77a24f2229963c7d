"""What the runners of TensorFlow's cases share: arrays, comparisons, one step of SGD."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_runners.case import assert_near


class Traced:
    """A jitted function that tells how often it was traced, and for which shapes."""

    def __init__(self, function, placeholder):
        self.shapes = []

        def traced(training, *arguments):
            leaves = jax.tree.leaves(arguments)
            self.shapes.append([(np.shape(leaf), np.dtype(leaf)) for leaf in leaves])
            return function(training, *arguments)

        self._jitted = jax.jit(traced, static_argnums=() if placeholder else 0)

    def __call__(self, training, *arguments):
        return self._jitted(training, *arguments)

    def check(self, modes=1):
        """Asserts that a program was compiled once for each shape and constant mode."""
        for shapes in self.shapes:
            assert self.shapes.count(shapes) <= modes, f"traced again for {shapes}"


def array(case, key):
    """Returns a recorded array in the dtype that it had."""
    recorded = case[key]
    # Only bfloat16 is not recorded as itself.
    if case.meta["dtype"] == "bfloat16" and recorded.dtype == np.float32:
        return jnp.asarray(recorded).astype(jnp.bfloat16)
    return jnp.asarray(recorded)


def arrays(case, keys):
    """Returns recorded arrays of variables, which are never bfloat16 themselves."""
    return {name: jnp.asarray(case[key]) for name, key in keys.items()}


def check(case, got, keys, what, terms=None):
    """Compares a dict of arrays with the recorded ones, name by name."""
    assert set(got) == set(keys), f"{what}: {sorted(got)}, recorded {sorted(keys)}"
    for name, value in got.items():
        near(case, value, keys[name], f"{what} {name}", (terms or {}).get(name, 0.0))


def near(case, got, key, what, terms=0.0):
    """Compares relative to the largest recorded value, or to `terms` where these cancel."""
    terms = max(terms, np.abs(case[key]).max(initial=0.0))
    assert_near(got, case[key], case.tolerance, what, terms=terms)


def sizes(x, dy, y, axes, gain):
    """Returns the size of what is added up to each gradient, and to the mean of x.

    Args:
        x: What was normalized over `axes`.
        dy: The cotangent.
        y: The output.
        axes: The reduced axes.
        gain: What the normalization multiplies by, beta and the means aside.
    """
    x, dy, y = (np.abs(np.asarray(array, np.float64)) for array in (x, dy, y))
    total = dy.sum(axes).max()
    mean = x.max()
    return {
        "x": gain * dy.max(),
        "beta": total,
        "gamma": total * (1 + y.max()),
        "moving_mean": mean,
        "moving_mean/biased": mean,
        "renorm_mean": mean,
    }


def after_descent(sizes, params, sgd):
    """Returns `sizes` for the state after a step, where gradients have moved the params."""
    rate = sgd["lr"] if sgd else 0.0
    moved = {k: rate * sizes[k] + np.abs(p).max() for k, p in params.items()}
    return {**sizes, **moved}


def descend(params, gradients, sgd):
    """Returns `params` after the recorded step of gradient descent."""
    assert set(sgd) <= {"lr", "params", "gradient", "constraint_after_update"}, sgd
    assert set(sgd["params"]) == set(params), sgd
    return jax.tree.map(lambda p, g: p - sgd["lr"] * g.astype(p.dtype), params, gradients)


def known(recorded, *names):
    """Raises if a recording holds what its runner does not look at."""
    unknown = set(recorded) - set(names)
    assert not unknown, f"recorded but not understood: {sorted(unknown)}"
