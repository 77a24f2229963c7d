"""Checks the params and the statistics of one layer, without any data."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn.diagnose._find_norms import NormArrays
from jaxbn.diagnose._report import Finding, as_evidence

# A channel is dead if its output varies less than this share of the median channel.
_DEAD = 1e-3
# A channel explodes at so many times the median, or near the largest float16, 65504.
_EXPLODING, _LARGEST = 300.0, 1e4
# A decay below this is taken for PyTorch's momentum, whose default is 0.1.
_FAST = 0.5
# The largest share of the initial statistics that may be left.
_LEFT = 0.05
_REESTIMATE = "Estimate the statistics anew from training data"


def check_values(layer: NormArrays, epsilon: float) -> Iterator[Finding]:
    """Yields what is wrong with the arrays of a layer, whatever the data."""
    if (finding := _not_finite(layer)) or (finding := _negative(layer)):
        yield finding
        return
    for look in (_never_updated, _low_precision):
        if finding := look(layer):
            yield finding
    for check in (_dead, _exploding):
        if finding := check(layer, epsilon):
            yield finding


def check_measured_momentum(layer: str, momentum: float) -> Finding | None:
    """Returns a finding if the decay of the statistics is one minus what was meant."""
    if not momentum < _FAST:
        return None
    return Finding(
        layer,
        "momentum",
        "error",
        as_evidence(momentum=momentum),
        f"a training step keeps {momentum:.2g} of the running statistics and takes "
        f"{1 - momentum:.2g} from the batch, so they follow the last batch.",
        "momentum is the decay here; PyTorch's momentum is one minus it. Write "
        f"momentum={1 - momentum:.2g}.",
    )


def check_steps(layer: NormArrays, momentum: float, steps: float) -> Finding | None:
    """Returns a finding if so few steps leave much of the initial statistics."""
    if layer.get("weight") is not None:
        return None
    left = momentum**steps
    return unconverged(layer.name, left, momentum, steps) if left > _LEFT else None


def unconverged(layer: str, left: float, momentum: float, steps: float) -> Finding:
    """Returns the finding that a share `left` of the initial statistics is left."""
    after = "" if np.isnan(steps) else f" after {steps:.0f} steps"
    return Finding(
        layer,
        "unconverged",
        "error",
        as_evidence(left=left, momentum=momentum, steps=steps),
        f"{left:.0%} of the initial mean 0 and variance 1 is left in the running "
        f"statistics{after}.",
        "Train for 3 / (1 - momentum) steps or more, or lower momentum to 0.9, or use "
        "debias=True; the statistics of this model can be taken from data: reestimate.",
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
        f"of the statistics; here, go back to a sound checkpoint. {_REESTIMATE} if the "
        "params are sound.",
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
        f"The variance was computed as E[x^2] - E[x]^2. {_REESTIMATE}, with jaxbn.moments.",
    )


def _never_updated(layer: NormArrays) -> Finding | None:
    if layer.mean.any() or not (layer.var == 1).all():
        return None
    return Finding(
        layer.name,
        "never-updated",
        "error",
        as_evidence(mean=0, var=1),
        "the running mean is 0 and the running variance 1 exactly, as before training.",
        "Keep the statistics that each training step returns: the second value of "
        "bn.apply, updates['batch_stats'] of model.apply(..., mutable=['batch_stats']), or "
        "the NNX model in train() mode; and evaluate with the latest ones.",
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
        "Keep them out of what casts the model, and cast these to float32 before training; "
        "if the model was trained so, they are stale: reestimate.",
    )


def _bits(dtype: Any) -> int:
    """Returns how many bits a floating number of a dtype has; 64 for all else."""
    name = str(dtype).removeprefix("torch.")
    try:
        kind = jnp.dtype(name)
    except TypeError:
        return 64
    return jnp.finfo(kind).bits if jnp.issubdtype(kind, jnp.inexact) else 64


def _dead(layer: NormArrays, epsilon: float) -> Finding | None:
    spread = _output_spread(layer, epsilon)
    alive = spread[spread > 0]
    typical = float(np.median(alive)) if alive.size else 1.0
    dead = spread <= _DEAD * typical
    if not dead.any():
        return None
    return Finding(
        layer.name,
        "dead",
        "warning",
        as_evidence(channels=dead.sum(), features=dead.size, largest=spread[dead].max()),
        f"{dead.sum()} of {dead.size} channels pass nothing on but their bias, as their "
        "scale or their running variance is near 0.",
        "If the input is constant there, look at what comes before: units that never fire, "
        "too high a learning rate. If the scales were driven to 0, prune the channels.",
    )


def _exploding(layer: NormArrays, _: float) -> Finding | None:
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


def _output_spread(layer: NormArrays, epsilon: float) -> np.ndarray:
    """Returns the standard deviation that each channel has behind the scale."""
    scale = layer.get("scale")
    spread = np.sqrt(layer.var / (layer.var + epsilon))
    return spread if scale is None else spread * np.abs(scale)
