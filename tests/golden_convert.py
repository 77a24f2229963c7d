"""The old name of `tests.golden_runners.convert`, for tests/test_convert.py."""

from tests.golden_runners.convert import run_layer

__all__ = ["run_layer"]
