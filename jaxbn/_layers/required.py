"""What a function or a wrapper needs a normalizer to answer."""

from typing import Any

from jaxbn._layers.normalizer import signature_of


def require(user: str, normalizer: Any, *names: str) -> None:
    """Raises unless `normalizer` answers the methods `names`, which `user` needs."""
    for name in names:
        if not callable(getattr(normalizer, name, None)):
            raise TypeError(
                f"{user} asks a normalizer for {name}, which {type(normalizer).__name__} "
                f"does not answer. Wrap the layer itself, or write the method "
                f"`{signature_of(name)}`, for which jaxbn.Normalizer may have a default."
            )
