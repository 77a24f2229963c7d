"""Finds the params of a norm whose statistics lie in another collection of the tree."""

import re
from collections.abc import Iterable, Mapping

import jax

from jaxbn._norm_names import names_of_role
from jaxbn._param_roles import names_of
from jaxbn._state import BatchNormParams
from jaxbn._typing import PyTree

Names = tuple[str, ...]

# How collections of params and of statistics are called, whatever stands around it: ema_.
_PARAMS = re.compile(r"trainable(_variables)?|params|parameters|weights")
_STATS = re.compile(
    r"non_?trainable(_variables)?|batch_?stats|statistics|stats|(model_?)?state|buffers"
)
_OF_PARAMS = {*names_of_role("scale"), *names_of_role("bias")}
_OF_STATS = {name.split("/")[-1] for name in names_of_role("mean")}


class Collections:
    """A tree as far as it tells which params belong to which statistics.

    Collections differ in one node of the path. That node is named as collections are
    (params and batch_stats, ema_params and ema_batch_stats), or is a place in the tuple
    that the tree is, such as (params, state), or holds `BatchNormParams`. Any other path
    that differs in one node is a neighbour, with arrays of its own.
    """

    def __init__(self, tree: PyTree, index: Mapping[Names, int]):
        self._paths = list(index)
        nodes = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, BatchNormParams)
        )
        self._ours = {
            names_of(path) for path, node in nodes if isinstance(node, BatchNormParams)
        }
        self._is_tuple = isinstance(tree, (tuple, list))
        self._trunks = dict.fromkeys(p[:-1] for p in index if p[-1] in _OF_PARAMS)

    def trunks(self, base: Names) -> Iterable[Names]:
        """Yields where the params of the norm at `base` may be, the likeliest first."""
        ranked = [
            (rank, trunk)
            for trunk in self._trunks
            if (rank := self._rank(trunk, base)) is not None
        ]
        return [trunk for _, trunk in sorted(ranked)]

    def _rank(self, trunk: Names, base: Names) -> int | None:
        apart = [
            i for i, pair in enumerate(zip(trunk, base, strict=False)) if len({*pair}) > 1
        ]
        if len(trunk) != len(base) or len(apart) != 1:
            return None
        i = apart[0]
        around = (
            _around(_PARAMS, trunk[i]),
            _around(_STATS, base[i]),
        )
        if None not in around:
            return 0 if around[0] == around[1] else 1
        if trunk in self._ours or (self._is_tuple and i == 0):
            return 2 if self._hold_one_kind(trunk[: i + 1], base[: i + 1]) else None
        return None

    def _hold_one_kind(self, params: Names, stats: Names) -> bool:
        """Whether one of two parts of the tree has no statistics, the other no params."""
        return not any(
            (path[: len(params)] == params and path[-1] in _OF_STATS)
            or (path[: len(stats)] == stats and path[-1] in _OF_PARAMS - {"weight"})
            for path in self._paths
        )


def _around(word: re.Pattern[str], name: str) -> str | None:
    """Returns what stands around the word for a collection in a name, or None."""
    name = name.lower()
    rest, found = word.subn("", name, count=1)
    return rest.strip("_-. ") if found else None
