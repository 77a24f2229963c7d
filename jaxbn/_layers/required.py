"""What a layer asks of the normalizer that it is given to hold."""

from typing import Any

from jaxbn._layers.checks import signature_of
from jaxbn._layers.normalizer import Normalizer


def require(user: str, normalizer: Any, *names: str) -> None:
    """Raises unless `normalizer` answers the methods `names`, which `user` needs."""
    for name in names:
        if not callable(getattr(normalizer, name, None)):
            raise TypeError(
                f"{user} asks a normalizer for {name}, which {type(normalizer).__name__} "
                "does not answer. Wrap the layer itself, or write the method "
                f"`{signature_of(Normalizer, name)}`, for which jaxbn.Normalizer may have "
                "a default."
            )
