"""The norms and linear layers of a tree of variables, and which belong together by name."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxbn._fold.affine import refused
from jaxbn._norm_names import LINEAR_LAYERS, NORM_LAYERS
from jaxbn._typing import PyTree

Path = tuple[Any, ...]
Pairs = Literal["by name"] | Sequence[Sequence[str]]

_LOGGER = logging.getLogger("jaxbn")

_WORDS = re.compile(f"{NORM_LAYERS}|{LINEAR_LAYERS}", re.IGNORECASE)


class Layers(NamedTuple):
    """The norms and the linear layers of a model: their paths, by their names."""

    norms: dict[str, Path]
    linears: dict[str, Path]


def find_layers(variables: Mapping[str, PyTree]) -> Layers:
    """Returns the layers of variables of linen, or of a nested dict of NNX."""
    params, stats = split(as_plain(variables))
    norms = {
        name_of(path): path
        for path, node in _nodes(stats)
        if _has(node, "mean") and _has(node, "var")
    }
    linears = {name_of(path): path for path, node in _nodes(params) if _has(node, "kernel")}
    if not norms:
        raise refused(
            f"there is no norm in the variables, which hold {sorted(map(str, variables))}. "
            'Pass {"params": ..., "batch_stats": ...}, or for NNX '
            "nnx.to_pure_dict(nnx.state(model))."
        )
    return Layers(norms, linears)


def find_pairs(variables: Mapping[str, PyTree]) -> tuple[tuple[str, str], ...]:
    """Returns which norm comes after which linear layer, as far as their names tell.

    Names tell it where they differ in nothing but the words for the kinds of layers, such
    as Conv_0 and BatchNorm_0, conv1 and bn1, conv_proj and norm_proj, or where layers of
    a sequence follow one another, such as layers_0 and layers_1; and where the features
    agree. Names are no proof: a norm may be applied before its namesake, or behind an
    activation. `check_fold` tells.

    Args:
        variables: Those of a linen model, or a nested dict of NNX, also as Orbax returns
            the state of an NNX model that it saved.

    Returns:
        Pairs (linear layer, norm) of paths, with slashes, for `fold_tree`. A norm without
        a partner is in none of them.

    Raises:
        ValueError: There is no norm.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
        >>> tree = {"conv1": {"kernel": jnp.ones((2, 3))}, "bn1": stats, "bn2": stats}
        >>> jaxbn.find_pairs(tree)
        (('conv1', 'bn1'),)
    """
    variables = as_plain(variables)
    params, stats = split(variables)
    layers = find_layers(variables)
    pairs = []
    for norm, path in layers.norms.items():
        size = jnp.shape(node_at(stats, path)["mean"])
        namesakes = [
            (linear, jnp.shape(node_at(params, other)["kernel"]))
            for linear, other in layers.linears.items()
            if path and other[:-1] == path[:-1] and _match(str(other[-1]), str(path[-1]))
        ]
        # Output features lie on the last axis, or on the one before in a transposed kernel.
        for kernels in (
            [linear for linear, shape in namesakes if shape[-1:] == size],
            [linear for linear, shape in namesakes if shape[2:] and shape[-2:-1] == size],
        ):
            if kernels:
                if len(kernels) == 1:
                    pairs.append((kernels[0], norm))
                break
    # Nothing tells which of two norms with one partner is right, so neither is proposed.
    partners = [linear for linear, _ in pairs]
    return tuple(pair for pair in pairs if partners.count(pair[0]) == 1)


def ordered_pairs(
    variables: Mapping[str, PyTree], layers: Layers, pairs: Pairs | None
) -> list[tuple[str, str, bool]]:
    """Returns pairs as (linear, norm, whether the norm comes after)."""
    if pairs is None:
        raise refused(
            "pairs does not tell which layers are neighbours. By their names, "
            f"{_shown(find_pairs(variables))}. Pass pairs=[(linear, norm), ...], or "
            'pairs="by name" if that is right.'
        )
    if isinstance(pairs, str):
        if pairs != "by name":
            raise refused(
                f'pairs must be "by name" or a list of pairs, got {pairs!r}. Write '
                "[(linear, norm), ...]."
            )
        pairs = _by_name(variables, layers)
    ordered, used = [], set()
    for pair in pairs:
        linear, norm, after = _ordered(pair, layers)
        # A linear layer may take one norm before it and one after it.
        for name, side in ((norm, None), (linear, after)):
            if (name, side) in used:
                raise refused(
                    f"{name} is in two pairs. A norm is folded once, and a linear layer "
                    "takes one norm on each side."
                )
            used.add((name, side))
        ordered.append((linear, norm, after))
    return ordered


def _by_name(
    variables: Mapping[str, PyTree], layers: Layers
) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of all norms, and shows them, as names are no proof."""
    pairs = find_pairs(variables)
    lonely = sorted(set(layers.norms) - {norm for _, norm in pairs})
    if lonely:
        raise refused(
            f"the names do not tell which linear layers {lonely} come after, among "
            f"{sorted(layers.linears)}. Pass pairs=[(linear, norm), ...], or "
            "pairs=jaxbn.find_pairs(variables) to leave these norms as they are."
        )
    _LOGGER.warning(
        "By their names, which are no proof, %s. Prove it with jaxbn.check_fold.",
        _shown(pairs),
    )
    return pairs


