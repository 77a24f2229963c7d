"""Runs a model on batches to measure its layers: moments, momentum, noise."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._dtypes import at_least_float32
from jaxbn._statistics.moments import Moments, merge_moments
from jaxbn._typing import PyTree
from jaxbn.diagnose._find_norms import NormArrays

# What a layer tracks, by the roles of arrays.
STATISTICS = frozenset({"mean", "var", "std", "weight"})
Apply = Callable[[PyTree, Any, bool], tuple[Any, PyTree]]


class Measurement(NamedTuple):
    """What the batches say about a layer.

    Attributes:
        tracked: Whether a training step changes the statistics.
        momentum: The decay of that step; NaN where there is none.
        mean: The mean over all batches.
        var: The variance over all batches.
        noise: How far the mean of one batch lies from that of all, in standard deviations.
        batches: How many there were.
        rows: The length of the first.
    """

    tracked: bool
    momentum: float
    mean: np.ndarray
    var: np.ndarray
    noise: float
    batches: int
    rows: int


def measure_layers(
    tree: PyTree, layers: Sequence[NormArrays], apply: Apply, batches: Iterable[Any]
) -> list[Measurement]:
    """Returns what the layers see of the batches in training.

    The decay m and the batch b come from two steps on the same batch, one from statistics
    of 0, one from a large variance v: (1 - m) b and m v + (1 - m) b. Layers that a step
    does not move may read their statistics, and keep them in both.

    Raises:
        TypeError: `apply` does not return a pair.
        ValueError: There are no batches; `apply` returns other variables than it got.
    """
    batches = list(batches)
    if not batches:
        raise ValueError(
            "apply was given, but no batches. Pass a few batches of the size of those in "
            "training: diagnose(variables, apply, batches)."
        )
    moved = _leaves_after(tree, apply, batches[0])
    tracked = [
        any(
            not np.array_equal(moved[layer.leaves[f]], layer.arrays[f], equal_nan=True)
            for f in ("mean", "var")
        )
        for layer in layers
    ]
    moving = [layer for layer, on in zip(layers, tracked, strict=True) if on]
    blanks = _blanks(moving)
    blank = with_leaves(tree, blanks)
    steps = [_leaves_after(blank, apply, batch) for batch in batches]
    large = with_leaves(tree, blanks | _large(moving, steps[0]))
    lifted = _leaves_after(large, apply, batches[0]) if moving else []
    rows = [_rows(batch) for batch in batches]
    return [
        _measurement(layer, on, lifted, steps, rows)
        for layer, on in zip(layers, tracked, strict=True)
    ]


def _measurement(
    layer: NormArrays,
    tracked: bool,
    lifted: list[np.ndarray],
    steps: list[list[np.ndarray]],
    rows: list[int],
) -> Measurement:
    shape = len(rows), rows[0]
    nothing = np.full_like(layer.var, np.nan)
    if not tracked:
        return Measurement(False, np.nan, nothing, nothing, np.nan, *shape)
    leaves, weighted = layer.leaves, layer.get("weight") is not None
    momentum = _momentum(layer, lifted, steps[0])
    share = 1.0 if weighted else 1 - momentum
    if share <= 0:
        return Measurement(False, momentum, nothing, nothing, np.nan, *shape)
    means = [step[leaves["mean"]] / share for step in steps]
    spread = leaves.get("std")
    if spread is None:
        variances = [step[leaves["var"]] / share for step in steps]
    else:
        variances = [np.square(step[spread] / share) for step in steps]
    parts = [
        Moments(jnp.asarray(mean), jnp.asarray(var), jnp.full(var.shape, float(n)))
        for mean, var, n in zip(means, variances, rows, strict=True)
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge_moments(whole, part)
    mean, var = (
        np.asarray(array, old.dtype)
        for array, old in ((whole.mean, layer.mean), (whole.var, layer.var))
    )
    return Measurement(True, momentum, mean, var, _noise(means, var), *shape)


def _momentum(
    layer: NormArrays, lifted: list[np.ndarray], first: list[np.ndarray]
) -> float:
    weight = layer.leaves.get("weight")
    if weight is not None:
        # After the first batch the weight is 1 for a cumulative mean, 1 - m if debiased.
        after = float(np.median(first[weight]))
        return np.nan if after == 1 else 1 - after
    number = layer.leaves.get("std", layer.leaves["var"])
    before = _large([layer], first)[number]
    return float(np.clip(np.median((lifted[number] - first[number]) / before), 0, 1))


def _large(layers: Iterable[NormArrays], first: list[np.ndarray]) -> dict[int, np.ndarray]:
    """Returns spreads that leave nothing of what the first step from 0 gave to see."""
    numbers = (layer.leaves.get("std", layer.leaves["var"]) for layer in layers)
    return {i: np.full_like(first[i], 1e4 * max(1, np.nanmax(first[i]))) for i in numbers}


def _noise(means: list[np.ndarray], var: np.ndarray) -> float:
    """Returns the deviation of the means of batches, unbiased, in standard deviations."""
    alive = var > 1e-12 * var.max(initial=0)
    if len(means) < 2 or not alive.any():
        return np.nan
    between = np.var(np.stack(means), axis=0, ddof=1)
    return float(np.sqrt(np.mean(between[alive] / var[alive])))


def _blanks(layers: Iterable[NormArrays]) -> dict[int, np.ndarray]:
    return {
        layer.leaves[field]: np.zeros_like(layer.arrays[field])
        for layer in layers
        for field in sorted(STATISTICS & layer.leaves.keys())
    }


def with_leaves(tree: PyTree, replaced: Mapping[int, Any]) -> PyTree:
    """Returns the tree with some of its leaves replaced, in their shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    for i, array in replaced.items():
        old = jnp.asarray(leaves[i])
        leaves[i] = jnp.asarray(array, old.dtype).reshape(old.shape)
    return jax.tree.unflatten(structure, leaves)


