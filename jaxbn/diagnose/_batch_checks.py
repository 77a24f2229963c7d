"""Checks statistics against batches, and finds the mistake that explains a difference."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn.diagnose import _limits
from jaxbn.diagnose._array_checks import unconverged
from jaxbn.diagnose._find_norms import NormArrays
from jaxbn.diagnose._measure import Measurement
from jaxbn.diagnose._report import Finding, as_evidence

# Batches are unlike each other if the variance of their means is so many times that of
# batches drawn at random.
_UNLIKE = 4
# What is beyond a limit must also be so many times the sampling error.
_SAMPLING = 5.0
# Initial statistics explain a drift if they explain so much of it.
_FIT = 0.7
# Weights were averaged if the logarithm of running over batch standard deviation exceeds
# _WIDE in a share _MOST of the layers, and _WIDE_MEAN on average.
_WIDE, _MOST, _WIDE_MEAN = 0.05, 0.7, 0.07


class Drift(NamedTuple):
    """How far the statistics of a layer lie from its batches."""

    shift: float
    stretch: float
    wide: float  # the mean logarithm of running over batch standard deviation
    large: bool


def measure_drift(layer: NormArrays, seen: Measurement, epsilon: float) -> Drift:
    """Returns how far the running statistics lie from those of the batches."""
    if not seen.tracked:
        return Drift(np.nan, np.nan, np.nan, False)
    std = np.sqrt(seen.var + epsilon)
    apart = np.abs(layer.mean - seen.mean) / std
    factor = np.log(np.maximum(layer.var, 0) + epsilon) / 2 - np.log(std)
    shift = float(np.sqrt(np.mean(np.square(apart))))
    spread = float(np.sqrt(np.mean(np.square(factor))))
    chance = sampling_error(seen)
    large = shift > max(_limits.SHIFT, chance)
    large |= spread > max(np.log(_limits.STRETCH), chance)
    finite = bool(np.isfinite(shift) and np.isfinite(spread))
    return Drift(shift, float(np.exp(spread)), float(np.mean(factor)), large and finite)


def check_batches(layer: NormArrays, seen: Measurement) -> Iterator[Finding]:
    """Yields what is wrong with the batches of a layer."""
    if not seen.noise > _limits.NOISE:
        return
    evidence = as_evidence(noise=seen.noise, rows=seen.rows, elements=seen.noise**-2)
    if seen.noise**2 * seen.rows > _UNLIKE:
        yield Finding(
            layer.name,
            "unlike-batches",
            "warning",
            evidence,
            f"the means of batches of {seen.rows} lie {seen.noise:.2f} deviations "
            "apart, more than batches drawn at random would.",
            "Shuffle the data, or put every kind of example into every batch.",
        )
    else:
        yield Finding(
            layer.name,
            "small-batch",
            "warning",
            evidence,
            f"the means of batches lie {seen.noise:.2f} standard deviations apart, as "
            f"with {seen.noise**-2:.1f} independent elements per feature.",
            f"Use larger batches, {layer.framework.synchronize}, or freeze the layer.",
        )


def explain_drift(
    rows: Sequence[tuple[NormArrays, Measurement, Drift]], steps: float
) -> Iterator[Finding]:
    """Yields why statistics do not fit their batches.

    A pattern over the layers is one mistake that made it, and shows before any one layer
    has drifted far. Otherwise the layers that did are told.
    """
    measured = [row for row in rows if np.isfinite(row[2].shift)]
    if not measured:
        return
    left, fit = _initial_share([row[:2] for row in measured])
    # If the steps are known and were enough, the statistics have converged.
    possible = any(not seen.momentum**steps < _limits.LEFT / 2 for _, seen, _ in measured)
    if possible and left > _limits.LEFT and fit > _FIT:
        for layer, seen, _ in measured:
            yield unconverged(layer, left, seen.momentum, steps)
        return
    wide = np.array([drift.wide for _, _, drift in measured])
    if len(wide) > 1 and np.mean(wide > _WIDE) >= _MOST and wide.mean() > _WIDE_MEAN:
        for layer, _, drift in measured:
            yield _averaged(layer, drift)
        return
    drifting = [row for row in measured if row[2].large]
    for layer, _, drift in drifting:
        yield Finding(
            layer.name,
            "drift",
            "error",
            as_evidence(shift=drift.shift, stretch=drift.stretch, layers=len(drifting)),
            f"the running means lie {drift.shift:.2f} standard deviations from the "
            f"batches and the deviations differ by a factor of {drift.stretch:.2f}; "
            f"{len(drifting)} of {len(measured)} layers drift.",
            "If the data were prepared otherwise, or are of another domain, prepare them "
            "as in training; if they are right, or the params were changed since, "
            f"{layer.framework.reestimate}.",
        )


def _averaged(layer: NormArrays, drift: Drift) -> Finding:
    return Finding(
        layer.name,
        "averaged-weights",
        "error",
        as_evidence(wide=drift.wide, shift=drift.shift, stretch=drift.stretch),
        f"the running deviations are {np.expm1(drift.wide):+.0%} off those of the "
        "batches, and wider in almost every layer: averaged weights make narrower "
        "activations than the weights that the statistics come from.",
        "With the averaged weights before evaluation, do so once: "
        f"{layer.framework.reestimate}.",
    )


def sampling_error(*measurements: Measurement) -> float:
    """Returns how far apart batches and averages may lie by chance, with a margin."""
    seen = [each for each in measurements if each.tracked]
    return _SAMPLING * float(np.sqrt(sum(_chance(each) ** 2 for each in seen)))


def _chance(seen: Measurement) -> float:
    """Returns how far the batches here, and those in the average, differ by chance."""
    noise = seen.noise if np.isfinite(seen.noise) else seen.rows**-0.5
    m = seen.momentum if np.isfinite(seen.momentum) else 1.0
    return float(noise * np.sqrt(1 / seen.batches + (1 - m) / (1 + m)))


def _initial_share(pairs: Sequence[tuple[NormArrays, Measurement]]) -> tuple[float, float]:
    """Returns the share of 0 and 1 in the statistics, and how well it explains them.

    A share that left the same trace in every mean and variance, running - batch = share
    (initial - batch), in the units of both, fits from either end: from the batches, and
    from the initial values.
    """
    starts, ends = [], []
    for layer, seen in pairs:
        unit = np.sqrt(1 + seen.var)
        starts += [(0 - seen.mean) / unit, (1 - seen.var) / (1 + seen.var)]
        ends += [
            (layer.mean - seen.mean) / unit,
            (layer.var - seen.var) / (1 + seen.var),
        ]
    start, end = np.concatenate(starts), np.concatenate(ends)
    size = np.vdot(start, start).real
    left = float(np.vdot(start, end).real / size) if size > 0 else 0.0
    rest = np.square(np.abs(end - left * start)).sum()
    totals = np.square(np.abs(end)).sum(), np.square(np.abs(end - start)).sum()
    if not 0.02 < left < 1 or min(totals) == 0:
        return left, 0.0
    return left, float(1 - rest / min(totals))
