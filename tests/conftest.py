"""Settings under which every test runs, and the options of the command line."""

import itertools
from pathlib import Path

import hypothesis
import jax
import pytest

from jaxbn._kernels import cpu as _cpu
from jaxbn._kernels import tiles as _tiles

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# `--hypothesis-profile=drawn` or `nightly` is for the tests marked `drawn`.
_common = {"deadline": None, "database": None, "print_blob": True}
_slow = {**_common, "suppress_health_check": list(hypothesis.HealthCheck)}
for _name, _settings in {
    "jaxbn": {"max_examples": 25, "derandomize": True, "deadline": None},
    "drawn": {"max_examples": 2_000, **_slow},
    "nightly": {"max_examples": 10_000, **_slow},
}.items():
    hypothesis.settings.register_profile(_name, **_settings)
hypothesis.settings.load_profile("jaxbn")


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        metavar="DIR",
        help="folder of recorded cases for test_golden.py, with a manifest.json",
    )


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Takes sums over tiles so small that some rows of small arrays are left over."""
    jax.clear_caches()
    dtypes = "float16", "bfloat16", "float32"
    monkeypatch.setattr(
        _tiles, "LARGE", dict.fromkeys(itertools.product(dtypes, (1, 2)), 0)
    )
    monkeypatch.setattr(_tiles, "TILE", 1200)
    monkeypatch.setattr(_cpu, "is_small", lambda x: False)
    yield
    jax.clear_caches()
