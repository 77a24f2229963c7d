"""Training over many processes, with checkpoints: MNIST, and a process may die.

    pip install -e '.[examples]' && python examples/multihost.py --processes 2

takes 20 s on two CPU cores (jax 0.10.2), prints loss and accuracy after every epoch and
ends with a test accuracy of 0.91. `--processes 2` starts two processes of two CPU devices
each, which find each other on 127.0.0.1. Without it the program is one process of many:

    srun python examples/multihost.py                  SLURM; likewise a TPU pod, mpirun
    python examples/multihost.py --coordinator 10.0.0.1:1234 --processes 2 --process-id 0

the second where nothing tells a process its peers. Kubernetes needs `pip install jax[k8s]`.
All processes must see the folder of the checkpoints.

Every process reads images of its own, the last one half as many. It fills its part of a
batch up with images of weight 0, so statistics, loss and gradients are those of all
images, each counted once. Statistics under jax.jit are those of the global batch already:
no axis_name, no psum. `make_step` is the pattern to copy.

When a process dies, the others see its connection close, or else its heartbeat stop, and
end as well; when one is stuck, they end after --timeout seconds without a step. Then

    python examples/multihost.py --processes 2 --resume

goes on after the last checkpoint, and comes to the same end.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import _arguments
import _data
import _padded_mnist as padded
import _processes
import jax
import mnist
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxbn


def make_step(bn: jaxbn.BatchNorm, optimizer: optax.GradientTransformation) -> Callable:
    """Returns the training step on a batch that is spread over all processes."""

    @jax.jit
    def step(train_state: mnist.TrainState, batch: padded.Batch):
        params, stats, opt_state = train_state

        def loss_fn(params):
            loss, new_stats = padded.summed_loss(params, stats, batch, bn)
            return loss / batch.weights.sum(), new_stats

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return step


@jax.jit
def accuracy(params: mnist.Params, stats: mnist.Stats, batch: padded.Batch):
    """Returns the share of right answers with the running statistics, padding aside."""
    bn = jaxbn.BatchNorm()
    logits, _ = padded.model(params, stats, batch, bn, training=False)
    right = (logits.argmax(axis=-1) == batch.labels) * batch.weights
    return right.sum() / batch.weights.sum()


class Shard:
    """The part of a data set that this process has, and batches that all give to."""

    def __init__(self, data: _data.Batch, sharding: NamedSharding):
        images, labels = map(np.asarray, data)
        count = jax.process_count()
        edges = np.append(2 * np.arange(count), 2 * count - 1) * len(labels)
        edges //= 2 * count - 1
        index = jax.process_index()
        # In random order, because the file holds one digit after the other.
        order = np.random.default_rng(0).permutation(len(labels))
        mine = order[edges[index] : edges[index + 1]]
        self.images, self.labels, self.sharding = images[mine], labels[mine], sharding
        self.largest = np.diff(edges).max()  # of the shards of all processes

    def global_batch(self, rows: np.ndarray, size: int) -> padded.Batch:
        """Returns a batch to which this process gives `rows`, and each one up to `size`."""
        size = -(-size // jax.local_device_count()) * jax.local_device_count()
        local = padded.pad(self.images[rows], self.labels[rows], size)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self.sharding, leaf), local
        )

    def epoch(self, rng: np.random.Generator, batch_size: int) -> list[np.ndarray]:
        """Returns the rows of every step; all processes take part in as many steps."""
        steps = -(-self.largest * jax.process_count() // batch_size)
        return np.array_split(rng.permutation(len(self.labels)), steps)


def train(args: argparse.Namespace) -> None:
    """Trains together with the other processes, from the last checkpoint on."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    spread, everywhere = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())
    train_set, test_set = (Shard(data, spread) for data in _data.load_mnist())
    me, count = jax.process_index(), jax.process_count()
    print(
        f"process {me} of {count}: pid {os.getpid()}, {jax.local_device_count()} devices, "
        f"{len(train_set.labels)} images",
        flush=True,
    )
    bn = jaxbn.BatchNorm(momentum=padded.MOMENTUM)
    # A generator of its own makes an epoch the same after a restart.
    epochs = [
        train_set.epoch(np.random.default_rng([args.seed, epoch, me]), args.batch_size)
        for epoch in range(args.epochs)
    ]
    optimizer = padded.sgd(args.epochs * len(epochs[0]))

    def init() -> mnist.TrainState:
        params, stats = mnist.init(jax.random.key(args.seed), bn)
        return params, stats, optimizer.init(params)

    train_state = jax.jit(init, out_shardings=everywhere)()
    step = make_step(bn, optimizer)
    test_batch = test_set.global_batch(np.arange(len(test_set.labels)), test_set.largest)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(args.checkpoints.absolute(), options=options) as manager:
        done, train_state = restore(manager, train_state)
        for epoch, rows_of_steps in enumerate(epochs[done:], start=done + 1):
            for rows in tqdm(rows_of_steps, f"epoch {epoch}", leave=False, disable=me > 0):
                batch = train_set.global_batch(rows, -(-args.batch_size // count))
                train_state, loss = step(train_state, batch)
                jax.block_until_ready(loss)
                _processes.expect_progress(args.timeout)
            manager.save(epoch, args=ocp.args.StandardSave(train_state))
            # All take part in what runs on all devices, and one prints.
            right = accuracy(*train_state[:2], test_batch)
            if me == 0:
                line = f"epoch {epoch}: loss {loss:.3f}, test accuracy {right:.3f}"
                print(line, flush=True)
    right = accuracy(*train_state[:2], test_batch)
    if me == 0:
        print(f"Test accuracy: {right:.3f}", flush=True)


def restore(
    manager: ocp.CheckpointManager, train_state: mnist.TrainState
) -> tuple[int, mnist.TrainState]:
    """Returns how many epochs are done, and the state after them."""
    done = manager.latest_step()
    if done is None:
        return 0, train_state
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        train_state,
    )
    restored: Any = manager.restore(done, args=ocp.args.StandardRestore(like))
    return done, restored


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments.of_multihost(argv)
    if args.processes is not None and args.process_id is None:
        _processes.launch(__file__, args, argv)
    else:
        _processes.take_part(args, train)


if __name__ == "__main__":
    main()
