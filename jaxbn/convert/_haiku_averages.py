"""What the two averages that Haiku stores, debiased and hidden, tell together."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn.convert._array_names import LayerArrays
from jaxbn.convert._arrays import share


def weight_of(
    found: LayerArrays, arrays: Mapping[str, np.ndarray], decay: float, steps: int
) -> Any:
    """Returns the share of the averages that is seen, or raises if `decay` does not fit.

    Args:
        found: The layer.
        arrays: Its averages by their roles, as they were saved.
        decay: That of the float32 module.
        steps: What the counter says.
    """
    roles = "mean", "var"
    dtype = coarsest(arrays[role] for role in (*roles, "mean_hidden", "var_hidden"))
    pairs = {
        role: [arrays[r].astype(np.float64) for r in (role, f"{role}_hidden")]
        for role in roles
    }
    weight = min(
        shares(decay, steps, dtype),
        key=lambda s: sum(abs(h - a * float(s)).sum() for a, h in pairs.values()),
    )
    rtol, atol = _rounding(decay, steps, float(weight), dtype), 2e-6
    for role, (average, hidden) in pairs.items():
        if not np.allclose(average * float(weight), hidden, rtol=rtol, atol=atol):
            raise ValueError(
                f"{found.names[f'{role}_hidden']} does not fit the average: with "
                f"decay_rate={decay} and {steps} steps it would be {float(weight):.6g} of "
                "it. Pass the decay_rate that the module was made with, or set hidden to "
                "that."
            )
    return weight


def shares(decay: float, steps: int, dtype: Any) -> list[Any]:
    """Returns the share that is seen of an average that may have been trained in `dtype`.

    The first is that of training in float32, whatever the average was saved in; the second
    that of training in `dtype`, to which Haiku rounds the decay: 0.99 to 0.98828125.
    """
    return [share(decay, steps), share(float(np.asarray(decay, dtype)), steps)]


def coarsest(arrays: Any) -> Any:
    """Returns the dtype among those of `arrays` that rounds the most."""
    return max((array.dtype for array in arrays), key=lambda dtype: jnp.finfo(dtype).eps)


def _rounding(decay: float, steps: int, weight: float, dtype: Any) -> float:
    """Returns how far a hidden average may be from what the counter says, relatively."""
    eps = float(jnp.finfo(dtype).eps)
    # A power by repeated squaring, as JAX computes it outside jit, rounds with every step.
    power = 2 + steps * decay**steps
    return eps * (8 + power / max(weight, eps))
