"""Norms of a model that others wrote: which are meant, and what became of each."""

import fnmatch
from collections.abc import Iterable
from typing import Any, NamedTuple

# What a norm may be given besides: none of it changes the variables.
SETTINGS = "momentum", "epsilon", "dtype", "axis_name", "axis_index_groups"


class NormChange(NamedTuple):
    """One norm of a model that was changed.

    Attributes:
        path: Where it is, with slashes.
        was: What it was, with the settings that matter.
        now: What it is.
    """

    path: str
    was: str
    now: str


class Changed(list[NormChange]):
    """The norms that were changed, in their order; it prints one on a line."""

    def __repr__(self) -> str:
        return "\n".join(f"{path}: {was} -> {now}" for path, was, now in self)


def shown(layer: Any) -> str:
    """Returns a batch norm of Flax, or of jaxbn for Flax, with its settings."""
    package = type(layer).__module__.split(".")[0]
    defaults = {"dtype": None, "axis_name": None, "axis_index_groups": None}
    words = [
        f"{name}={getattr(layer, name)!r}"
        for name in SETTINGS
        if name not in defaults or getattr(layer, name) is not None
    ]
    return f"{package}.{type(layer).__name__}({', '.join(words)})"


def fits(only: str, path: str) -> bool:
    """Tells whether a path is meant by `only`, a pattern with * as of file names."""
    return fnmatch.fnmatchcase(path, only)


def nothing_found(paths: Iterable[str], only: Any) -> ValueError:
    """Returns the error of a model with norms at `paths`, of which none is meant."""
    paths = sorted(paths)
    if not paths:
        return ValueError(
            "the model has no batch norm to change. Pass the model that has them; norms of "
            "one's own class are not known here."
        )
    some = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
    return ValueError(
        f"only={only!r} fits none of the norms of the model: {some}. Write a pattern of "
        'their paths, such as "encoder/*", or leave it out for all.'
    )


def check_settings_known(function: str, changes: Iterable[str], *more: str) -> None:
    """Raises unless `changes` are settings that leave the variables as they are."""
    known = (*more, *SETTINGS)
    for name in changes:
        if name not in known:
            raise TypeError(
                f"{function} has no setting {name}, which would ask for other variables. "
                f"Choose from {', '.join(known)}."
            )
