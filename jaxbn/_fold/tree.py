"""Folding in a whole model: pairs of layers in a tree of variables, by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxbn._fold.affine import Affine, affine_of
from jaxbn._fold.kernels import fold, fold_into_next
from jaxbn._fold.pairs import (
    Path,
    all_pairs,
    checked_pairs,
    find_layers,
    node_at,
    split,
)
from jaxbn._typing import PyTree

# What `fold` does not need to know.
_ONLY_NEXT = ("padding", "transposed")


def fold_tree(
    variables: Mapping[str, PyTree],
    *,
    epsilon: float | Mapping[str, float],
    pairs: Sequence[Sequence[str]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    norms: str = "removed",
) -> dict[str, Any]:
    """Returns the variables of a Flax model with its norms folded into their neighbours.

    With norms="removed", the variables are those of the same model without these norms,
    whose linear layers all have a bias: build it so, or for NNX, use `jaxbn.nnx.fold`.
    With norms="folded", they are for the same linen model as it is: its layers
    `jaxbn.linen.BatchNorm` and `Norm` find a leaf `folded` among their statistics, and
    hand their input on, or where the linear layer has no bias of its own, add what is
    left of the norm: its bias.

    Args:
        variables: {"params": ..., "batch_stats": ...} of linen, or the nested dict of NNX,
            nnx.to_pure_dict(nnx.state(model)).
        epsilon: That of the norms, which no array tells, or those of each by its path.
        pairs: Pairs of paths with slashes, in the order of application: (linear, norm), or
            (norm, linear). None for `find_pairs`, which must then know all norms.
        options: Further arguments of `fold` and `fold_into_next` by the path of the linear
            layer, such as {"Conv_1": {"padding": "VALID"}}.
        norms: "removed" or "folded".

    Returns:
        New variables, as nested dicts; those passed in are as they were.

    Raises:
        ValueError: A pair is no norm and linear layer of this tree, or names what lies
            between the two; a layer is folded twice; a norm has no partner; or as `fold`,
            `fold_into_next` and `as_affine` do. The message names the layers.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> stats = {"mean": jnp.array([1.0]), "var": jnp.array([3.0])}
        >>> variables = {"conv1": {"kernel": jnp.array([[4.0]])}, "bn1": stats}
        >>> print(jaxbn.fold_tree(variables, epsilon=1.0))
        {'conv1': {'kernel': Array([[2.]], dtype=float32),
                   'bias': Array([-0.5], dtype=float32)}}
    """
    layers = find_layers(variables)
    if norms not in ("removed", "folded"):
        raise ValueError(f'norms must be "removed" or "folded", got {norms!r}.')
    if norms == "folded" and split(variables)[0] is variables:
        raise ValueError(
            'norms="folded" is for the variables of linen, {"params": ..., "batch_stats": '
            '...}, got a single tree. Use norms="removed", or jaxbn.nnx.fold(model).'
        )
    ordered = checked_pairs(
        layers, all_pairs(variables, layers) if pairs is None else pairs
    )
    unknown = set(options or ()) - set(layers.linears)
    if unknown:
        raise ValueError(
            f"options name {sorted(unknown)}, but the linear layers are "
            f"{sorted(layers.linears)}. Write paths with slashes."
        )
    folded = _copy(variables)
    for first, second in ordered:
        linear, norm = (first, second) if first in layers.linears else (second, first)
        settings = dict((options or {}).get(linear, {}))
        try:
            _fold_pair(
                folded,
                (layers.linears[linear], layers.norms[norm]),
                first == linear,
                _epsilon_of(epsilon, norm),
                settings,
                norms == "removed",
            )
        except ValueError as error:
            raise ValueError(f"cannot fold {norm} and {linear}: {error}") from error
    return _pruned(folded)


def _fold_pair(
    tree: dict[str, Any],
    paths: tuple[Any, Any],
    after: bool,
    epsilon: float,
    settings: dict[str, Any],
    remove: bool,
) -> None:
    """Folds one norm of the copied `tree`, in place."""
    params, stats = split(tree)
    linear, norm = node_at(params, paths[0]), node_at(stats, paths[1])
    trained = _made(params, paths[1])
    affine = affine_of(
        norm["mean"],
        norm["var"],
        trained.get("scale"),
        trained.get("bias"),
        epsilon=epsilon,
    )
    bias = linear.get("bias")
    for name in () if not after else _ONLY_NEXT:
        settings.pop(name, None)
    if not remove and bias is None and not after and bool(jnp.any(affine.bias)):
        raise ValueError(
            "the linear layer has no bias to take the offset of the norm before it. Give "
            'it one (use_bias=True), or use norms="removed".'
        )
    # Without a bias of its own, a linear layer of the same model cannot take one.
    left = affine.bias if not remove and bias is None and after else None
    if left is not None:
        affine = Affine(affine.scale, jnp.zeros_like(affine.bias))
    kernel, offset = (fold if after else fold_into_next)(
        linear["kernel"], bias, affine, **settings
    )
    linear["kernel"] = kernel
    if remove or bias is not None:
        linear["bias"] = offset
    trained.clear()
    norm.clear()
    if left is not None:
        trained["bias"] = left
    if not remove:
        norm["folded"] = jnp.ones((), bool)


def _made(tree: PyTree, path: Path) -> dict[str, Any]:
    """Returns the part of a nested dict at `path`, put there where it is missing."""
    for key in path:
        tree = tree.setdefault(key, {})
    return tree


def _epsilon_of(epsilon: float | Mapping[str, float], norm: str) -> float:
    if not isinstance(epsilon, Mapping):
        return epsilon
    if norm not in epsilon:
        raise ValueError(
            f"epsilon tells nothing of this norm, only of {sorted(epsilon)}. Give that of "
            "every norm, or one number for all."
        )
    return epsilon[norm]


def _copy(tree: PyTree) -> Any:
    """Returns a nested dict of its own with the same arrays."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: _copy(part) for key, part in tree.items()}


def _pruned(tree: Any) -> Any:
    """Returns a nested dict without the parts that are empty."""
    if not isinstance(tree, dict):
        return tree
    parts = {key: _pruned(part) for key, part in tree.items()}
    return {key: part for key, part in parts.items() if not isinstance(part, dict) or part}
