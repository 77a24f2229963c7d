"""Runs every check on the variables of a model, and on batches where there are some."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxbn._statistics.replicas import replica_differences
from jaxbn._statistics.running import check_momentum
from jaxbn._typing import PyTree
from jaxbn.diagnose._array_checks import check_measured_momentum, check_steps, check_values
from jaxbn.diagnose._batch_checks import (
    check_batches,
    check_gap,
    explain_drift,
    measure_drift,
)
from jaxbn.diagnose._find_norms import NormArrays, find_norms
from jaxbn.diagnose._measure import Apply, measure_gap, measure_layers
from jaxbn.diagnose._report import Finding, LayerReport, Report, as_evidence


def diagnose(
    variables: PyTree,
    apply: Apply | None = None,
    batches: Iterable[Any] = (),
    *,
    steps: int | None = None,
    momentum: float | None = None,
    epsilon: float = 1e-5,
    replica_axis: int | None = None,
) -> Report:
    """Tells what is wrong with the statistics of a model, and what to do about it.

    From the variables alone come the causes `never-updated`, `non-finite`,
    `negative-variance`, `low-precision`, `dead` and `exploding` channels, and `replicas`
    that differ; with `steps` and `momentum`, `unconverged` and `momentum` (PyTorch's, used
    as the decay).
    With `apply` and batches like those of training the momentum is measured, and there
    are `drift` between running and batch statistics, `averaged-weights`, `small-batch`,
    `unlike-batches`, and the `gap` between training and evaluation with the layer that
    makes it. docs/diagnose.md tells how each is known.

    Args:
        variables: Params and statistics: the variables of a linen model, an `nnx.State`
            or the pure dict of one, `(params, state)` of functions, or a flat dict of
            arrays by the names of PyTorch, Keras or TensorFlow.
        apply: A function `(variables, batch, training) -> (y, variables)` whose second
            result may hold changed collections only. Wrap it in `jax.jit` with
            `static_argnums=2`. It runs three times per batch, and once
            per layer.
        batches: A few batches, of the size of those in training; at least two to measure
            their noise.
        steps: How many training steps the model has taken.
        momentum: The decay of the layers, where it is not to be measured.
        epsilon: That of the layers.
        replica_axis: The axis of devices that every array has, as `pmap` returns them.

    Returns:
        A `Report`, which prints as a table.

    Raises:
        TypeError: A layer holds something else than arrays; apply returns no pair.
        ValueError: No layer has running statistics; apply goes without batches, or returns
            variables of another structure; steps or momentum are out of range.

    Example:
        >>> import jax, jaxbn
        >>> from jaxbn.diagnose import diagnose
        >>> bn = jaxbn.BatchNorm(momentum=0.1)
        >>> def apply(variables, x, training):
        ...     y, state = bn.apply(*variables, x, training)
        ...     return y, (variables[0], state)
        ...
        >>> x, variables = jax.random.normal(jax.random.key(0), (20, 2)), bn.init(2)
        >>> for _ in range(4):
        ...     _, variables = apply(variables, x, True)
        >>> print(diagnose(variables, apply, [x]).findings[0].remedy)
        momentum is the decay here; PyTorch's momentum is one minus it. Write momentum=0.9.
    """
    _check_options(steps, momentum)
    layers = find_norms(variables)
    findings = list(_check_replicas(variables, layers, replica_axis))
    if replica_axis is not None:
        variables = jax.tree.map(lambda leaf: leaf.take(0, replica_axis), variables)
        layers = find_norms(variables)
    for layer in layers:
        findings += check_values(layer, epsilon)
    reports = [LayerReport(layer.name, layer.var.size) for layer in layers]
    if apply is not None:
        # A layer with an error of its own drifts because of it.
        explained = {f.layer for f in findings if f.severity == "error"}
        run = _Run(variables, layers, apply, list(batches), epsilon)
        reports, more = _measure(run, explained, math.nan if steps is None else steps)
        findings += more
    for layer, report in zip(layers, reports, strict=True):
        decay = report.momentum
        if momentum is not None and math.isnan(decay):
            decay = momentum
        known = {f.cause for f in findings if f.layer == layer.name}
        findings += (
            f for f in _check_tracking(layer, decay, steps) if f.cause not in known
        )
    errors_first = sorted(findings, key=lambda finding: finding.severity)
    return Report(tuple(errors_first), tuple(reports))


class _Run(NamedTuple):
    variables: PyTree
    layers: list[NormArrays]
    apply: Apply
    batches: list[Any]
    epsilon: float


def _measure(
    run: _Run, explained: set[str], steps: float
) -> tuple[list[LayerReport], list[Finding]]:
    """Returns what the batches say, as numbers and as findings."""
    variables, layers, apply, batches, epsilon = run
    measurements = measure_layers(variables, layers, apply, batches)
    rows = [
        (layer, seen, measure_drift(layer, seen, epsilon))
        for layer, seen in zip(layers, measurements, strict=True)
    ]
    findings = [each for layer, seen, _ in rows for each in check_batches(layer.name, seen)]
    unexplained = [row for row in rows if row[0].name not in explained]
    findings += explain_drift(unexplained, steps)
    gap = measure_gap(variables, layers, measurements, apply, batches)
    findings += check_gap(layers, measurements, gap)
    reports = [
        LayerReport(
            layer.name,
            layer.var.size,
            momentum=seen.momentum,
            shift=drift.shift,
            stretch=drift.stretch,
            noise=seen.noise,
            gap=alone,
        )
        for (layer, seen, drift), alone in zip(rows, gap.alone, strict=True)
    ]
    return reports, findings


def _check_tracking(
    layer: NormArrays, momentum: float, steps: int | None
) -> Iterator[Finding]:
    """Yields what the momentum says, and the steps that the model or its user counted."""
    if math.isnan(momentum):
        return
    if finding := check_measured_momentum(layer.name, momentum):
        yield finding
    counted = layer.get("count")
    taken = steps if counted is None or not counted.size else counted.max()
    if taken is not None and (finding := check_steps(layer, momentum, float(taken))):
        yield finding


def _check_replicas(
    variables: PyTree, layers: Sequence[NormArrays], axis: int | None
) -> Iterator[Finding]:
    """Yields the layers of which the replicas hold different arrays."""
    leaves = jax.tree.leaves(variables)
    for layer in layers:
        arrays = {field: leaves[i] for field, i in layer.leaves.items()}
        apart = {
            field.strip("['] "): difference
            for field, difference in replica_differences(arrays, axis=axis).items()
        }
        if not apart:
            continue
        shown = ", ".join(f"{field} by up to {far:.3g}" for field, far in apart.items())
        yield Finding(
            layer.name,
            "replicas",
            "error",
            as_evidence(**apart),
            f"the replicas hold different arrays: {shown}.",
            "Give the layer the axis_name of the devices, so that all track the same, or "
            "pool what they tracked with jaxbn.sync_state before evaluating or saving.",
        )


def _check_options(steps: int | None, momentum: float | None) -> None:
    if steps is not None and steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}. Count training steps.")
    check_momentum(momentum)
