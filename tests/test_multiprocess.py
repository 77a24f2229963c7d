"""Several processes, each with a part of the data: equal to the truth; one may die.

`python -m tests.test_multiprocess RANK PROCESSES PORT` is one of the processes.
"""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.laws import oracle

ROOT = Path(__file__).parent.parent
LOCAL_DEVICES, ROWS = 2, 6
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(LOCAL_DEVICES),
}
MULTIHOST = [sys.executable, "-u", "examples/multihost.py", "--processes", "2"]
# Few, large steps, because it is the processes that are tested.
SHORT = ["--epochs", "3", "--batch-size", "250"]


def run_all(processes):
    """Returns return code and output of every process; leaves none behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.test_multiprocess"]
    workers = []
    try:
        for rank in range(processes):
            own = [*command, str(rank), str(processes), str(port)]
            workers.append(
                subprocess.Popen(
                    own,
                    cwd=ROOT,
                    env=ENVIRONMENT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [
        (worker.returncode, output) for worker, output in zip(workers, outputs, strict=True)
    ]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_uneven_batch_of_several_processes_is_one_batch(processes):
    for returncode, output in run_all(processes):
        assert returncode == 0, output[-3000:]
        assert "as one batch: by_pmap, by_shard_map, by_sharded_jit" in output


def draw(processes):
    """Returns a batch of rows [devices, ROWS, 3], of which some devices have none."""
    rng = np.random.default_rng(0)
    devices = processes * LOCAL_DEVICES
    x = rng.normal(size=(devices, ROWS, 3)) * 2 + 50 * np.arange(devices)[:, None, None]
    # Processes of 11 and 1 rows, and so on.
    rows = np.resize([6, 5, 1, 0], devices)
    weights = np.arange(ROWS) < rows[:, None]
    dy = rng.normal(size=x.shape)
    return tuple(array.astype(np.float32) for array in (x, weights, dy))


def truth(bn, params, state, x, weights, dy):
    """Returns y, state and the gradients of sum(y dy), in float64 by one process."""
    params, state = oracle.tree(params), oracle.tree(state)
    x, w, dy = (array.astype(np.float64) for array in (x, weights, dy))
    y, after = oracle.apply(bn, params, state, x, True, w)
    n, w = w.sum(), w[:, None]
    mean = (w * x).sum(0) / n
    std = np.sqrt((w * (x - mean) ** 2).sum(0) / n + bn.epsilon)
    normal, by_normal = (x - mean) / std, dy * params["scale"]
    back = by_normal.sum(0) + normal * (by_normal * normal).sum(0)
    by_x = (by_normal - w / n * back) / std
    return y, after, {"scale": (dy * normal).sum(0), "bias": dy.sum(0)}, by_x


def value_and_gradients(bn, params, state, x, weights, dy):
    def loss(params, x):
        y, after = bn.apply(params, state, x, True, weights=weights)
        return (y * dy).sum(), (y, after)

    (by_params, by_x), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, after, by_params, by_x


# A style takes the part of this process, [devices, ROWS, ...], and returns y and by_x of
# it, the state, and the gradients by params of the whole.


def by_pmap(bn, params, state, *local):
    bn = jaxbn.BatchNorm(momentum=bn.momentum, axis_name="d")

    def shard(*batch):
        y, after, by_params, by_x = value_and_gradients(bn, params, state, *batch)
        return y, after, jax.lax.psum(by_params, "d"), by_x

    y, after, by_params, by_x = jax.pmap(shard, axis_name="d")(*local)
    assert not jaxbn.replica_differences(after, axis=0)
    return y, *jax.tree.map(lambda leaf: leaf[0], (after, by_params)), by_x


def by_shard_map(bn, params, state, *local):
    bn = jaxbn.BatchNorm(momentum=bn.momentum, axis_name="d")
    step = jax.shard_map(
        functools.partial(value_and_gradients, bn),
        mesh=mesh(),
        in_specs=(P(), P(), P("d"), P("d"), P("d")),
        out_specs=(P("d"), P(), P(), P("d")),
    )
    return on_global_arrays(step, params, state, *local)


def by_sharded_jit(bn, params, state, *local):
    step = functools.partial(value_and_gradients, bn)
    return on_global_arrays(step, params, state, *local)


def mesh():
    return jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))


def on_global_arrays(step, params, state, *local):
    spread = NamedSharding(mesh(), P("d"))
    batch = [
        jax.make_array_from_process_local_data(spread, leaf.reshape(-1, *leaf.shape[2:]))
        for leaf in local
    ]
    y, after, by_params, by_x = jax.jit(step)(params, state, *batch)
    assert after.mean.is_fully_replicated
    assert not jaxbn.replica_differences((after, by_params))
    return mine(y), after, by_params, mine(by_x)


def mine(array):
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start)
    return np.stack([shard.data for shard in shards])


def compare(rank, processes):
    """Compares what this process has of each style with the truth."""
    bn = jaxbn.BatchNorm(momentum=0.5)
    _, state = bn.init(3)
    params = jaxbn.BatchNormParams(jnp.array([[0.5, 2.0, 1.0]])[0], jnp.array([1.0, 0, 3]))
    batch = draw(processes)
    flat = [array.reshape(-1, *array.shape[2:]) for array in batch]
    y, after, by_params, by_x = truth(bn, params, state, *flat)
    here = slice(rank * LOCAL_DEVICES, (rank + 1) * LOCAL_DEVICES)
    local = [array[here] for array in batch]
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    styles = by_pmap, by_shard_map, by_sharded_jit
    for style in styles:
        got = style(bn, params, state, *local)
        near(got[0], y.reshape(batch[0].shape)[here], err_msg=style.__name__)
        near(got[1].mean, after["mean"])
        near(got[1].var, after["var"])
        near(got[2].scale, by_params["scale"])
        near(got[2].bias, by_params["bias"])
        near(got[3], by_x.reshape(batch[0].shape)[here], err_msg=style.__name__)
    print("as one batch:", ", ".join(style.__name__ for style in styles))


def train(folder, *arguments, kill=None):
    """Runs examples/multihost.py to its end, and kills one process after an epoch.

    Returns its return code, what it printed, and the seconds from the kill to the end.
    """
    command = [*MULTIHOST, *SHORT, "--checkpoints", folder, *arguments]
    pids, lines, killed = {}, [], time.monotonic()
    launcher = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A group of its own, so that nothing of it outlives the test.
        start_new_session=True,
    )
    # Reading a pipe knows no time limit.
    limit = threading.Timer(240, end_group, (launcher,))
    limit.start()
    try:
        for line in launcher.stdout:
            lines.append(line)
            if started := re.match(r"process (\d+) of \d+: pid (\d+)", line):
                pids[int(started[1])] = int(started[2])
            if kill is not None and "epoch 1: loss" in line:
                os.kill(pids[kill], signal.SIGKILL)
                killed = time.monotonic()
        returncode = launcher.wait(timeout=60)
    finally:
        limit.cancel()
        end_group(launcher)
        launcher.stdout.close()
        launcher.wait()
    return returncode, "".join(lines), time.monotonic() - killed


def end_group(launcher):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)


def end_of(output):
    return re.search(r"Test accuracy: [\d.]+", output)[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "peer"])
def test_a_killed_process_ends_all_and_a_restart_goes_on(victim, tmp_path):
    returncode, output, _ = train(tmp_path / "whole")
    assert returncode == 0, output[-3000:]
    want = end_of(output)
    returncode, output, seconds = train(tmp_path / "killed", kill=victim)
    assert returncode == 1, output[-3000:]
    assert seconds < 60
    assert f"process {victim} was ended by SIGKILL" in output
    assert "Start again with --resume" in output
    assert "Test accuracy" not in output
    returncode, output, _ = train(tmp_path / "killed", "--resume")
    assert returncode == 0, output[-3000:]
    assert "epoch 1: loss" not in output
    assert end_of(output) == want


if __name__ == "__main__":
    rank, processes, port = map(int, sys.argv[1:])
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        processes,
        rank,
        coordinator_bind_address=f"127.0.0.1:{port}",
        initialization_timeout=120,
        heartbeat_timeout_seconds=60,
    )
    compare(rank, processes)
    jax.distributed.shutdown()
