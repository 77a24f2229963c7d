"""Averaged weights on MNIST, with statistics that fit them and with statistics that do not.

    pip install -e '.[examples]' && python examples/swa.py

takes 20 s on two CPU cores (jax 0.10.2). It trains the sigmoid network of mnist.py at a
large, constant learning rate, averages the weights of all steps after the first fifth, and
prints the test accuracies for three seeds. Expect, on average, 0.92 for the last weights;
0.90 for the averaged weights with the running statistics of the last ones; and 0.94 for
the same averaged weights after jaxbn.reestimate. Averaging the statistics along with the
weights does as much in this shallow network, without a pass over the data.

After Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
2018, section 3.2. `reestimated` is the pattern to copy.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import _arguments
import jax
import mnist
import numpy as np
import optax
from _data import Batch, load_mnist, shuffled_rows
from tqdm import tqdm

import jaxbn
import jaxbn.optim

BATCH_SIZE = 60
AVERAGED_FROM = 0.2  # of the steps
# Gather is the norm itself, until its statistics are estimated anew.
NORMALIZER = jaxbn.Gather(jaxbn.BatchNorm(momentum=0.9))


Model = tuple[mnist.Params, mnist.Stats]


def reestimated(params: mnist.Params, stats: mnist.Stats, images: jax.Array) -> mnist.Stats:
    """Returns the statistics of all images under these params, whatever stats were."""

    @jax.jit
    def step(stats: mnist.Stats, batch: jax.Array) -> mnist.Stats:
        _, stats, _ = mnist.model(params, stats, batch, NORMALIZER, training=True)
        return stats

    batches = np.array_split(images, 8)
    return jaxbn.reestimate(step, stats, batches)


def train(
    seed: int, train_set: Batch, epochs: int, learning_rate: float
) -> tuple[Model, Model]:
    """Returns the last params and stats, and the averages of both."""
    init_key, order_key = jax.random.split(jax.random.key(seed))
    rows_of_steps = shuffled_rows(order_key, epochs, BATCH_SIZE)
    optimizer = optax.sgd(learning_rate)
    params, stats = mnist.init(init_key, NORMALIZER)
    train_state = params, stats, optimizer.init(params)
    average = jaxbn.optim.ModelAverage()
    average_state = average.init(params, stats)
    update = jax.jit(average.update)
    images, labels = train_set
    first = int(AVERAGED_FROM * len(rows_of_steps))
    for step, rows in enumerate(tqdm(rows_of_steps, desc=f"seed {seed}", unit="step")):
        batch = images[rows], labels[rows]
        train_state, _ = mnist.train_step(train_state, batch, NORMALIZER, optimizer)
        if step >= first:
            average_state = update(average_state, *train_state[:2])
    return train_state[:2], average.value(average_state)


class Accuracies(NamedTuple):
    """The test accuracies of the weights and statistics after one training."""

    last: float
    stale: float
    averaged: float
    reestimated: float


TITLES = (
    "last weights, their running statistics",
    "averaged weights, statistics of the last",
    "averaged weights, averaged statistics",
    "averaged weights, re-estimated statistics",
)


def compare(seed: int, data: tuple[Batch, Batch], args: argparse.Namespace) -> Accuracies:
    """Trains once, and evaluates the averaged weights with three sets of statistics."""
    train_set, test_set = data
    (last, stale), (params, averaged) = train(
        seed, train_set, args.epochs, args.learning_rate
    )

    def accuracy(params: mnist.Params, stats: mnist.Stats) -> float:
        return float(mnist.evaluate(params, stats, test_set, NORMALIZER)[1])

    return Accuracies(
        accuracy(last, stale),
        accuracy(params, stale),
        accuracy(params, averaged),
        accuracy(params, reestimated(params, stale, train_set[0])),
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments.of_swa(argv)
    data = load_mnist()
    runs = [compare(seed, data, args) for seed in range(args.seeds)]
    print(
        "\n" + " " * 42 + "".join(f" seed {seed}" for seed in range(args.seeds)) + "   mean"
    )
    for title, row in zip(TITLES, zip(*runs, strict=True), strict=True):
        cells = "".join(f"{accuracy:7.3f}" for accuracy in (*row, sum(row) / len(row)))
        print(f"{title:42}{cells}")
    rescued = [run.reestimated - run.stale for run in runs]
    print(f"\nRe-estimation rescues {sum(rescued) / len(rescued):.3f} on average.")


if __name__ == "__main__":
    main()
