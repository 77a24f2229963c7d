"""The workers, and the rounds in which they take turns."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tests.benchmarks.cases import Case
from tests.benchmarks.machine import ALLOCATOR

# A peer, the environment that runs it, its package, and what pip calls that.
PEERS = {
    "jaxbn": ("jax", "jaxbn", "jaxbn"),
    "linen": ("jax", "flax", "flax"),
    "nnx": ("jax", "flax", "flax"),
    "haiku": ("jax", "haiku", "dm-haiku"),
    "equinox": ("jax", "equinox", "equinox"),
    "keras": ("jax", "keras", "keras"),
    "torch": ("torch", "torch", "torch"),
}
# Seconds in which the threads of the peer before fall asleep: OpenMP's wait in a loop.
PAUSE = 0.01
# Two programs that differ by more than that do not compute the same.
TOLERANCE = 0.03


class WorkerError(RuntimeError):
    """A worker could not do what it was asked to."""


class Crew:
    """A worker for each environment; asks one at a time."""

    def __init__(self, environments: Iterable[str], torch_python: str = sys.executable):
        interpreters = {"torch": torch_python}
        self._workers = {
            name: _start(name, interpreters.get(name, sys.executable))
            for name in environments
        }
        self.about = {name: self.ask(name, "about") for name in self._workers}

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.stdin.close()
            worker.terminate()
            worker.wait()
            worker.stdout.close()

    def ask(self, environment: str, do: str, **request: Any) -> Any:
        worker = self._workers[environment]
        print(json.dumps({"do": do, **request}), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
        if not line:
            raise WorkerError(
                f"The worker of {environment} ended with status {worker.wait()}, asked to "
                f"{do} {request}. It may have run out of memory: try a smaller --shape."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["answer"]

    def forget(self) -> None:
        for environment in self._workers:
            self.ask(environment, "forget")

    def environment(self, peer: str) -> str:
        if peer == "floor":
            return "floor"
        return "jax" if peer == "device floor" else PEERS[peer][0]

    @property
    def floor(self) -> str:
        """Which floor is that of the platform."""
        return "floor" if self.about["jax"]["platform"] == "cpu" else "device floor"


def _start(environment: str, python: str) -> Any:
    return subprocess.Popen(
        [python, "-m", "tests.benchmarks.worker", environment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Two frameworks share a GPU, of which JAX would take most for itself.
        env={**os.environ, **ALLOCATOR, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        text=True,
    )


def installed(
    peers: Iterable[str], tell: Callable[[str], None], elsewhere: Iterable[str] = ()
) -> list[str]:
    """Returns the peers whose packages are here, and tells of those that are not.

    Those in `elsewhere` are in another interpreter.
    """
    found = []
    for peer in peers:
        _, package, pip = PEERS[peer]
        if peer not in elsewhere and importlib.util.find_spec(package) is None:
            tell(f"SKIPPED {peer}: {package} is not installed (pip install {pip}).")
        else:
            found.append(peer)
    return found


def run_case(
    crew: Crew, case: Case, peers: list[str], rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Returns a row: the times of each round, temporaries, and why some are missing."""
    row: dict[str, Any] = {**dataclasses.asdict(case), "name": case.name}
    row |= {"bytes": case.bytes_of_x, "units": case.units if case.kind == "layer" else None}
    temp, kernels, checks, missing, ready = {}, {}, {}, {}, []
    # Only jaxbn and linen are written into the nets.
    peers = [p for p in peers if case.kind == "layer" or p in ("jaxbn", "linen")]
    for peer in [crew.floor, *peers]:
        environment = crew.environment(peer)
        try:
            told = crew.ask(
                environment, "prepare", peer=peer, case=dataclasses.asdict(case)
            )
        except WorkerError as error:
            told = {"unfit": str(error)}
            tell(f"FAILED {peer} at {case.name} {case.dtype} {case.what}: {error}")
        if "unfit" in told:
            missing[peer] = told["unfit"]
            continue
        ready.append(peer)
        temp[peer], checks[peer] = told["temp"], told["check"]
        kernels[peer] = told["kernels"]
    _compare(case, checks, tell)
    times: dict[str, list[float]] = {peer: [] for peer in ready}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        # Nobody always follows the same one, whose threads may still be awake.
        for peer in order.permutation(ready).tolist():
            time.sleep(PAUSE)
            times[peer].append(crew.ask(crew.environment(peer), "visit", peer=peer))
    crew.forget()
    times = {peer.removeprefix("device "): seconds for peer, seconds in times.items()}
    row |= {"seconds": times, "temp": temp, "kernels": kernels}
    return row | {"missing": missing, "ratios": ratios(times)}


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Returns the quartiles over the rounds of the ratios that are reported."""
    pairs = [(peer, "floor") for peer in times if peer != "floor"]
    pairs += [("jaxbn", peer) for peer in times if peer not in ("jaxbn", "floor")]
    return {
        f"{one}/{other}": np.percentile(
            np.divide(times[one], times[other]), (25, 50, 75)
        ).tolist()
        for one, other in pairs
        if one in times and other in times
    }


def _compare(case, checks, tell):
    """Tells of peers that compute something else, which no time can be compared with."""
    expected = checks.get("linen") or checks.get("jaxbn")
    for peer, found in checks.items():
        # Not every peer returns every gradient.
        pairs = list(zip(expected or [], found, strict=False))
        if not np.allclose(*np.transpose(pairs or [(0, 0)]), rtol=TOLERANCE, atol=1e-6):
            tell(
                f"WARNING {peer} computes something else at {case.name} {case.dtype} "
                f"{case.what}: mean magnitudes {found}, expected {expected}."
            )
