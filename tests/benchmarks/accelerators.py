"""Bytes on accelerators that are not there, counted in a process of their own."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.benchmarks import h200, machine, tpu

MODULES = {"h200": h200, "tpu": tpu}


def count(name: str, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """Returns the counts, or None where what compiles for the device is missing."""
    if name == "tpu" and importlib.util.find_spec("libtpu") is None:
        tell("SKIPPED --bytes-tpu: libtpu is not installed (pip install 'jax[tpu]').")
        return None
    if name == "h200":
        try:
            h200.plugin_folder()
        except subprocess.CalledProcessError as error:
            tell(f"SKIPPED --bytes-h200: pip cannot install the plugin ({error}).")
            return None
    module = MODULES[name]
    done = subprocess.run(
        [sys.executable, "-m", module.__name__],
        env={**os.environ, **module.environment()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {**machine.describe(), "shape": module.SHAPE, "rows": json.loads(done.stdout)}
