"""How the programs of tests and of examples in texts are compiled."""

import contextlib
import gc

import jax
import pytest

from tests.compiling import compiled_fast

# A collection then no longer walks all that was imported: 3 % of the suite's time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def programs(request):
    """Compiles the programs of a file fast, unless it says `OPTIMIZED`.

    Afterwards frees them, which are gigabytes over the whole suite.
    """
    optimized = getattr(getattr(request.node, "obj", None), "OPTIMIZED", False)
    with contextlib.nullcontext() if optimized else compiled_fast():
        yield
    jax.clear_caches()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives a file to one process, unless `--dist` says otherwise.

    The tests of a file share programs, which each process would compile for itself.
    """
    if config.getoption("dist") != "load":
        return None
    # Files with the most tests would come first, and one long test would end alone.
    config.option.loadscopereorder = False
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
