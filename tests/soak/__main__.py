"""Random training, resharding, checkpoints, kills and resumption: `... soak --minutes 60`.

Trainings are drawn one after the other. Each runs in two processes of four CPU devices that
are killed at random times and start again from the last checkpoint, on another mesh. Its
last state must be that of a twin in float64 that ran without interruption.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxbn import convert
from tests.soak import twin
from tests.soak.plan import DEVICES, PROCESSES, Plan, last_step

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(DEVICES // PROCESSES),
}
# What float32 may lose over some hundred steps, relative and, near 0, absolute.
RELATIVE, ABSOLUTE = 2e-5, 2e-5
MOST_SECONDS = 300.0  # without a further checkpoint


@dataclasses.dataclass
class Tally:
    """What has happened so far."""

    trainings: int = 0
    steps: int = 0
    kills: int = 0
    meshes: int = 0
    worst: float = 0.0


def attempt(plan: Plan, folder: Path, parallel: int, kill_after: float | None) -> bool:
    """Runs all processes; tells whether they were killed `kill_after` seconds of work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    log = (folder / "log.txt").open("a+")
    killed = False
    try:
        for rank in range(PROCESSES):
            own = [plan.text(), str(rank), str(port), str(folder), str(parallel)]
            command = [sys.executable, "-u", "-m", "tests.soak.worker", *own]
            workers.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
                )
            )
        begin, first = time.monotonic(), log.seek(0, os.SEEK_END)
        working = None
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.05)
            if working is None and (folder / "log.txt").stat().st_size > first:
                working = time.monotonic()
            if working and kill_after and time.monotonic() - working > kill_after:
                # One dies first, as a machine does; the other would wait for it.
                workers[random.randrange(PROCESSES)].send_signal(signal.SIGKILL)
                killed = True
                break
            if time.monotonic() - begin > MOST_SECONDS:
                break
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        log.close()
    failed = any(worker.returncode for worker in workers)
    if failed and not killed:
        raise RuntimeError(
            f"the processes of {plan} ended by themselves:\n"
            f"{(folder / 'log.txt').read_text()[-3000:]}"
        )
    return killed


def train(plan: Plan, folder: Path, chance: random.Random, tally: Tally) -> None:
    """Runs a training to its end, however often it is killed."""
    before = tally.kills
    while last_step(folder) < plan.steps:
        sizes = [1] if plan.style == "shard_map" else [1, 2, 4]
        parallel = chance.choice(sizes)
        # After some kills it is left in peace, so that every training ends.
        spared = tally.kills - before >= 4 or chance.random() < 0.3
        kill_after = None if spared else chance.uniform(0.05, 6.0)
        tally.kills += attempt(plan, folder, parallel, kill_after)
        tally.meshes += 1


def compare(plan: Plan, folder: Path, tally: Tally) -> None:
    """Compares the last state with that of the twin."""
    got, want = convert.load(folder / f"{plan.steps}.npz"), twin.train(plan)
    assert got.keys() == want.keys(), (sorted(got), sorted(want))
    for name, value in want.items():
        error = np.abs(got[name] - value) / (RELATIVE * np.abs(value) + ABSOLUTE)
        tally.worst = max(tally.worst, float(error.max()))
        assert (error <= 1).all(), f"{plan}: {name} is {got[name]}, the twin has {value}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    end, tally = time.monotonic() + 60 * options.minutes, Tally()
    chance = random.Random(options.seed)
    while time.monotonic() < end:
        plan = Plan.draw(options.seed + tally.trainings)
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            before = tally.kills
            train(plan, folder, chance, tally)
            compare(plan, folder, tally)
        tally.trainings += 1
        tally.steps += plan.steps
        print(f"{plan}: killed {tally.kills - before} times, equal to its twin", flush=True)
    print(
        f"\n{tally.trainings} trainings of {tally.steps} steps on {tally.meshes} meshes, "
        f"killed {tally.kills} times: all equal to their twins. The largest error was "
        f"{tally.worst:.0%} of what is allowed. The seed was {options.seed}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
