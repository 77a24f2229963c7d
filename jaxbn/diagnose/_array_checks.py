"""Checks the running statistics of one layer, and the steps they took, without any data."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn.diagnose import _limits
from jaxbn.diagnose._find_norms import NormArrays
from jaxbn.diagnose._report import Finding, as_evidence


def check_values(layer: NormArrays, trained: bool) -> Iterator[Finding]:
    """Yields what is wrong with the statistics of a layer, whatever the data.

    `trained` tells whether the params of the model left their initial values.
    """
    if (finding := _not_finite(layer)) or (finding := _negative(layer)):
        yield finding
        return
    for finding in (_never_updated(layer, trained), _low_precision(layer)):
        if finding:
            yield finding


def check_steps(
    layer: NormArrays, momentum: float, steps: float | None
) -> Iterator[Finding]:
    """Yields what the decay says, and the steps that the layer or its user counted.

    Where nobody tells the decay (NaN), that of the framework is asked about.
    """
    if momentum < _limits.MOMENTUM:
        yield _wrong_momentum(layer, momentum)
    taken = layer.counted or steps
    if taken is None or layer.get("weight") is not None:
        return
    known = not np.isnan(momentum)
    decay = momentum if known else layer.framework.decay
    left = decay**taken
    if left <= _limits.LEFT:
        return
    if known:
        yield unconverged(layer, left, decay, taken)
    # A variance that began at 1 is never below the share that is left of it.
    elif layer.var.min(initial=np.inf) >= left:
        finding = unconverged(layer, left, decay, taken)
        yield dataclasses.replace(
            finding,
            severity="question",
            message=f"with {layer.framework.told(decay)}, the default, {finding.message}",
        )


def unconverged(layer: NormArrays, left: float, momentum: float, steps: float) -> Finding:
    """Returns the finding that a share `left` of the initial statistics is left."""
    after = "" if np.isnan(steps) else f" after {steps:.0f} steps"
    its, debias = layer.framework, ""
    if its.keep.startswith("Keep the statistics"):
        debias = ", or use debias=True"
    return Finding(
        layer.name,
        "unconverged",
        "error",
        as_evidence(left=left, momentum=momentum, steps=steps),
        f"{left:.0%} of the initial mean 0 and variance 1 is left in the running "
        f"statistics{after}.",
        f"Train for {3 / (1 - momentum) if momentum < 1 else np.inf:.0f} steps or more, or "
        f"with {its.told(0.9)}{debias}; for this model, {its.reestimate}.",
    )


def _wrong_momentum(layer: NormArrays, momentum: float) -> Finding:
    its = layer.framework
    one = f"{its.name}'s momentum is the weight of the new batch, as in no other framework."
    if not its.counts_new:
        one = "momentum is the decay here; PyTorch's momentum is one minus it."
    return Finding(
        layer.name,
        "momentum",
        "error",
        as_evidence(momentum=momentum),
        f"a training step keeps {momentum:.2g} of the running statistics and takes "
        f"{1 - momentum:.2g} from the batch, so they follow the last batch.",
        f"{one} Write {its.told(1 - momentum)}.",
    )


def _not_finite(layer: NormArrays) -> Finding | None:
    bad = {
        field: int((~np.isfinite(array)).sum())
        for field, array in layer.arrays.items()
        if not np.isfinite(array).all()
    }
    if not bad:
        return None
    return Finding(
        layer.name,
        "non-finite",
        "error",
        as_evidence(**bad),
        f"NaN or infinity in {', '.join(f'{n} of {field}' for field, n in bad.items())}.",
        "Find the batch or the step that overflowed. jaxbn's layers keep such a batch out "
        f"of the statistics; here, go back to a sound checkpoint. If the params are sound, "
        f"{layer.framework.reestimate}.",
    )


def _negative(layer: NormArrays) -> Finding | None:
    smallest = layer.var.min(initial=0)
    if smallest >= 0:
        return None
    return Finding(
        layer.name,
        "negative-variance",
        "error",
        as_evidence(smallest=smallest),
        f"a running variance is {smallest:.3g}, whose root is NaN.",
        "The variance was computed as E[x^2] - E[x]^2, which loses all digits. Compute it "
        f"as jaxbn.moments does; for this model, {layer.framework.reestimate}.",
    )


def _never_updated(layer: NormArrays, trained: bool) -> Finding | None:
    if layer.mean.any() or not (layer.var == 1).all():
        return None
    its, counted = layer.framework, layer.counted
    if layer.is_trained is not None:
        trained = layer.is_trained
    seen = "the running mean is 0 and the running variance 1 exactly, as before training"
    keep = f"{its.keep}."
    numbers = as_evidence(mean=0, var=1, **({} if counted is None else {"steps": counted}))
    # A layer that counted steps saw batches, and lost what it tracked of them.
    if not trained or counted:
        steps = f", after {counted:.0f} steps" if counted else ""
        return Finding(
            layer.name, "never-updated", "error", numbers, seen + steps + ".", keep
        )
    zero = " and no step was counted," if counted == 0 else ""
    return Finding(
        layer.name,
        "never-updated",
        "question",
        numbers,
        f"{seen},{zero} but the params are trained.",
        f"Was this layer trained in inference mode ({its.inference}), and does evaluation "
        "agree with training? Then it is right as it is, and new statistics would ruin it. "
        f"If not: {keep[0].lower()}{keep[1:]} The argument loss of diagnose tells the two "
        "apart.",
    )


def _low_precision(layer: NormArrays) -> Finding | None:
    tracked = layer.dtypes.keys() - {"scale", "bias", "count"}
    low = {
        field: str(layer.dtypes[field]).removeprefix("torch.")
        for field in sorted(tracked)
        if _bits(layer.dtypes[field]) < 32
    }
    if not low:
        return None
    return Finding(
        layer.name,
        "low-precision",
        "warning",
        as_evidence(**{field: _bits(layer.dtypes[field]) for field in low}),
        f"the running statistics are in {', '.join(sorted(set(low.values())))}, in which "
        "the steps of an average are below its last digit, so training on would stall.",
        f"{layer.framework.widen}; if the model was trained so, they are stale: "
        f"{layer.framework.reestimate}.",
    )


def _bits(dtype: Any) -> int:
    """Returns how many bits a floating number of a dtype has; 64 for all else."""
    name = str(dtype).removeprefix("torch.")
    try:
        kind = jnp.dtype(name)
    except TypeError:
        return 64
    return jnp.finfo(kind).bits if jnp.issubdtype(kind, jnp.inexact) else 64
