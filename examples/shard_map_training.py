"""Data-parallel training with jax.shard_map: MNIST on 8 devices, like pmap_training.py.

    pip install -e '.[examples]' && python examples/shard_map_training.py

takes 10 s on two CPU cores, which play the 8 devices (jax 0.10.2). Expect a test accuracy
of 0.91, the one of pmap_training.py, and replicas that are all equal.

The twin of pmap_training.py: the same network, batches and order, written for a mesh.
Arrays are global, their sharding tells where they lie, and JAX checks that what leaves
with out_specs=P() is the same on all devices. `make_step` is the pattern to copy.
"""

from collections.abc import Callable, Sequence

import _arguments
import _data
import _padded_mnist as padded
import jax
import mnist
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxbn


def make_step(
    bn: jaxbn.BatchNorm, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable:
    """Returns the training step, of which every device runs its share."""

    def step(train_state: mnist.TrainState, batch: padded.Batch):
        params, stats, opt_state = train_state
        weight = lax.psum(batch.weights.sum(), "devices")

        def loss_fn(params):
            loss, new_stats = padded.summed_loss(params, stats, batch, bn)
            return loss / weight, new_stats

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        # The gradients of params that all devices share come out summed over the devices:
        # this is what pmap leaves to the user. Another psum would multiply them by 8.
        loss = lax.psum(loss, "devices")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments.of_devices(argv, "Trains on several devices with shard_map.")
    train_set, test_set = _data.load_mnist()
    parts = len(args.devices)
    mesh = Mesh(np.array(args.devices), ("devices",))
    # Without axis_name a device would normalize its 15 images by themselves.
    bn = jaxbn.BatchNorm(momentum=padded.MOMENTUM, axis_name="devices")
    steps = args.epochs * -(-_data.NUM_TRAIN // args.batch_size)
    optimizer = padded.sgd(steps)
    params, stats = mnist.init(jax.random.key(args.seed), bn)
    train_state = params, stats, optimizer.init(params)
    train_state = jax.device_put(train_state, NamedSharding(mesh, P()))

    step = make_step(bn, optimizer, mesh)
    rng = np.random.default_rng(args.seed)
    with tqdm(total=steps, desc="shard_map", unit="step") as bar:
        for _ in range(args.epochs):
            for batch in padded.epoch(rng, train_set, args.batch_size, parts):
                batch = jax.device_put(batch, NamedSharding(mesh, P("devices")))
                train_state, loss = step(train_state, batch)
                bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

    differences = jaxbn.replica_differences(train_state)
    one = jax.tree.map(np.asarray, train_state)
    padded.report(test_set, one, differences)


if __name__ == "__main__":
    main()
