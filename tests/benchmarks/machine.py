"""The machine, the versions and the environment that figures belong to."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# glibc gives what is larger than 32 MiB back to the kernel at every call, so that each
# result is mapped page by page again, which can take longer than the pass itself.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_ARENA_MAX": "1",
}
# As the kernel of Linux calls them, the widest first.
VECTORS = {"avx512_bf16": "AVX-512 and bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
PACKAGES = (
    "jaxbn", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch", "numpy",
    "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Returns what tells one run from another."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "allocator": ALLOCATOR,
    }


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if _linux() else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": load(),
    }


def versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def load() -> float:
    """Returns how many processes have wanted to run, over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def _linux() -> bool:
    return hasattr(os, "sched_getaffinity")


def _processor() -> str:
    """Returns its name, and the vectors that it knows: bfloat16 is slow without AVX-512."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    name = names[0] if names else platform.processor() or "unknown"
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    vectors = [word for flag, word in VECTORS.items() if flag in flags]
    return f"{name} with {vectors[0]}" if vectors else name
