"""Haiku: `BatchNorm` that changes one import, `Norm` for any normalizer."""

try:
    import haiku  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"jaxbn.haiku needs the package {error.name}, which is not installed. Run "
        "pip install 'jaxbn[haiku]'.",
        name=error.name,
    ) from error

from jaxbn.haiku._batch_norm import BatchNorm
from jaxbn.haiku._norm import Norm

__all__ = ["BatchNorm", "Norm"]

# Pickles and tracebacks name the public package, so that files may move.
for _public in (BatchNorm, Norm):
    _public.__module__ = __name__
