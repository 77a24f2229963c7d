"""Runs every check on the variables of a model, and on batches where there are some."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._statistics.replicas import replica_differences
from jaxbn._statistics.running import check_momentum
from jaxbn._typing import PyTree
from jaxbn.diagnose._array_checks import check_steps, check_values
from jaxbn.diagnose._batch_checks import check_batches, explain_drift, measure_drift
from jaxbn.diagnose._channel_checks import check_channels, find_dead
from jaxbn.diagnose._find_norms import NormArrays, find_norms
from jaxbn.diagnose._gap import Gap, Loss, check_gap, measure_gap
from jaxbn.diagnose._layer_report import LayerReport
from jaxbn.diagnose._measure import Apply, Counted, measure_layers, with_wide_statistics
from jaxbn.diagnose._report import Finding, Report, as_evidence


def diagnose(
    variables: PyTree,
    apply: Apply | None = None,
    batches: Iterable[Any] = (),
    *,
    steps: int | None = None,
    momentum: float | None = None,
    epsilon: float | None = None,
    replica_axis: int | None = None,
    loss: Loss | None = None,
) -> Report:
    """Tells what is wrong with the statistics of a model, and what to do about it.

    From the variables alone come the causes `never-updated`, `non-finite`,
    `negative-variance`, `low-precision`, `dead` and `exploding` channels, and `replicas`
    that differ; with `steps` and `momentum`, `unconverged` and `momentum` (PyTorch's, used
    as the decay). A layer that counts its steps, as PyTorch's do, tells them itself.
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
            `static_argnums=2`. It runs three times per batch and twice more, and where a
            gap is found once forward and backward, or once per layer if it cannot be
            differentiated.
        batches: A few batches, of the size of those in training; at least two to measure
            their noise.
        steps: How many training steps the model has taken.
        momentum: The decay of the layers, where it is not to be measured, as the framework
            counts that named the arrays: 0.1 of PyTorch is a decay of 0.9.
        epsilon: That of the layers; None for the default of the framework that named their
            arrays: 1e-3 for Keras and TensorFlow, else 1e-5.
        replica_axis: The axis of devices that every array has, as `pmap` returns them.
        loss: A function `(y, batch) -> loss`, where batches hold labels. It tells whether
            evaluation is worse than the batches or just other: so a model that was trained
            in inference mode is known to be right.

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
    channels = find_dead(layers, epsilon)
    trained = any(layer.is_trained for layer in layers)
    for layer, its in zip(layers, channels, strict=True):
        findings += [*check_values(layer, trained), *check_channels(layer, its)]
    reports = [
        LayerReport(
            layer.name, layer.var.size, dead=math.nan if its is None else its.number
        )
        for layer, its in zip(layers, channels, strict=True)
    ]
    whole = {}
    if apply is not None:
        run = _Run(variables, layers, Counted(apply), list(batches), epsilon, loss)
        steps_taken = math.nan if steps is None else steps
        reports, findings, whole = _measure(run, reports, findings, steps_taken)
    for layer, report in zip(layers, reports, strict=True):
        decay = report.momentum
        if momentum is not None and math.isnan(decay):
            decay = layer.framework.as_decay(momentum)
        known = {f.cause for f in findings if f.layer == layer.name}
        # What never moved tells nothing of how fast it moves.
        if apply is None or not math.isnan(decay):
            more = () if "never-updated" in known else check_steps(layer, decay, steps)
            findings += (finding for finding in more if finding.cause not in known)
    errors_first = sorted(findings, key=lambda finding: finding.severity)
    return Report(tuple(errors_first), tuple(reports), **whole)


class _Run(NamedTuple):
    variables: PyTree
    layers: list[NormArrays]
    apply: Counted
    batches: list[Any]
    epsilon: float | None
    loss: Loss | None


def _measure(
    run: _Run, reports: list[LayerReport], findings: list[Finding], steps: float
) -> tuple[list[LayerReport], list[Finding], dict[str, Any]]:
    """Returns what the batches say, of the layers and of the model as a whole."""
    _, layers, apply, batches, epsilon, loss = run
    variables = with_wide_statistics(run.variables, layers)
    measurements = measure_layers(variables, layers, apply, batches)
    gap = measure_gap(variables, layers, measurements, apply, batches, loss)
    findings = _settled(findings, layers, gap)
    rows = [
        (
            layer,
            seen,
            measure_drift(
                layer, seen, layer.framework.epsilon if epsilon is None else epsilon
            ),
        )
        for layer, seen in zip(layers, measurements, strict=True)
    ]
    findings += [each for layer, seen, _ in rows for each in check_batches(layer, seen)]
    # A layer with an error of its own drifts because of it.
    explained = {f.layer for f in findings if f.severity != "warning"}
    findings += explain_drift([row for row in rows if row[0].name not in explained], steps)
    parts = [math.nan] * len(layers)
    for finding, per_layer in check_gap(layers, measurements, gap, findings):
        findings.append(finding)
        parts = per_layer
    reports = [
        dataclasses.replace(
            report,
            momentum=seen.momentum,
            shift=drift.shift,
            stretch=drift.stretch,
            noise=seen.noise,
            gap=part,
        )
        for report, (_, seen, drift), part in zip(reports, rows, parts, strict=True)
    ]
    whole = {"gap": gap.total, "loss": gap.loss, "loss_of_batches": gap.loss_of_batches}
    return reports, findings, {"passes": apply.passes, **whole}


def _settled(
    findings: list[Finding], layers: Sequence[NormArrays], gap: Gap
) -> list[Finding]:
    """Returns findings of which the loss answered the question of never-updated ones."""
    keep = {layer.name: layer.framework.keep for layer in layers}

    def settled(finding: Finding) -> Finding:
        if finding.severity != "question" or gap.agrees is None:
            return finding
        losses = (
            f"{gap.loss:.3g} against {gap.loss_of_batches:.3g} with those of the batches"
        )
        if gap.agrees:
            return dataclasses.replace(
                finding,
                message=f"{finding.message} Evaluation agrees: its loss is {losses}.",
                remedy="This layer was trained in inference mode, and is right as it is: "
                "new statistics would ruin it.",
            )
        return dataclasses.replace(
            finding,
            severity="error",
            message=f"{finding.message} Evaluation does not agree: its loss is {losses}.",
            remedy=f"{keep[finding.layer]}.",
        )

    return [settled(f) if f.cause == "never-updated" else f for f in findings]


def _check_replicas(
    variables: PyTree, layers: Sequence[NormArrays], axis: int | None
) -> Iterator[Finding]:
    """Yields the layers of which the replicas hold different arrays."""
    leaves = jax.tree.leaves(variables)
    for layer in layers:
        held = {field: leaves[i] for field, i in layer.leaves.items()}
        arrays = {
            field: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
            for field, leaf in held.items()
        }
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
            f"{layer.framework.pool}.",
        )


def _check_options(steps: int | None, momentum: float | None) -> None:
    if steps is not None and steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}. Count training steps.")
    check_momentum(momentum)
