"""Finds the channels of a layer that pass nothing on, or far more than the others."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxbn.diagnose._find_norms import NormArrays
from jaxbn.diagnose._report import Finding, as_evidence

# A channel is dead if its output varies less than this share of what the other channels of
# its layer do, or those of the model, or than this, whatever the others do.
_DEAD_IN_LAYER, _DEAD_IN_MODEL, _DEAD = 1e-3, 1e-4, 1e-6
# A channel explodes at so many times the median, or near the largest float16, 65504.
_EXPLODING, _LARGEST = 300.0, 1e4


class Channels(NamedTuple):
    """How much each channel of a layer puts out: deviations behind the scale."""

    spread: np.ndarray
    normalized: np.ndarray  # before the scale
    dead: np.ndarray

    @property
    def number(self) -> int:
        """How many are dead."""
        return int(self.dead.sum())


def find_dead(layers: Iterable[NormArrays], epsilon: float | None) -> list[Channels | None]:
    """Returns the channels of each layer; None of one whose arrays tell nothing of them.

    The yardstick lies outside the layer: in one that is mostly dead, so is its median.
    """
    spreads = [_spread(layer, epsilon) for layer in layers]
    layers_put_out = [_typical(spread) for spread, _ in filter(None, spreads)]
    model = _DEAD_IN_MODEL * float(np.quantile(layers_put_out or [0.0], 0.75))
    rows: list[Channels | None] = []
    for pair in spreads:
        if pair is None:
            rows.append(None)
            continue
        spread, normalized = pair
        floor = max(_DEAD_IN_LAYER * _typical(spread), model, _DEAD)
        rows.append(Channels(spread, normalized, spread <= floor))
    return rows


def check_channels(layer: NormArrays, channels: Channels | None) -> Iterator[Finding]:
    """Yields what is wrong with single channels of a layer."""
    if channels is None:
        return
    if channels.number:
        yield _dead(layer, channels)
    if finding := _exploding(layer):
        yield finding


def _spread(
    layer: NormArrays, epsilon: float | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the deviation of each channel behind the scale, and before it."""
    # Observations have units, and some are constant.
    sound = all(np.isfinite(array).all() for array in layer.arrays.values())
    if layer.observes or not sound or layer.var.min(initial=0) < 0:
        return None
    scale = layer.get("scale")
    epsilon = layer.framework.epsilon if epsilon is None else epsilon
    # A variance of 0 without an epsilon has no output at all.
    normalized = np.sqrt(layer.var / np.maximum(layer.var + epsilon, 1e-300))
    return normalized if scale is None else normalized * np.abs(scale), normalized


def _typical(spread: np.ndarray) -> float:
    """Returns what live channels put out: a high quantile, as most may be dead."""
    alive = spread[spread > _DEAD]
    return float(np.quantile(alive, 0.9)) if alive.size else 0.0


def _dead(layer: NormArrays, channels: Channels) -> Finding:
    spread, dead = channels.spread, channels.dead
    constant = int((channels.normalized[dead] <= _DEAD_IN_LAYER).sum())
    return Finding(
        layer.name,
        "dead",
        "warning",
        as_evidence(
            channels=channels.number,
            features=dead.size,
            constant=constant,
            largest=spread[dead].max(),
        ),
        f"{channels.number} of {dead.size} channels pass nothing on but their bias: "
        f"{constant} by a running variance near 0, {channels.number - constant} by a scale "
        "near 0.",
        "If the input is constant there, look at what comes before: units that never fire, "
        "too high a learning rate. If the scales were driven to 0, prune the channels.",
    )


def _exploding(layer: NormArrays) -> Finding | None:
    scale = layer.get("scale")
    sizes = {"mean": np.abs(layer.mean), "std": np.sqrt(layer.var)}
    if scale is not None:
        sizes["scale"] = np.abs(scale)
    many = np.zeros(layer.var.shape, bool)
    for field, size in sizes.items():
        typical = max(float(np.median(size)), 1.0) if size.size else 1.0
        # The mean may lie anywhere, so it is compared with float16 alone, not with others.
        many |= size > (
            _LARGEST if field == "mean" else min(_EXPLODING * typical, _LARGEST)
        )
    if not many.any():
        return None
    largest = {field: size.max() for field, size in sizes.items()}
    return Finding(
        layer.name,
        "exploding",
        "warning",
        as_evidence(channels=many.sum(), features=many.size, **largest),
        f"{many.sum()} of {many.size} channels are far larger than the others or than "
        f"float16 bears: {', '.join(f'{f} up to {n:.3g}' for f, n in largest.items())}.",
        "Lower the learning rate, clip the gradients, or decay the kernel before the "
        "layer; jaxbn.optim.clip_scale bounds a scale.",
    )
