"""Flax NNX: `BatchNorm` that changes one import, `Norm` for any normalizer."""

from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
from jaxbn.nnx._fold import fold as fold
from jaxbn.nnx._norm import Norm as Norm
from jaxbn.nnx._reestimate import gather as gather
from jaxbn.nnx._reestimate import reestimate as reestimate
from jaxbn.nnx._reestimate import track_gathered as track_gathered
from jaxbn.nnx._train_state import TrainState as TrainState
from jaxbn.nnx._train_state import restore as restore
