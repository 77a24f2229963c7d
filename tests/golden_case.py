"""The old name of `tests.golden_runners.case`, for tests/test_convert.py."""

from tests.golden_runners.case import Case

__all__ = ["Case"]
