"""Re-estimation in two processes: each with its own batches, or with parts of all batches.

`python -m tests.test_reestimate_processes RANK PORT` is one of the processes.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

PROCESSES, LOCAL_DEVICES = 2, 2
SIZES = 30, 4, 4, 30, 4, 22, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(sum(SIZES), 3)) + np.repeat(RNG.normal(size=(7, 3)) * 3, SIZES, 0)
X = X.astype(np.float32)
WEIGHTS = RNG.uniform(size=len(X)).astype(np.float32)
ENDS = np.cumsum(SIZES)[:-1]
BATCHES = list(zip(np.split(X, ENDS), np.split(WEIGHTS, ENDS), strict=True))


def test_two_processes_see_one_data_set():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(LOCAL_DEVICES),
    }
    command = [sys.executable, "-m", "tests.test_reestimate_processes"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(port)],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-3000:]
        assert "as one data set: own batches, global batches, refused alike" in output


def check(rank):
    bn = jaxbn.Gather(jaxbn.BatchNorm())
    params, state = bn.init(3)
    step = jax.jit(
        lambda state, batch: bn.apply(params, state, batch[0], True, weights=batch[1])[1]
    )
    # Three batches here, four there.
    own = BATCHES[:3] if rank == 0 else BATCHES[3:]
    compare(jaxbn.reestimate(step, state, own))
    compare(jaxbn.reestimate(step, state, list(global_batches(rank))))

    spoiled = [(np.full_like(own[0][0], np.nan), own[0][1]), *own[1:]] if rank else own
    # All refuse, and none waits for a process that did.
    with pytest.raises(ValueError, match="not all finite"):
        jaxbn.reestimate(step, state, spoiled)
    print("as one data set: own batches, global batches, refused alike")


def global_batches(rank):
    """Returns each batch spread over the devices of both processes, padded."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("d"))
    for x, weights in BATCHES:
        padding = -len(x) % 8
        rows = np.pad(x, ((0, padding), (0, 0))), np.pad(weights, (0, padding))
        yield tuple(
            jax.make_array_from_process_local_data(spread, np.split(part, PROCESSES)[rank])
            for part in rows
        )


def compare(state):
    w = WEIGHTS.astype(np.float64)[:, None]
    mean = (w * X).sum(0) / w.sum()
    var = (w * (X - mean) ** 2).sum(0) / w.sum()
    error = np.abs(np.asarray(state.mean) - mean) / np.sqrt(mean**2 + var)
    print("relative errors", error.max(), np.abs(state.var / jnp.asarray(var) - 1).max())
    assert error.max() < 1e-6
    np.testing.assert_allclose(state.var, var, rtol=1e-6)


if __name__ == "__main__":
    rank, port = map(int, sys.argv[1:])
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address,
        PROCESSES,
        rank,
        coordinator_bind_address=address,
        initialization_timeout=120,
    )
    check(rank)
    jax.distributed.shutdown()
