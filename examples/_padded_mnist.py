"""The MNIST network on batches that devices share unevenly: padding, mask and loss.

No program: pmap_training.py, shard_map_training.py and multihost.py import it. A batch is
filled up with images of weight 0, so that every device has an array of the same size, and
neither the statistics nor the loss see the padding.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import _data
import jax
import mnist
import numpy as np
import optax

import jaxbn

LEARNING_RATE = 1.0
MOMENTUM = 0.9


class Batch(NamedTuple):
    """Images with labels, each with weight 1, or 0 where it only fills up the batch."""

    images: np.ndarray  # [N, 784] in [0, 1]
    labels: np.ndarray  # [N]
    weights: np.ndarray  # [N]


def pad(images: np.ndarray, labels: np.ndarray, size: int) -> Batch:
    """Returns the images as a batch of `size`."""
    missing = size - len(images)
    return Batch(
        np.pad(np.asarray(images), ((0, missing), (0, 0))),
        np.pad(np.asarray(labels), (0, missing)),
        (np.arange(size) < len(images)).astype(np.float32),
    )


def epoch(
    rng: np.random.Generator, data: _data.Batch, batch_size: int, parts: int
) -> Iterator[Batch]:
    """Yields all images in random order, in batches that divide into equal parts."""
    images, labels = map(np.asarray, data)
    order = rng.permutation(len(images))
    size = math.ceil(batch_size / parts) * parts
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield pad(images[rows], labels[rows], size)


def model(
    params: mnist.Params,
    stats: mnist.Stats,
    batch: Batch,
    normalizer: jaxbn.Normalizer,
    training: bool,
) -> tuple[jax.Array, mnist.Stats]:
    """Returns the logits and the new stats, to which the padding adds nothing."""
    x, new_stats = batch.images, []
    for layer, state in zip(params["hidden"], stats, strict=True):
        x, state = normalizer.apply(
            layer["norm"], state, x @ layer["kernel"], training, weights=batch.weights
        )
        new_stats.append(state)
        x = jax.nn.sigmoid(x)
    return x @ params["output"]["kernel"] + params["output"]["bias"], new_stats


def summed_loss(
    params: mnist.Params, stats: mnist.Stats, batch: Batch, normalizer: jaxbn.Normalizer
) -> tuple[jax.Array, mnist.Stats]:
    """Returns the sum of the losses of all images but the padding, and the new stats."""
    logits, new_stats = model(params, stats, batch, normalizer, training=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return (losses * batch.weights).sum(), new_stats


def sgd(num_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of mnist.py, whose learning rate decays linearly to 0."""
    return optax.sgd(optax.linear_schedule(LEARNING_RATE, 0, num_steps))


def report(
    test_set: _data.Batch, train_state: mnist.TrainState, differences: dict[str, float]
) -> None:
    """Prints the accuracy with the running statistics, and whether the replicas agree."""
    params, stats, _ = train_state
    _, accuracy, _ = mnist.evaluate(params, stats, test_set, jaxbn.BatchNorm())
    print(f"\nTest accuracy: {accuracy:.3f}. Replicas: {differences or 'all equal'}")
