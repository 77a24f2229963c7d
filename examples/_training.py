"""What the two ResNet examples share: images, their order, and checkpoints."""

import argparse
import hashlib
from typing import Any

import _data
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

Batch = tuple[jax.Array, jax.Array]  # images [N, 28, 28, 1] in [0, 1], labels [N]

SETTINGS = ("epochs", "batch_size", "learning_rate", "seed")


def load_mnist() -> tuple[Batch, Batch]:
    """Returns the training set and the test set, with as many images of every digit."""
    train_set, test_set = (
        (images.reshape(-1, 28, 28, 1), labels) for images, labels in _data.load_mnist()
    )
    return train_set, test_set


def rows_of_epoch(args: argparse.Namespace, epoch: int) -> np.ndarray:
    """Returns row numbers [steps, batch_size], which depend on seed and epoch alone.

    So a run that begins again at an epoch sees what it would have seen.
    """
    key = jax.random.fold_in(jax.random.key(args.seed), epoch)
    used = steps_per_epoch(args) * args.batch_size
    return np.asarray(jax.random.permutation(key, _data.NUM_TRAIN)[:used]).reshape(
        -1, args.batch_size
    )


def steps_per_epoch(args: argparse.Namespace) -> int:
    return _data.NUM_TRAIN // args.batch_size


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
        saved: Any = self._manager.restore(
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
