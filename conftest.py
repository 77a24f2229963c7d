"""How the programs of tests and of examples in texts are compiled."""

import contextlib

import jax
import pytest

from tests.compiling import compiled_fast


@pytest.fixture(autouse=True, scope="module")
def programs(request):
    """Compiles the programs of a file fast, unless it says `OPTIMIZED`.

    Afterwards frees them, which are gigabytes over the whole suite.
    """
    optimized = getattr(getattr(request.node, "obj", None), "OPTIMIZED", False)
    with contextlib.nullcontext() if optimized else compiled_fast():
        yield
    jax.clear_caches()
