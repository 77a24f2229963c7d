"""Equinox: `BatchNorm` that changes one import, `Norm` for any normalizer."""

try:
    import equinox  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"jaxbn.equinox needs the package {error.name}, which is not installed. Run "
        "pip install 'jaxbn[equinox]'.",
        name=error.name,
    ) from error

from jaxbn.equinox._batch_norm import BatchNorm
from jaxbn.equinox._norm import Norm
from jaxbn.equinox._replace import replace

__all__ = ["BatchNorm", "Norm", "replace"]

# Pickles and tracebacks name the public package, so that files may move.
for _public in (BatchNorm, Norm):
    _public.__module__ = __name__
