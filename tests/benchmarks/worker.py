"""A process that stays alive: prepares passes and times them when it is asked to.

    python -m tests.benchmarks.worker jax

reads one request of JSON a line and answers each with one line. Only one worker is asked
at a time, so that none disturbs another.
"""

import json
import os
import sys
import time
from typing import Any

from tests.benchmarks.cases import Case
from tests.benchmarks.layers import UnfitError

# A sample lasts at least so many seconds, by repeating what is shorter.
SAMPLE_SECONDS = 4e-3
MAX_CALLS = 500
SAMPLES = 2


class Worker:
    """The requests, one a method."""

    def __init__(self, environment: str):
        self._environment = environment
        self._programs: dict[str, Any] = {}
        self._calls: dict[str, int] = {}
        if environment == "jax":
            os.environ["KERAS_BACKEND"] = "jax"
            import jax

            # A call then returns when it is finished, so that no queue of results fills
            # the caches that the next call would have had.
            jax.config.update("jax_cpu_enable_async_dispatch", False)

    def about(self) -> dict[str, Any]:
        """Tells what this environment runs on."""
        if self._environment == "jax":
            import jax

            return {"platform": jax.default_backend(), "device": str(jax.devices()[0])}
        if self._environment == "torch":
            import torch

            return {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
        from tests.benchmarks.floor import kernels

        return {"how": kernels().how}

    def prepare(self, peer: str, case: dict[str, Any]) -> dict[str, Any]:
        """Compiles a pass of a peer, or says why there is none."""
        wanted = Case(**{**case, "shape": tuple(case["shape"])})
        try:
            program = self._programs[peer] = self._program(peer, wanted)
        except UnfitError as reason:
            return {"unfit": str(reason)}
        program.times(1)
        start = time.perf_counter()
        program.times(1)
        seconds = time.perf_counter() - start
        calls = min(MAX_CALLS, 1 + int(SAMPLE_SECONDS / max(seconds, 1e-7)))
        self._calls[peer] = calls
        told = {name: getattr(program, name) for name in ("temp", "kernels")}
        return {**told, "check": list(program.check), "calls": calls}

    def visit(self, peer: str) -> float:
        """Returns the seconds of a layer: the better of two samples after a warm-up."""
        program, calls = self._programs[peer], self._calls[peer]
        program.times(max(1, calls // 4))
        samples = []
        for _ in range(SAMPLES):
            start = time.perf_counter()
            program.times(calls)
            samples.append((time.perf_counter() - start) / calls)
        return min(samples) / program.layers

    def forget(self) -> None:
        """Frees what was prepared."""
        self._programs.clear()
        if self._environment == "jax":
            import jax

            jax.clear_caches()

    def residuals(self, peer: str, **options: Any) -> float:
        from tests.benchmarks import passes

        return passes.residuals(peer, tuple(options.pop("shape")), **options)

    def block_residuals(self, peer: str, shape: list[int], dtype: str) -> float:
        from tests.benchmarks import passes

        return passes.block_residuals(peer, tuple(shape), dtype)

    def compile(self, peer: str, case: dict[str, Any]) -> dict[str, float]:
        from tests.benchmarks import startup

        wanted = Case(**{**case, "shape": tuple(case["shape"])})
        return startup.compile_seconds(peer, wanted)

    def _program(self, peer, case):
        if peer == "torch":
            from tests.benchmarks.torch_layer import TorchProgram

            return TorchProgram(case)
        if peer == "floor":
            from tests.benchmarks.floor import Floor

            return Floor(case)
        from tests.benchmarks.passes import DeviceFloor, Program

        return DeviceFloor(case) if peer == "device floor" else Program(peer, case)


def main() -> None:
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # The benchmark goes on without this peer.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
