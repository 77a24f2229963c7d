"""Seconds before the first result: to import, to trace and to compile."""

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from tests.benchmarks.cases import Case

_IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def import_seconds(statements: list[str], repeats: int) -> dict[str, list[float]]:
    """Times each statement in fresh processes, in turns, after all were imported once."""
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    # Without bytecode the compiler of Python would be timed.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for turn in range(repeats + 1):
        for statement in statements:
            command = [sys.executable, "-c", _IMPORT.format(statement)]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            if turn > 0:
                seconds[statement].append(float(done.stdout))
    return seconds


def compile_seconds(peer: str, case: Case) -> dict[str, float]:
    """Traces, lowers and compiles the pass of a case with empty caches."""
    import jax

    from tests.benchmarks.nets import train_step
    from tests.benchmarks.passes import layer_pass

    arguments, run = (layer_pass if case.kind == "layer" else train_step)(peer, case)
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(run).trace(*arguments).lower()
    middle = time.perf_counter()
    lowered.compile()
    return {"trace": middle - start, "compile": time.perf_counter() - middle}


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the median of each entry."""
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
