"""Flax NNX: `BatchNorm` that changes one import, `Norm` for any normalizer."""

import jaxbn._flax  # noqa: F401
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._fold import fold
from jaxbn.nnx._freeze import freeze, unfreeze
from jaxbn.nnx._norm import Norm
from jaxbn.nnx._reestimate import gather, reestimate, track_gathered
from jaxbn.nnx._replace import replace
from jaxbn.nnx._train_state import TrainState, restore

__all__ = [
    "BatchNorm",
    "Norm",
    "TrainState",
    "fold",
    "freeze",
    "gather",
    "reestimate",
    "replace",
    "restore",
    "track_gathered",
    "unfreeze",
]

# Pickles and tracebacks name the public package, so that files may move.
for _public in (BatchNorm, Norm, TrainState):
    _public.__module__ = __name__
