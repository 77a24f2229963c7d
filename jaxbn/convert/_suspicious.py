"""Tells what of a model looks as if a batch norm of it had been missed, or lost a part."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jaxbn._norm_names import names_of_role

# Other norms have no statistics to miss.
_BATCH_NORM = re.compile(r"batch_?norm|(?<![a-z])bn(?![a-z])", re.IGNORECASE)
_SPLIT = re.compile(r"[./]")
# Names of running statistics, in the table of names and beyond.
_STATISTICS = {
    name.split("/")[-1] if name.count("/") else name
    for role in ("mean", "var", "std", "renorm_mean", "renorm_std")
    for name in names_of_role(role)
} - {"average"}
_LIKE_STATISTICS = re.compile(
    r"(running|moving|ema|population)_?(mean|var|std|inv|average)|(mean|var|std)_?ema|"
    r"(moving|running)_average",
    re.IGNORECASE,
)
_PARAMS = {*names_of_role("scale"), *names_of_role("bias")}


def find_suspicious(
    layers: Mapping[str, Collection[str]], left: Iterable[str], flat: Mapping[str, Any]
) -> dict[str, str]:
    """Returns what to look at, and why.

    Args:
        layers: The roles of the arrays of each batch norm that was found.
        left: The names of the arrays that belong to none.
        flat: All arrays of the model.
    """
    suspicious = {}
    bare = [name for name, roles in layers.items() if not {"scale", "bias"} & {*roles}]
    if len(bare) < len(layers):
        suspicious |= dict.fromkeys(
            (name or "(itself)" for name in bare),
            "has statistics alone, the others params too: was it made without?",
        )
    for name in left:
        if why := _why(name, flat):
            suspicious[name] = why
    return suspicious


def _why(name: str, flat: Mapping[str, Any]) -> str | None:
    *path, last = _nodes(name)
    if last in _STATISTICS or _LIKE_STATISTICS.search(name):
        return "looks like a running statistic: which norm is it of?"
    is_norm = path and _BATCH_NORM.search(path[-1])
    if last not in _PARAMS or not is_norm or np.ndim(flat[name]) != 1:
        return None
    return "looks like a batch norm without statistics: does the file hold them elsewhere?"


def _nodes(name: str) -> list[str]:
    return [node for node in _SPLIT.split(name.removesuffix(":0")) if node] or [name]