def with_wide_statistics(tree: PyTree, layers: Iterable[NormArrays]) -> PyTree:
    """Returns the tree with statistics of at least float32, which half precision stalls."""
    leaves, structure = jax.tree.flatten(tree)
    for layer in layers:
        for field in STATISTICS & layer.leaves.keys():
            i = layer.leaves[field]
            leaves[i] = jnp.asarray(leaves[i], at_least_float32(jnp.result_type(leaves[i])))
    return jax.tree.unflatten(structure, leaves)


class Counted:
    """Calls a model, and counts how often."""

    def __init__(self, apply: Apply):
        self.apply = apply
        self.passes = 0

    def __call__(self, variables: PyTree, batch: Any, training: bool) -> tuple[Any, PyTree]:
        """Returns what the model returns."""
        self.passes += 1
        return self.apply(variables, batch, training)


def _leaves_after(tree: PyTree, apply: Apply, batch: Any) -> list[np.ndarray]:
    """Returns the leaves of the variables after one training step on a batch."""
    result = apply(tree, batch, True)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"apply must return a pair (y, variables), got {type(result).__name__}. In "
            "linen: lambda v, x, training: model.apply(v, x, training, "
            "mutable=['batch_stats'])."
        )
    after = result[1]
    if jax.tree.structure(after) != jax.tree.structure(tree):
        # A linen model returns only the collections that were mutable.
        try:
            after = type(tree)({**tree, **after})
        except TypeError:
            after = None
        if jax.tree.structure(after) != jax.tree.structure(tree):
            raise ValueError(
                "apply returned variables of another structure than it was given, so what "
                "it tracked cannot be told. Return (y, variables) with the structure of "
                "the variables passed in, or the collections of them that changed."
            )
    return [as_number(leaf) for leaf in jax.tree.leaves(after)]


def as_number(leaf: Any) -> np.ndarray:
    """Returns a leaf in double precision and without axes, empty if it holds no floats."""
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return np.zeros(0)
    array = np.asarray(leaf)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64).ravel()


def _rows(batch: Any) -> int:
    """Returns the length of a batch: that of the first axis of its first array."""
    leaf = next((leaf for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), None)
    return 1 if leaf is None else np.shape(leaf)[0]
