"""Flax linen: `BatchNorm` that changes one import, `Norm` for any normalizer."""

import jaxbn._flax  # noqa: F401
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._norm import Norm
from jaxbn.linen._reestimate import gather, reestimate, track_gathered
from jaxbn.linen._replaced import replaced
from jaxbn.linen._train_state import TrainState, restore

__all__ = [
    "BatchNorm",
    "Norm",
    "TrainState",
    "gather",
    "reestimate",
    "replaced",
    "restore",
    "track_gathered",
]

# Pickles and tracebacks name the public package, so that files may move.
for _public in (BatchNorm, Norm, TrainState):
    _public.__module__ = __name__
