"""Prints the errors of docs/numerics.md: `python -m tests.tools.accuracy` (needs flax)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import jaxbn

ROWS, FEATURES, EPSILON = 65536, 8, 1e-5


def by_flax(x, **options):
    layer = linen.BatchNorm(use_running_average=False, momentum=0.0, **options)
    variables = layer.init(jax.random.key(0), x[:1])
    y, new = layer.apply(variables, x, mutable=["batch_stats"])
    return y, new["batch_stats"]["var"]


def by_jaxbn(x):
    bn = jaxbn.BatchNorm(momentum=0.0)
    y, state = bn.apply(*bn.init(FEATURES), x, training=True)
    return y, state.var


def main():
    rng = np.random.default_rng(0)
    print("| mean / std | | error of the variance | error of y |\n|---|---|---|---|")
    for mean in (0.0, 1e2, 1e3, 1e4):
        x = (mean + rng.standard_normal((ROWS, FEATURES))).astype(np.float32)
        wide = x.astype(np.float64)
        var = wide.var(0)
        truth = (wide - wide.mean(0)) / np.sqrt(var + EPSILON)
        for name, layer in (
            ("jaxbn", by_jaxbn),
            ("flax", by_flax),
            (
                "flax, `use_fast_variance=False`",
                lambda x: by_flax(x, use_fast_variance=False),
            ),
        ):
            y, got = (np.asarray(a, np.float64) for a in layer(jnp.asarray(x)))
            var_error = (np.abs(got - var) / var).max()
            y_error = np.abs(y - truth).max() / np.abs(truth).max()
            print(f"| {mean:g} | {name} | {var_error:.1e} | {y_error:.1e} |")


if __name__ == "__main__":
    main()
