"""The ways to run a normalizer: each takes the same steps under another transformation.

A mode is a function `(normalizer, params, state, xs, weights) -> (ys, state)` which takes
one training step for each x in `xs`. All modes must give the same arrays.
"""

import functools

import jax
import jax.numpy as jnp

from tests.laws.modules import as_equinox, as_haiku


def _step(normalizer, params, state, x, weights, training=True):
    options = {} if weights is None else {"weights": weights}
    return normalizer.apply(params, state, x, training, **options)


def _loop(step, state, xs, weights):
    ys = []
    for i in range(len(xs)):
        y, state = step(state, xs[i], None if weights is None else weights[i])
        ys.append(y)
    return jnp.stack(ys), state


def eager(normalizer, params, state, xs, weights):
    return _loop(functools.partial(_step, normalizer, params), state, xs, weights)


def jit(normalizer, params, state, xs, weights):
    step = jax.jit(lambda s, x, w: _step(normalizer, params, s, x, w))
    return _loop(step, state, xs, weights)


def scan(normalizer, params, state, xs, weights):
    def body(state, inputs):
        y, state = _step(normalizer, params, state, *inputs)
        return state, y

    state, ys = jax.lax.scan(body, state, (xs, weights))
    return ys, state


def vmap(normalizer, params, state, xs, weights):
    """Runs an ensemble of two, of which the second sees other data and is thrown away."""
    step = jax.vmap(lambda s, x, w: _step(normalizer, params, s, x, w))

    def paired(s, x, w):
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf + 1]), (s, x))
        y, s = step(*both, None if w is None else jnp.stack([w, w]))
        return jax.tree.map(lambda leaf: leaf[0], (y, s))

    return _loop(paired, state, xs, weights)


def remat(normalizer, params, state, xs, weights):
    step = jax.checkpoint(lambda s, x, w: _step(normalizer, params, s, x, w))
    return _loop(step, state, xs, weights)


def traced(normalizer, params, state, xs, weights):
    step = jax.jit(lambda t, s, x, w: _step(normalizer, params, s, x, w, t))
    return _loop(functools.partial(step, jnp.array(True)), state, xs, weights)


def traced_vmap(normalizer, params, state, xs, weights):
    """Runs training and inference side by side, where the conditional is a select."""

    def step(s, x, w):
        both = jax.vmap(lambda t: _step(normalizer, params, s, x, w, t))(
            jnp.array([True, False])
        )
        return jax.tree.map(lambda leaf: leaf[0], both)

    return _loop(step, state, xs, weights)


def by_equinox(normalizer, params, state, xs, weights):
    return _loop(_as_layer(as_equinox, normalizer, params), state, xs, weights)


def by_haiku(normalizer, params, state, xs, weights):
    return _loop(_as_layer(as_haiku, normalizer, params), state, xs, weights)


def _as_layer(run, normalizer, params):
    def step(state, x, w):
        options = {} if w is None else {"weights": w}
        return run(normalizer, params, state, x, True, **options)

    return step


MODES = {
    mode.__name__: mode
    for mode in (
        *(eager, jit, scan, vmap, remat, traced, traced_vmap),
        *(by_equinox, by_haiku),
    )
}
