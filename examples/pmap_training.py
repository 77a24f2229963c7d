"""Data-parallel training with jax.pmap: MNIST on 8 devices, statistics of the whole batch.

    pip install -e '.[examples]' && python examples/pmap_training.py

takes 10 s on two CPU cores, which play the 8 devices (jax 0.10.2). Expect a test accuracy
of 0.91, and replicas that are all equal. shard_map_training.py is the same in JAX's newer
words, and prints the same.

Every device holds a copy of params, stats and optimizer state, and a part of each batch:
120 images over 8 devices, 15 on each, and in the last batch of an epoch 40, so that one
device has 10 and five have none. `make_step` is the pattern to copy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import _arguments
import _data
import _padded_mnist as padded
import jax
import mnist
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import jaxbn


def make_step(
    bn: jaxbn.BatchNorm, optimizer: optax.GradientTransformation, devices: Sequence[Any]
) -> Callable:
    """Returns the training step, of which every device runs its share."""

    @functools.partial(jax.pmap, axis_name="devices", devices=devices)
    def step(train_state: mnist.TrainState, batch: padded.Batch):
        params, stats, opt_state = train_state
        weight = lax.psum(batch.weights.sum(), "devices")

        def loss_fn(params):
            loss, new_stats = padded.summed_loss(params, stats, batch, bn)
            return loss / weight, new_stats

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        # Each is this device's share of the mean over the whole batch. A pmean of the
        # devices' own means would count the images of a half-empty device double.
        loss, grads = lax.psum((loss, grads), "devices")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return step


def split(batch: padded.Batch, parts: int) -> padded.Batch:
    """Gives the arrays a leading axis of devices, which is what pmap maps over."""
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments.of_devices(argv, "Trains on several devices with pmap.")
    train_set, test_set = _data.load_mnist()
    parts = len(args.devices)
    # Without axis_name a device would normalize its 15 images by themselves.
    bn = jaxbn.BatchNorm(momentum=padded.MOMENTUM, axis_name="devices")
    steps = args.epochs * -(-_data.NUM_TRAIN // args.batch_size)
    optimizer = padded.sgd(steps)
    params, stats = mnist.init(jax.random.key(args.seed), bn)
    train_state = params, stats, optimizer.init(params)
    # Copied by a pmap, because `step` would be compiled a second time for arrays that do
    # not lie on the devices as its own results do.
    axis = {"axis_name": "devices", "devices": args.devices}
    copy = jax.pmap(lambda state, _: state, in_axes=(None, 0), **axis)
    train_state = copy(train_state, np.arange(parts))

    step = make_step(bn, optimizer, args.devices)
    rng = np.random.default_rng(args.seed)
    with tqdm(total=steps, desc="pmap", unit="step") as bar:
        for _ in range(args.epochs):
            for batch in padded.epoch(rng, train_set, args.batch_size, parts):
                train_state, loss = step(train_state, split(batch, parts))
                bar.update()
            bar.set_postfix(loss=f"{loss[0]:.3f}")

    differences = jaxbn.replica_differences(train_state, axis=0)
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[0], train_state)
    padded.report(test_set, one, differences)


if __name__ == "__main__":
    main()
