"""The share of a zero-debiased average that comes from batches, and the number of steps."""

import math
from typing import Any

import numpy as np

from jaxbn._layers.batch_norm import BatchNorm


def share(decay: float, steps: int) -> Any:
    """Returns 1 - decay^steps as float32 has it, as a scalar of NumPy."""
    # In float32 where the counters are kept, as the sources compute it.
    return np.float32(1) - np.power(np.float32(decay), np.float32(steps))


def steps_of(bn: BatchNorm, state: Any, counted: int | None, library: str) -> int:
    """Returns the number of steps after which an average has the weight of `state`.

    Where it no longer tells, as without debiasing, so many that nothing is left to debias;
    or `counted`, the number that came with the layer, if that is more.
    """
    if bn.momentum is None or bn.momentum >= 1:
        raise ValueError(
            f"{library} averages with a fixed decay below 1, got momentum={bn.momentum}. "
            "Write the layer with the decay that training goes on with."
        )
    if bn.momentum == 0:
        enough = 1
    else:
        enough = math.ceil(math.log(2.0**-26) / math.log(bn.momentum))
    weight = getattr(state, "weight", None)
    weight = None if weight is None else float(np.max(weight))
    if weight == 0:
        return 0
    if weight is not None and weight < 1 and bn.momentum > 0:
        return max(1, min(enough, round(math.log1p(-weight) / math.log(bn.momentum))))
    return max(enough, counted or 0)
