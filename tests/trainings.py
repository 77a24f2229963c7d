"""A small model and its training, as right or as wrong as the arguments make it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from jaxbn import optim

BN = jaxbn.BatchNorm(momentum=0.9)
LAYERS = ("bn0", "bn1", "bn2")
WIDTH, ROWS = 32, 2048


def draw_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 16)) * rng.uniform(0.5, 3, 16) + rng.normal(size=16)
    labels = np.argmax(np.tanh(x) @ rng.normal(size=(16, 4)), 1)
    return jnp.asarray(x.astype(np.float32)), jnp.asarray(labels)


X, LABELS = draw_data()


def init(seed=0):
    params, stats, size = {}, {}, X.shape[1]
    for i, name in enumerate(LAYERS):
        key = jax.random.fold_in(jax.random.key(seed), i)
        params[f"kernel{i}"] = jax.random.normal(key, (size, WIDTH)) / size**0.5
        params[name], stats[name] = BN.init(WIDTH)
        size = WIDTH
    return params | {"head": jnp.zeros((WIDTH, 4))}, stats


def apply(variables, x, training, momentum=0.9):
    params, stats = variables
    after = {}
    for i, name in enumerate(LAYERS):
        x, after[name] = BN.apply(
            params[name], stats[name], x @ params[f"kernel{i}"], training, momentum=momentum
        )
        x = jax.nn.relu(x)
    return x @ params["head"], (params, after)


_run = jax.jit(apply, static_argnums=2)


def run(variables, x, training):
    return _run(variables, x, training, 0.9)


def with_momentum(momentum):
    """Returns `run` with another momentum, of the same compiled program."""
    return lambda variables, x, training: _run(variables, x, training, momentum)


def cross_entropy(logits, labels):
    chosen = jax.nn.one_hot(labels, 4)
    return -(jax.nn.log_softmax(logits) * chosen).sum(-1).mean()


def train(
    seed=0,
    *,
    steps=300,
    batch=32,
    rate=0.1,
    momentum=0.9,
    l1=0.0,
    unit=1.0,
    offset=0.0,
    keep_stats=True,
    inference=False,
):
    """Trains with SGD; returns the variables and an average of the params."""
    numbers = (steps, rate, momentum, l1, unit, offset, keep_stats)
    return _train(seed, *numbers, batch=batch, inference=inference)


@functools.partial(jax.jit, static_argnames=("batch", "inference"))
def _train(seed, steps, rate, momentum, l1, unit, offset, keep_stats, *, batch, inference):
    tx = optax.chain(optax.trace(0.9), optax.scale(-1.0))
    clip = optim.clip_scale(minimum=0.0)
    params, stats = init(seed)
    params["bn0"] = params["bn0"]._replace(bias=params["bn0"].bias + offset)

    def step(i, carry):
        (params, stats), trace, average = carry
        key = jax.random.fold_in(jax.random.key(seed + 1), i)
        rows = jax.random.randint(key, (batch,), 0, ROWS)

        def loss(params):
            x = X[rows] * unit
            logits, (_, after) = apply((params, stats), x, not inference, momentum)
            penalty = optim.scale_penalty(params, l1=1.0) * l1
            return cross_entropy(logits, LABELS[rows]) + penalty, after

        grads, after = jax.grad(loss, has_aux=True)(params)
        updates, trace = tx.update(jax.tree.map(lambda g: rate * g, grads), trace)
        updates, _ = clip.update(updates, optax.EmptyState(), params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, average, params)
        stats = jax.tree.map(lambda old, new: jnp.where(keep_stats, new, old), stats, after)
        return (params, stats), trace, average

    start = (params, stats), tx.init(params), params
    variables, _, average = jax.lax.fori_loop(0, steps, step, start)
    return variables, average


def batches(size=32, number=8, seed=3):
    rng = np.random.default_rng(seed)
    return [X[rng.integers(0, ROWS, size)] for _ in range(number)]
