"""Folding in a whole model: pairs of layers in a tree of variables, by their names."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxbn._dtypes import at_least_float32
from jaxbn._fold.affine import Affine, as_affine, refused
from jaxbn._fold.kernels import fold_beside
from jaxbn._fold.pairs import (
    Pairs,
    as_plain,
    find_layers,
    node_at,
    ordered_pairs,
    split,
)
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._state import BatchNormParams, BatchStats, stats_of
from jaxbn._typing import Array, PyTree


def fold_tree(
    variables: Mapping[str, PyTree],
    *,
    epsilon: float | Mapping[str, float],
    pairs: Pairs | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    norms: Literal["removed", "folded"] = "removed",
) -> dict[str, Any]:
    """Returns the variables of a Flax model with its norms folded into their neighbours.

    With norms="removed", the variables are those of the same model without these norms,
    whose linear layers all have a bias: build it so, or for NNX, use `jaxbn.nnx.fold`.
    With norms="folded", they are for the same linen model as it is, whoever wrote its
    norms: each gets the arrays with which it is exactly the identity in inference (a
    variance of 1 - epsilon, a mean and a bias of 0, a scale of 1), or where the linear
    layer has no bias of its own, adds what is left of the norm, by its mean. In training,
    a layer would normalize all the same: train with the variables from before.

    Args:
        variables: {"params": ..., "batch_stats": ...} of linen, or the nested dict of NNX,
            nnx.to_pure_dict(nnx.state(model)), or that of a checkpoint of its state.
        epsilon: That of the norms, which no array tells, or those of each by its path.
        pairs: Pairs of paths with slashes, in the order of application: (linear, norm), or
            (norm, linear). Or "by name" for `find_pairs`, which must then know all norms;
            what it paired is shown by the logger "jaxbn".
        options: Further arguments of `fold` and `fold_into_next` by the path of the linear
            layer, such as {"Conv_1": {"padding": "VALID"}}.
        norms: "removed" or "folded".

    Returns:
        New variables, as nested dicts; those passed in are as they were.

    Raises:
        ValueError: pairs is not told, and the message shows what names would tell; a pair
            is no norm and linear layer of this tree, or names what lies between the two; a
            layer is folded twice; a norm has no partner; or as `fold`, `fold_into_next` and
            `as_affine` do. The message names the layers.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> stats = {"mean": jnp.array([1.0]), "var": jnp.array([3.0])}
        >>> variables = {"conv1": {"kernel": jnp.array([[4.0]])}, "bn1": stats}
        >>> print(jaxbn.fold_tree(variables, epsilon=1.0, pairs=[("conv1", "bn1")]))
        {'conv1': {'kernel': Array([[2.]], dtype=float32),
                   'bias': Array([-0.5], dtype=float32)}}
    """
    variables = as_plain(variables)
    layers = find_layers(variables)
    if norms not in ("removed", "folded"):
        raise ValueError(f'norms must be "removed" or "folded", got {norms!r}.')
    if norms == "folded" and split(variables)[0] is variables:
        raise refused(
            'norms="folded" is for the variables of linen, {"params": ..., "batch_stats": '
            '...}, got a single tree. Use norms="removed", or jaxbn.nnx.fold(model).'
        )
    options = options or {}
    ordered = ordered_pairs(variables, layers, pairs)
    unknown = set(options) - set(layers.linears)
    if unknown:
        raise refused(
            f"options name {sorted(unknown)}, but the linear layers are "
            f"{sorted(layers.linears)}. Write paths with slashes."
        )
    params, stats = split(variables)
    for linear, norm, after in ordered:
        try:
            _fold_pair(
                node_at(params, layers.linears[linear]),
                node_at(stats, layers.norms[norm]),
                node_at(params, layers.norms[norm]),
                _epsilon_of(epsilon, norm),
                norms == "removed",
                {"after": after, **options.get(linear, {})},
            )
        except ValueError as error:
            raise ValueError(f"cannot fold {norm} and {linear}: {error}") from error
    return _pruned(variables)


def _fold_pair(
    linear: dict[str, Any],
    norm: dict[str, Any],
    trained: dict[str, Any],
    epsilon: float,
    remove: bool,
    options: dict[str, Any],
) -> None:
    """Folds a norm of the statistics `norm` and the params `trained`, in place."""
    params = BatchNormParams(trained.get("scale"), trained.get("bias"))
    state = BatchStats(norm["mean"], norm["var"])
    affine = as_affine(params, state, BatchNorm(epsilon=epsilon))
    bias, left = linear.get("bias"), jnp.zeros_like(affine.bias)
    # A linear layer that was made without a bias cannot take one in the same model.
    if not remove and bias is None:
        if not options["after"] and bool(jnp.any(affine.bias)):
            raise refused(
                "the linear layer has no bias to take the offset of the norm before it. "
                'Give it one (use_bias=True), or use norms="removed".'
            )
        left, affine = affine.bias, Affine(affine.scale, left)
    linear["kernel"], offset = fold_beside(linear["kernel"], bias, affine, **options)
    if remove or bias is not None:
        linear["bias"] = offset
    if remove:
        trained.clear()
        norm.clear()
    else:
        _let_pass(norm, trained, left, epsilon)


def _let_pass(
    norm: dict[str, Any], trained: dict[str, Any], offset: Array, epsilon: float
) -> None:
    """Gives a norm the arrays with which inference returns exactly x + offset."""
    dtype = at_least_float32(jnp.result_type(norm["var"]))
    var = np.ones((), dtype) - np.asarray(epsilon, dtype)
    if var < 0:
        raise refused(
            f'norms="folded" gives the norm a variance of 1 - epsilon, got epsilon='
            f'{epsilon}. Use norms="removed".'
        )
    # The mean adds the offset: a norm without a bias has one, and never in half precision.
    state = stats_of(norm)
    assert state is not None
    state = state.renewed(-offset, jnp.full(jnp.shape(norm["var"]), var))
    norm |= {name: leaf for name, leaf in state._asdict().items() if leaf is not None}
    for name, value in ("scale", 1), ("bias", 0):
        if name in trained:
            trained[name] = jnp.full_like(trained[name], value)


def _epsilon_of(epsilon: float | Mapping[str, float], norm: str) -> float:
    if not isinstance(epsilon, Mapping):
        return epsilon
    if norm not in epsilon:
        raise refused(
            f"epsilon tells nothing of this norm, only of {sorted(epsilon)}. Give that of "
            "every norm, or one number for all."
        )
    return epsilon[norm]


def _pruned(tree: Any) -> Any:
    """Returns a nested dict without the parts that are empty."""
    if not isinstance(tree, dict):
        return tree
    parts = {key: _pruned(part) for key, part in tree.items()}
    return {key: part for key, part in parts.items() if not isinstance(part, dict) or part}