def _shown(pairs: Iterable[tuple[str, str]]) -> str:
    shown = [f"{norm} is folded into {linear}" for linear, norm in pairs]
    return ", ".join(shown) or "no norm comes after a linear layer"


def _ordered(pair: Sequence[str], layers: Layers) -> tuple[str, str, bool]:
    if isinstance(pair, str) or len(pair) < 2:
        raise refused(
            f"{pair!r} is no pair of layers. Write (linear, norm) or (norm, linear)."
        )
    if len(pair) > 2:
        raise refused(
            f"between {pair[0]} and {pair[-1]} lies {', '.join(pair[1:-1])}, and a norm "
            "moves past no activation: folding is exact for neighbours only. Leave this "
            "pair out."
        )
    first, second = pair
    if first in layers.linears and second in layers.norms:
        return first, second, True
    if first in layers.norms and second in layers.linears:
        return second, first, False
    raise refused(
        f"{tuple(pair)} is no pair of a norm and a linear layer: the norms are "
        f"{sorted(layers.norms)}, the linear layers {sorted(layers.linears)}. Write paths "
        "with slashes."
    )


def as_plain(tree: Mapping[Any, PyTree]) -> dict[Any, Any]:
    """Returns a nested dict of its own with the same arrays.

    Without the {"value": array} that Orbax writes for each variable of an `nnx.State`.
    """
    leaves = (
        key
        for _, node in _nodes(tree)
        for key, part in node.items()
        if not isinstance(part, Mapping)
    )
    boxed = all(key == "value" for key in leaves)

    def plain(part: PyTree) -> PyTree:
        if not isinstance(part, Mapping):
            return part
        if boxed and part.keys() == {"value"}:
            return part["value"]
        return {key: plain(inner) for key, inner in part.items()}

    return {key: plain(part) for key, part in tree.items()}


def split(variables: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
    """Returns the trees that hold the params and the statistics, which may be one."""
    if "params" in variables and "batch_stats" in variables:
        return variables["params"], variables["batch_stats"]
    return variables, variables


def node_at(tree: PyTree, path: Path) -> Any:
    """Returns the part of a nested dict at `path`, or an empty one."""
    for key in path:
        tree = tree.get(key, {})
    return tree


def name_of(path: Path) -> str:
    """Returns a path as users write it."""
    return "/".join(map(str, path))


def _nodes(tree: PyTree, path: Path = ()) -> Iterator[tuple[Path, Mapping[Any, Any]]]:
    if isinstance(tree, Mapping):
        yield path, tree
        for key, part in tree.items():
            yield from _nodes(part, (*path, key))


def _has(node: Mapping[Any, Any], name: str) -> bool:
    return name in node and not isinstance(node[name], Mapping)


def _match(linear: str, norm: str) -> bool:
    trunks = [_WORDS.sub("", name).replace("_", "").lower() for name in (linear, norm)]
    if _WORDS.search(linear) and _WORDS.search(norm):
        return trunks[0] == trunks[1]
    first, second = (re.fullmatch(r"(.*?)(\d+)", name) for name in (linear, norm))
    if first is None or second is None or first[1] != second[1]:
        return False
    return int(first[2]) + 1 == int(second[2])
