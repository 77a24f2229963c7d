"""Runs a model on batches to measure its layers: moments, momentum, share of the error."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._statistics.moments import Moments, merge_moments
from jaxbn._typing import PyTree
from jaxbn.diagnose._find_norms import NormArrays

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


class Gap(NamedTuple):
    """How far the output in evaluation lies from that with the statistics of the batches.

    Attributes:
        total: With all layers, in standard deviations of the output.
        alone: With one layer at a time, for each layer.
    """

    total: float
    alone: tuple[float, ...]


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
    blank = _with(tree, blanks)
    steps = [_leaves_after(blank, apply, batch) for batch in batches]
    large = _with(tree, blanks | _large(moving, steps[0]))
    lifted = _leaves_after(large, apply, batches[0]) if moving else []
    rows = [_rows(batch) for batch in batches]
    return [
        _measurement(layer, on, lifted, steps, rows)
        for layer, on in zip(layers, tracked, strict=True)
    ]


def measure_gap(
    tree: PyTree,
    layers: Sequence[NormArrays],
    measurements: Sequence[Measurement],
    apply: Apply,
    batches: Sequence[Any],
) -> Gap:
    """Returns how far evaluation is off on all batches, and by which layer on the first.

    Every layer normalizes with the statistics of the batches, then one after the other
    with its own instead. So dropout and the noise of a batch are on neither side.
    """
    fitted = {
        layer.leaves[field]: getattr(seen, field)
        for layer, seen in zip(layers, measurements, strict=True)
        if seen.tracked
        for field in ("mean", "var")
    }

    def outputs(replaced: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
        variables = _with(tree, replaced)
        return (_flat(apply(variables, batch, False)[0]) for batch in batches)

    wants = list(outputs(fitted))
    spread = np.std(np.concatenate(wants))

    def distance(want: np.ndarray, got: np.ndarray) -> float:
        far = np.sqrt(np.mean(np.square(np.abs(got - want))))
        return float(far / spread if spread > 0 else (np.inf if far > 0 else 0.0))

    alone = []
    for layer in layers:
        own = {layer.leaves["mean"], layer.leaves["var"]}
        others = {i: array for i, array in fitted.items() if i not in own}
        known = len(others) < len(fitted)
        alone.append(distance(wants[0], next(outputs(others))) if known else np.nan)
    everywhere = map(np.concatenate, (wants, list(outputs({}))))
    return Gap(distance(*everywhere), tuple(alone))


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
        for field in ("mean", "var", "std", "weight")
        if field in layer.leaves
    }


def _with(tree: PyTree, replaced: dict[int, np.ndarray]) -> PyTree:
    """Returns the tree with some of its leaves replaced, in their shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    for i, array in replaced.items():
        old = jnp.asarray(leaves[i])
        leaves[i] = jnp.asarray(array.reshape(old.shape), old.dtype)
    return jax.tree.unflatten(structure, leaves)


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
    return [_number(leaf) for leaf in jax.tree.leaves(after)]


def _number(leaf: Any) -> np.ndarray:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return np.zeros(0)
    array = np.asarray(leaf)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64).ravel()


def _flat(y: PyTree) -> np.ndarray:
    parts = [part for leaf in jax.tree.leaves(y) if (part := _number(leaf)).size]
    return np.concatenate(parts) if parts else np.zeros(0)


def _rows(batch: Any) -> int:
    """Returns the length of a batch: that of the first axis of its first array."""
    leaf = next((leaf for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), None)
    return 1 if leaf is None else np.shape(leaf)[0]
