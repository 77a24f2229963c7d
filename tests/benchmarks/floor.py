"""The traffic of a pass without its arithmetic: the time that nobody can go below."""

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.cases import Case
from tests.benchmarks.layers import UnfitError

# What a pass reads and writes, one sweep after another, as operands r, r and w.
_SWEEPS = {
    "inference": ("xy",),
    "training": ("x", "xy"),
    "gradient": ("x", "xy", "xd", "xdg"),
    "inference+add": ("xzy",),
    "training+add": ("x", "xzy"),
    "gradient+add": ("x", "xzy", "xdyh", "xhg"),
}
_WRITTEN = "ygh"

# n counts words of 8 bytes. The sums are used, so that no compiler drops the reads.
_SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#define SWEEP(n) \
  _Pragma("omp parallel for simd schedule(static) reduction(^ : s) if (n > 8192)") \
  for (ptrdiff_t i = 0; i < n; i++)
typedef const uint64_t *restrict R;
typedef uint64_t *restrict W;
uint64_t r1(ptrdiff_t n, R a) { uint64_t s = 0; SWEEP(n) s ^= a[i]; return s; }
uint64_t r2(ptrdiff_t n, R a, R b) { uint64_t s = 0; SWEEP(n) s ^= a[i] + b[i]; return s; }
uint64_t r1w(ptrdiff_t n, R a, W y) { uint64_t s = 0; SWEEP(n) y[i] = a[i] + 1; return s; }
uint64_t r2w(ptrdiff_t n, R a, R b, W y) {
  uint64_t s = 0; SWEEP(n) y[i] = a[i] + b[i]; return s; }
uint64_t r3w(ptrdiff_t n, R a, R b, R c, W y) {
  uint64_t s = 0; SWEEP(n) y[i] = a[i] + b[i] + c[i]; return s; }
"""


class Floor:
    """The sweeps of a pass over arrays of x's bytes; the calls of `passes.Program`."""

    temp = kernels = None
    layers = 1
    check: tuple[float, ...] = ()

    def __init__(self, case: Case):
        if case.kind != "layer":
            raise UnfitError("a net has convolutions")
        words = max(1, case.bytes_of_x // 8)
        sweeps = _SWEEPS[case.mode + ("+add" if case.adds else "")]
        arrays = {name: np.ones(words, np.uint64) for name in set("".join(sweeps))}
        self._kernels = kernels()
        self._sweeps = [
            (tuple(arrays[name] for name in sweep), sweep[-1] in _WRITTEN)
            for sweep in sweeps
        ]
        moved = sum(len(sweep) for sweep in sweeps)
        assert moved == case.units, f"{case.what} needs {case.units} units, not {moved}"

    def times(self, calls: int) -> None:
        """Runs the sweeps so many times."""
        for _ in range(calls):
            for arrays, writes in self._sweeps:
                self._kernels.sweep(arrays, writes)


class _Compiled:
    """Sweeps in C, over all cores."""

    how = "C, compiled with OpenMP"

    def __init__(self):
        compiler = shutil.which("cc")
        if compiler is None:
            raise UnfitError("there is no cc")
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "floor.c"), Path(folder, "floor.so")
            source.write_text(_SOURCE)
            flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            command = [compiler, *flags, str(source), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnfitError(f"cc failed: {done.stderr.strip()[-300:]}")
            self._library = ctypes.CDLL(str(library))

    def sweep(self, arrays, writes):
        name = f"r{len(arrays) - writes}{'w' if writes else ''}"
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        getattr(self._library, name)(ctypes.c_ssize_t(arrays[0].size), *pointers)


class _Numpy:
    """Sweeps in NumPy, a part of the arrays for each core. Extra operands are added."""

    how = "NumPy in threads, since there is no C compiler"

    def __init__(self):
        self._threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads)

    def sweep(self, arrays, writes):
        step = math.ceil(arrays[0].size / self._threads)
        starts = range(0, arrays[0].size, step)
        parts = [[array[start : start + step] for array in arrays] for start in starts]
        run = _write if writes else _read
        list(self._pool.map(run, parts))


def _read(arrays):
    for array in arrays:
        np.bitwise_xor.reduce(array)


def _write(arrays):
    *read, result = arrays
    if len(read) == 1:
        np.copyto(result, read[0])
    else:
        np.add(read[0], read[1], out=result)
        for array in read[2:]:
            np.bitwise_xor.reduce(array)


_kernels: list[Any] = []


def kernels():
    """Returns the sweeps in C, or in NumPy where no C can be compiled."""
    if not _kernels:
        try:
            _kernels.append(_Compiled())
        except UnfitError:
            _kernels.append(_Numpy())
    return _kernels[0]
