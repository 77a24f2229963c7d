"""Compares evaluation with what the batches would give, and finds the layer at fault."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._typing import PyTree
from jaxbn.diagnose import _limits
from jaxbn.diagnose._batch_checks import sampling_error
from jaxbn.diagnose._find_norms import NormArrays
from jaxbn.diagnose._measure import Apply, Measurement, as_number, with_leaves
from jaxbn.diagnose._report import Finding, as_evidence

Loss = Callable[[Any, Any], Any]
Arrays = dict[int, np.ndarray]
# The shares of the layers add up to the gap but for so much, or are not taken.
_UNTOLD = 0.5


class Gap(NamedTuple):
    """How far evaluation lies from the output with the statistics of the batches.

    Attributes:
        total: In standard deviations of the output, over all batches.
        loss: That of evaluation, NaN where no loss is told.
        loss_of_batches: That with the statistics of the batches.
        per_layer: Returns how far each layer moves the output of the first batch.
    """

    total: float
    loss: float
    loss_of_batches: float
    per_layer: Callable[[], list[float]]

    @property
    def agrees(self) -> bool | None:
        """Whether evaluation is as good as the batches, None where no loss tells."""
        if math.isnan(self.loss) or math.isnan(self.loss_of_batches):
            return None
        margin = _limits.LOSS * abs(self.loss_of_batches)
        return self.loss <= self.loss_of_batches + margin


def measure_gap(
    tree: PyTree,
    layers: Sequence[NormArrays],
    measurements: Sequence[Measurement],
    apply: Apply,
    batches: Sequence[Any],
    loss: Loss | None,
) -> Gap:
    """Returns how far evaluation is off, and how to tell by which layers.

    Every layer normalizes with the statistics of the batches on one side, and with its own
    on the other. So dropout and the noise of a batch are on neither side.
    """
    fitted = {
        layer.leaves[field]: getattr(seen, field)
        for layer, seen in zip(layers, measurements, strict=True)
        if seen.tracked
        for field in ("mean", "var")
    }

    def outputs(replaced: Arrays) -> tuple[list[np.ndarray], float]:
        variables, ys, losses = with_leaves(tree, replaced), [], []
        for batch in batches:
            y = apply(variables, batch, False)[0]
            ys.append(_flat(y))
            losses.append(math.nan if loss is None else float(np.mean(loss(y, batch))))
        return ys, float(np.mean(losses))

    wants, loss_of_batches = outputs(fitted)
    owns, own_loss = outputs({})
    flat = np.concatenate(wants)
    # Outputs that are all alike differ by roundings, which are no gap.
    spread = max(float(np.std(flat)), 1e-5 * float(np.abs(flat).max(initial=0)))

    def per_layer() -> list[float]:
        pair, first = (wants[0], owns[0]), batches[0]
        # One pass forward and backward tells all layers, where the model allows it.
        shares = _shares(tree, layers, fitted, apply, first, pair, spread)
        if shares is None:
            shares = _alone(tree, layers, fitted, apply, first, wants[0], spread)
        return shares

    total = _distance(flat, np.concatenate(owns), spread)
    return Gap(total, own_loss, loss_of_batches, per_layer)


def check_gap(
    layers: Sequence[NormArrays],
    measurements: Sequence[Measurement],
    gap: Gap,
    others: Sequence[Finding],
) -> Iterator[tuple[Finding, list[float]]]:
    """Yields a finding, and the part of each layer, if evaluation is off."""
    if gap.agrees:
        return
    limit = _limits.GAP if others else _limits.GAP_ALONE
    if gap.agrees is False:
        limit = 0.0
    if not gap.total > max(limit, sampling_error(*measurements)):
        return
    parts = gap.per_layer()
    if not np.isfinite(parts).any():
        return
    worst = int(np.nanargmax(parts))
    its = layers[worst].framework
    remedy = (
        "Look at this layer first. Where the batches are as varied as those of training, "
        f"this closes the gap: {its.reestimate}."
    )
    if not others:
        remedy = (
            "No layer is far off by itself, so the average may lag behind the params: let "
            f"the learning rate fall at the end, write {its.told(0.9)}, or "
            f"{its.reestimate}."
        )
    asked = any(finding.severity == "question" for finding in others)
    if asked and gap.agrees is None:
        remedy = (
            "Nothing here tells which of the two outputs is right. If the model was "
            "trained in inference mode, evaluation is: leave it as it is. The argument "
            f"loss of diagnose compares them. If the other is right, {its.reestimate}."
        )
    numbers = {"total": gap.total, "alone": parts[worst]}
    if gap.agrees is not None:
        numbers |= {"loss": gap.loss, "loss_of_batches": gap.loss_of_batches}
    finding = Finding(
        layers[worst].name,
        "gap",
        "question" if asked and gap.agrees is None else "error",
        as_evidence(**numbers),
        f"in evaluation the output moves by {gap.total:.2f} of its standard deviation, and "
        f"{parts[worst]:.2f} of that come from this layer.",
        remedy,
    )
    yield finding, parts


def _shares(
    tree: PyTree,
    layers: Sequence[NormArrays],
    fitted: Arrays,
    apply: Apply,
    batch: Any,
    outputs: tuple[np.ndarray, np.ndarray],
    spread: float,
) -> list[float] | None:
    """Returns the part of each layer in the gap of a batch, or None if nothing tells it.

    The gap is the integral of a derivative along the way from the statistics of the batches
    to those of the layers, which adds up over the layers (Aumann and Shapley): here by the
    derivative in the middle of the way. Variances go by their logarithm.
    """
    middle, steps = {}, {}
    for layer in layers:
        for field in ("mean", "var"):
            i = layer.leaves[field]
            if i in fitted:
                middle[i], steps[i] = _halfway(field, fitted[i], layer.arrays[field])

    def output(arrays: dict[int, Any]) -> list[Any]:
        y, _ = apply(with_leaves(tree, arrays), batch, False)
        return [leaf for leaf in jax.tree.leaves(y) if _is_inexact(leaf)]

    apart = outputs[1] - outputs[0]
    far = _distance(*outputs, spread)
    size = float(np.linalg.norm(apart))
    if not (math.isfinite(far) and size > 0):
        return None
    try:
        y, pull = jax.vjp(output, {i: jnp.asarray(array) for i, array in middle.items()})
        pieces = np.split(np.conj(apart), np.cumsum([leaf.size for leaf in y])[:-1])
        [slopes] = pull(
            [
                jnp.asarray(piece.reshape(leaf.shape), leaf.dtype)
                for piece, leaf in zip(pieces, y, strict=True)
            ]
        )
    # A model may refuse in any way to be traced or differentiated.
    except Exception:
        return None
    parts = {
        i: float(np.real(np.sum(np.asarray(slopes[i], step.dtype) * step))) / size**2 * far
        for i, step in steps.items()
    }
    shares = [
        sum(parts[layer.leaves[f]] for f in ("mean", "var"))
        if layer.leaves["mean"] in parts
        else math.nan
        for layer in layers
    ]
    # Along a way that bends too much, the middle says little.
    return shares if abs(np.nansum(shares) - far) <= _UNTOLD * far else None


def _halfway(
    field: str, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the middle of the way between statistics, and the way from there on."""
    if field == "mean":
        return (start + end) / 2, end - start
    # A variance may be 0, and then what epsilon adds counts.
    low, high = (np.maximum(array, 0) + 1e-5 for array in (start, end))
    middle = np.sqrt(low * high)
    return middle - 1e-5, middle * np.log(high / low)


def _alone(
    tree: PyTree,
    layers: Sequence[NormArrays],
    fitted: Arrays,
    apply: Apply,
    batch: Any,
    want: np.ndarray,
    spread: float,
) -> list[float]:
    """Returns how far each layer moves the output, with its own statistics alone."""
    alone = []
    for layer in layers:
        own = {layer.leaves["mean"], layer.leaves["var"]}
        others = {i: array for i, array in fitted.items() if i not in own}
        if len(others) == len(fitted):
            alone.append(math.nan)
            continue
        got = _flat(apply(with_leaves(tree, others), batch, False)[0])
        alone.append(_distance(want, got, spread))
    return alone


def _distance(want: np.ndarray, got: np.ndarray, spread: float) -> float:
    far = np.sqrt(np.mean(np.square(np.abs(got - want))))
    return float(far / spread if spread > 0 else (np.inf if far > 0 else 0.0))


def _flat(y: PyTree) -> np.ndarray:
    parts = [as_number(leaf) for leaf in jax.tree.leaves(y) if _is_inexact(leaf)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
